"""What went wrong, told to a person: an error in a line, and the bad lines of a file."""

from __future__ import annotations

from collections.abc import Sequence

from batch_app.cli.figures import plural
from batch_app.cli.terminal import say
from batch_app.core import LineError
from batch_app.errors import BadLines, BatchAppError

MAX_LINES_SHOWN = 10


def say_error(error: BatchAppError) -> None:
    """Tell what went wrong, with the first of the bad lines where it was some."""
    if not isinstance(error, BadLines):
        say(f"❌ {error.message}")
        return
    message = error.message
    if error.errors and error.errors[0].message in message:  # it stands below
        message = f"The input can't run: {plural(error.num_errors, 'error')}. Nothing was queued."
    say(f"❌ {message}")
    say_lines(error.errors, error.num_errors)


def say_lines(errors: Sequence[LineError], num_errors: int) -> None:
    """The first of the bad lines; neighbours with the same error together."""
    together: list[list[LineError]] = []
    for bad in errors:
        before = together[-1][-1] if together else None
        is_next = before is not None and bad.line and before.line == bad.line - 1
        if before is not None and is_next and before.message == bad.message:
            together[-1].append(bad)
        else:
            together.append([bad])
    shown = together[:MAX_LINES_SHOWN]
    for group in shown:
        first, last = group[0], group[-1]
        where = f"line {first.line}: " if first.line else ""
        if last is not first:
            where = f"lines {first.line}–{last.line}: "
        say(f"   {where}{first.message}")
    rest = num_errors - sum(map(len, shown))
    if rest > 0:
        say(f"   … and {rest:,} more.")
