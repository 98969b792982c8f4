"""What becomes of a file's lines, in the background, seen through the OpenAI SDK."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.sdk import (
    Sdk,
    assert_counts,
    line,
    lines,
    stamped,
)


def test_creating_does_not_wait_for_the_check(idle_sdk: Sdk) -> None:
    batch = idle_sdk.create(lines(50_000))
    assert batch.status == "validating"
    assert_counts(batch, 0, 0, 0)
    checked = idle_sdk.wait(batch, "in_progress")
    assert_counts(checked, 50_000, 0, 0)
    idle_sdk.client.batches.cancel(batch.id)
    idle_sdk.wait(batch)


def bad(custom_id: str, /, **changes: Any) -> dict[str, Any]:
    kept = (line(custom_id) | changes).items()
    return {name: value for name, value in kept if value is not ...}


#: What is wrong, the file, and the errors as (code, line, param).
BAD_FILES: dict[str, tuple[Any, list[tuple[str, int | None, str | None]]]] = {
    "empty": (b"", [("empty_file", None, None)]),
    "blank": (b"\n \r\n\n", [("empty_batch", None, None)]),
    "duplicate": (
        [line("a"), line("b"), line("a")],
        [("duplicate_custom_id", 3, "custom_id")],
    ),
    "no JSON": (
        json.dumps(line("a")).encode() + b"\n{not json}\n\n[1]\n",
        [("invalid_json_line", 2, None), ("invalid_json_line", 4, None)],
    ),
    "other url": ([bad("a", url="/v1/completions")], [("url_mismatch", 1, "url")]),
    "unknown url": ([bad("a", url="/v1/audio")], [("url_mismatch", 1, "url")]),
    "method": ([bad("a", method="GET")], [("invalid_method", 1, "method")]),
    "model": ([line("a", "gpt-4o")], [("model_not_found", 1, "body.model")]),
    "no model": (
        [bad("a", body={"messages": [{"role": "user", "content": "x"}]})],
        [("missing_required_parameter", 1, "body.model")],
    ),
    "no id": ([bad("a", custom_id=...)], [("missing_required_parameter", 1, "custom_id")]),
    "no messages": (
        [bad("a", body={"model": "sim"})],
        [("missing_required_parameter", 1, "body.messages")],
    ),
    "no body": ([bad("a", body=...)], [("missing_required_parameter", 1, "body")]),
    "long id": ([bad("x" * 513)], [("invalid_request", 1, "custom_id")]),
    "stream": ([line("a", stream=True)], [("invalid_request", 1, "body.stream")]),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_lines_fail_the_batch(idle_sdk: Sdk, what: str) -> None:
    content, found = BAD_FILES[what]
    batch = idle_sdk.run(content)
    assert batch.status == "failed"
    assert stamped(batch) == ["failed_at"]
    assert batch.errors
    assert batch.errors.object == "list"
    assert batch.errors.data
    assert [(error.code, error.line, error.param) for error in batch.errors.data] == found
    assert all(error.message for error in batch.errors.data)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert_counts(batch, 0, 0, 0)
    assert idle_sdk.client.files.delete(batch.input_file_id).deleted
