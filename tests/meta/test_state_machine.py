"""docs/state_machine.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from batch_app.core import TRANSITIONS, BatchStatus
from batch_app.wire import native, openai

PAGE = (Path(__file__).parents[2] / "docs" / "state_machine.md").read_text(encoding="utf-8")
EDGES = {(before.value, after.value) for before, nexts in TRANSITIONS.items() for after in nexts}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that begins with this heading, without the heading."""
    lines = PAGE.split(f"| {heading} |", 1)[1].splitlines()[2:]
    table = lines[: next(n for n, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


def test_the_diagram_is_the_table_of_transitions() -> None:
    drawn = re.findall(r"^    (\w+) --> (\w+)$", PAGE, re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == EDGES
    ends = set(re.findall(r"^    (\w+) --> \[\*\]$", PAGE, re.MULTILINE))
    assert ends == {status.value for status, nexts in TRANSITIONS.items() if not nexts}


def test_every_transition_has_somebody_who_makes_it() -> None:
    listed = [(row[0], row[1]) for row in rows("from")]
    assert len(listed) == len(set(listed))
    assert set(listed) == EDGES


def test_the_names_that_clients_see_are_right() -> None:
    seen = {row[0]: (row[1], row[2]) for row in rows("state")}
    assert seen == {
        status.value: (native.STATUS_NAMES[status], openai.STATUS_NAMES[status])
        for status in BatchStatus
    }


def test_a_crash_in_each_state_is_described() -> None:
    section = PAGE.split("## What a crash leads to", 1)[1]
    described = re.findall(r"^\| ([\w, ]+) \|", section, re.MULTILINE)
    states = {state.strip() for cell in described for state in cell.split(",")} - {"state"}
    assert states == {status.value for status in BatchStatus}
