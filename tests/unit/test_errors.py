"""Every error that can reach a route has its status; the tree in the docstring is the real one."""

from __future__ import annotations

import re

import orjson
import pytest

from batch_app import errors
from batch_app.core import LineError
from batch_app.errors import (
    BadLines,
    BadRequest,
    BatchAppError,
    ConfigError,
    Conflict,
    EngineError,
    IndexUnreadable,
    KeyInUse,
    LeaseLost,
    ModelNotFound,
    NotFound,
    ResultsLogError,
    ServerFailed,
    ServerUnreachable,
    StorageFull,
    StoreUnavailable,
    TooLarge,
)
from batch_app.routes.errors import STATUS, answer, status_of

#: Raised at start, in the worker or in the client only. Were one to reach a route, it would
#: be a bug: a 500.
NEVER_IN_A_ROUTE = (
    ConfigError,
    ServerUnreachable,
    ServerFailed,
    LeaseLost,
    IndexUnreadable,
    ResultsLogError,
    EngineError,
)


def all_errors(base: type[BatchAppError] = BatchAppError) -> list[type[BatchAppError]]:
    return [kind for sub in base.__subclasses__() for kind in (sub, *all_errors(sub))]


def test_every_error_is_mapped() -> None:
    for kind in all_errors():
        if issubclass(kind, NEVER_IN_A_ROUTE):
            assert kind not in STATUS
        else:
            assert kind in STATUS, f"{kind.__name__} has no status in routes/errors.py"


def test_the_docstring_draws_the_tree_with_its_statuses() -> None:
    drawn = dict(re.findall(r"── (\w+)(?:.*?  (\d{3}))?", errors.__doc__ or ""))
    ours = {kind for kind in all_errors() if kind.__module__ == errors.__name__}
    assert set(drawn) == {kind.__name__ for kind in ours}
    for kind in ours:
        assert drawn[kind.__name__] == (str(STATUS[kind]) if kind in STATUS else "")


@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (BadRequest("m", param="p"), 400, "invalid_request_error", {}),
        (TooLarge("m"), 413, "invalid_request_error", {}),
        (NotFound("m"), 404, "not_found_error", {}),
        (ModelNotFound("m"), 404, "not_found_error", {}),
        (Conflict("m"), 409, "conflict_error", {"x-should-retry": "false"}),
        (KeyInUse("m"), 409, "conflict_error", {"x-should-retry": "true", "retry-after": "2"}),
        (StorageFull("m"), 507, "server_error", {"x-should-retry": "false"}),
        (StoreUnavailable("m"), 503, "server_error", {"retry-after": "2"}),
        (LeaseLost("secret"), 500, "server_error", {}),
    ],
)
def test_answers(error: BatchAppError, status: int, kind: str, headers: dict[str, str]) -> None:
    response = answer(error)
    body = orjson.loads(response.body)["error"]

    assert response.status_code == status == status_of(error)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == kind
    assert "secret" not in body["message"]
    assert headers.items() <= dict(response.headers).items()


def test_bad_lines_lists_the_first_hundred() -> None:
    lines = [LineError("invalid_json_line", "m", line) for line in range(1, 201)]

    body = orjson.loads(answer(BadLines("m", lines, 5000)).body)

    assert len(body["errors"]) == 100
    assert body["errors"][0] == {
        "code": "invalid_json_line",
        "line": 1,
        "message": "m",
        "param": None,
    }
    assert body["total"] == 5000
    assert body["error"]["code"] == "invalid_json_line"
