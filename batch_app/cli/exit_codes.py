"""What the program ends with, so that a script can tell what happened."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from batch_app.errors import (
    BadRequest,
    BatchAppError,
    Conflict,
    Forbidden,
    NotFound,
    ServerFailed,
    ServerUnreachable,
    StoreUnavailable,
    TooMany,
    Unauthenticated,
)


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    NOT_FOUND = 4
    DENIED = 5
    CONFLICT = 6
    UNAVAILABLE = 7
    SOME_FAILED = 8
    NOT_COMPLETED = 9
    TIMED_OUT = 10
    UNWELL = 11
    INTERRUPTED = 130


#: For docs/command_line.md.
MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.OK: "It worked.",
    ExitCode.FAILED: "It did not, and no other code fits: the message says why.",
    ExitCode.USAGE: "The command line itself is wrong: no such command, flag or value.",
    ExitCode.BAD_INPUT: "What was given can't be used: bad lines, a missing file, a bad row.",
    ExitCode.NOT_FOUND: "There is no such batch or model, or it belongs to another API key.",
    ExitCode.DENIED: "The server asks for an API key, or this one may not do that.",
    ExitCode.CONFLICT: "It exists, but its state forbids this: a batch that has finished can't be "
    "cancelled.",
    ExitCode.UNAVAILABLE: "The server can't be reached, or can't answer at the moment.",
    ExitCode.SOME_FAILED: "The batch is complete, but some of its requests failed.",
    ExitCode.NOT_COMPLETED: "The batch ended as `failed`, `cancelled` or `expired`.",
    ExitCode.TIMED_OUT: "The time that `--timeout` gave ran out. The batch goes on.",
    ExitCode.UNWELL: "`doctor` or `models check` found something that keeps batches from running.",
    ExitCode.INTERRUPTED: "Ctrl-C. A batch on a server goes on.",
}

#: The most specific class decides.
_CODES: Mapping[type[BatchAppError], ExitCode] = {
    BadRequest: ExitCode.BAD_INPUT,
    NotFound: ExitCode.NOT_FOUND,
    Unauthenticated: ExitCode.DENIED,
    Forbidden: ExitCode.DENIED,
    Conflict: ExitCode.CONFLICT,
    TooMany: ExitCode.CONFLICT,
    ServerUnreachable: ExitCode.UNAVAILABLE,
    ServerFailed: ExitCode.UNAVAILABLE,
    StoreUnavailable: ExitCode.UNAVAILABLE,
}


def code_of(error: BatchAppError) -> ExitCode:
    """The exit code for an error that ended a command."""
    kinds = (kind for kind in type(error).__mro__ if kind in _CODES)
    return next((_CODES[kind] for kind in kinds), ExitCode.FAILED)
