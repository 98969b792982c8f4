"""A few trials of the kind that `make torture` makes by the hundred."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from batch_app.faults import CRASH_POINTS
from faults.trial import Trial
from support.postgres import PostgresServer

SOURCES = Path(__file__).parents[2] / "batch_app"


@pytest.mark.parametrize(
    ("seed", "kind", "what"),
    [
        (11, "kill", ""),
        (12, "crash point", "results-written"),
        (13, "crash point", "published"),
        (14, "crash point", "upload-moved"),
        (15, "failing call", ""),
        (16, "failing call", ""),
    ],
)
def test_nothing_is_lost_or_doubled(tmp_path: Path, seed: int, kind: str, what: str) -> None:
    report = Trial(tmp_path, seed, kind, what).run()
    assert report.failure is None, report
    if kind == "crash point":
        assert report.requests


@pytest.mark.parametrize(
    ("seed", "kind", "what"),
    [
        (21, "kill", ""),
        (22, "database", ""),
        (26, "failing call", "commit answer"),
    ],
)
def test_nothing_is_lost_or_doubled_on_postgresql(
    tmp_path: Path, postgres: PostgresServer, seed: int, kind: str, what: str
) -> None:
    report = Trial(tmp_path, seed, kind, what, postgres).run()
    assert report.failure is None, report
    assert report.requests


def test_each_crash_point_stands_in_the_code_once() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    found = Counter(re.findall(r'crash_point\("([\w-]+)"\)', code))
    assert found == Counter(CRASH_POINTS)
