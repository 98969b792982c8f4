"""Every way to end has a code, and the codes are told apart."""

from __future__ import annotations

import pytest

from batch_app.cli.exit_codes import MEANINGS, ExitCode, code_of
from batch_app.errors import (
    BadLines,
    BatchAppError,
    ConfigError,
    Conflict,
    Forbidden,
    ModelNotFound,
    ServerFailed,
    ServerUnreachable,
    StoreUnavailable,
    Unauthenticated,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadLines("m", [], 0), 3),
        (ModelNotFound("m"), 4),
        (Unauthenticated("m"), 5),
        (Forbidden("m"), 5),
        (Conflict("m"), 6),
        (StoreUnavailable("m"), 7),
        (ServerUnreachable("m"), 7),
        (ServerFailed("m", status=500), 7),
        (ConfigError("m"), 1),
    ],
)
def test_the_code_of_an_error(error: BatchAppError, code: int) -> None:
    assert code_of(error) == code


def test_every_code_has_a_meaning_for_the_documents() -> None:
    assert list(MEANINGS) == list(ExitCode)
