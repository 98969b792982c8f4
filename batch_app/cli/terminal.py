"""What a command tells: data on standard output, everything else on standard error."""

from __future__ import annotations

import sys

import orjson


def say(text: str) -> None:
    """A message for the person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A line of data, on standard output."""
    print(text)


def show_json(value: object) -> None:
    """Data as JSON, on standard output."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
