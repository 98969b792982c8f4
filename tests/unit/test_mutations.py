"""The breaks of `tools/mutations.py`: each changes its place, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutation_check import chosen
from mutations import Break, breaks_in

SOURCE = '''"""A module."""
LIMIT: int = 3


def halves(values: list[int], *, all_of_them: bool = True) -> int:
    """Docstring with 7 < 8."""
    total = 0
    for value in values:
        if value < LIMIT and not all_of_them or value == 1:
            total += value // 2
            values.clear()
    logger.warning("%d", 5)
    if total is None or total in (2,):
        raise ValueError(f"ä {total + 1}")
    return total - 1
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_each_kind_of_break_is_found(module: Path) -> None:
    found = [(each.line, each.before, each.after) for each in breaks_in(module, module.parent)]

    assert found == [
        (2, "3", "(3 + 1)"),
        (5, "True", "False"),
        (7, "0", "(0 + 1)"),
        (9, "<", "<="),
        (9, "and", "or"),
        (9, "not ", ""),
        (9, "or", "and"),
        (9, "==", "!="),
        (9, "1", "(1 + 1)"),
        (10, "//", "*"),
        (10, "2", "(2 + 1)"),
        (11, "values.clear()", "pass"),
        (13, "is", "is not"),
        (13, "or", "and"),
        (13, "in", "not in"),
        (13, "2", "(2 + 1)"),
        (15, "-", "+"),
        (15, "1", "(1 + 1)"),
    ]


def test_a_break_changes_one_line_into_python(module: Path) -> None:
    for each in breaks_in(module, module.parent):
        broken = each.apply(SOURCE)
        ast.parse(broken)
        pairs = zip(SOURCE.splitlines(), broken.splitlines(), strict=True)
        assert [n for n, (old, new) in enumerate(pairs, 1) if old != new] == [each.line]


def test_a_break_of_other_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module\.py:1 does not have '<'"):
        Break("module.py", 1, 0, "<", "<=").apply("a < b\n")


def test_a_seed_chooses_the_same_breaks_of_different_lines() -> None:
    breaks = chosen(18, 30)

    assert breaks == chosen(18, 30) != chosen(19, 30)
    assert len({(each.path, each.line) for each in breaks}) == 30
