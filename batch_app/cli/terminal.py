"""What a command tells: data on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batch_app.doctor.finding import Finding
from batch_app.json_lines import escape_line_separators

_STYLES = {
    "completed": "green",
    "running": "cyan",
    "failed": "red",
    "expired": "red",
    "cancelled": "yellow",
    "ok": "green",
    "problem": "red",
    "warning": "yellow",
    "warn": "yellow",
    "fail": "red",
}


def say(text: str) -> None:
    """A message for the person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A line of data, on standard output."""
    print(text, flush=True)


def show_json(value: object, *, compact: bool = False) -> None:
    """Data as JSON, on standard output; `compact`: in one line."""
    text = orjson.dumps(value, option=0 if compact else orjson.OPT_INDENT_2)
    print(escape_line_separators(text).decode(), flush=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under their columns' names. Off a terminal nothing is cut off or coloured."""
    console = Console(highlight=False)
    if not console.is_terminal:
        table = [[name.upper() for name in columns], *rows]
        widths = [max(len(row[place]) for row in table) for place in range(len(columns))]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            show("  ".join(cells).rstrip())
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        # What a person copies stays whole.
        shown.add_column(name, no_wrap=number == 0, overflow="fold" if number else "ignore")
    for row in rows:
        shown.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(shown)


def show_facts(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line."""
    width = max((len(name) for name, _ in rows), default=0)
    console = Console(highlight=False, soft_wrap=True)
    for name, value in rows:
        console.print(
            Text(f"{name.ljust(width)}  ", style="bold"),
            Text(value, _STYLES.get(value, "")),
            sep="",
        )


def show_findings(findings: Sequence[Finding], width: int = 0) -> None:
    """What was looked at, one a line, each with what to do about it beneath. Nothing is cut off.

    `width`: of the column of subjects, at least.
    """
    width = max((width, *(len(finding.subject) for finding in findings)))
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(
            Text(f"  {finding.state.ljust(4)}", _STYLES[finding.state]),
            Text(f"  {finding.subject.ljust(width)}  ", style="bold"),
            Text(finding.message),
            sep="",
        )
        if finding.fix:
            console.print(Text(f"{' ' * (width + 10)}fix: {finding.fix}"))
