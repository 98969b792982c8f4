"""One line of a published file, the same in both dialects.

`{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`: a request that
was answered has a `response` (of whatever status) and no `error`; one that never ran, or that the
engine died of, has an `error` and no `response`. Lines are put together from bytes, since the body
is JSON already.
"""

from __future__ import annotations

import msgspec
import orjson

from batch_app.core import is_success
from batch_app.json_lines import escape_line_separators


def request_ids(batch_id: str, number: int) -> tuple[str, str]:
    """The ids of a request's line and of its response: fixed by batch and number, so that a
    request that is run again after a crash keeps them."""
    unique = f"{batch_id.removeprefix('batch_')}{number:08x}"
    return f"batch_req_{unique}", f"req_{unique}"


def response_line(
    batch_id: str, number: int, custom_id: str, status_code: int, body: bytes
) -> bytes:
    """`body` is a JSON object. Without a line feed at the end."""
    line_id, request_id = request_ids(batch_id, number)
    return escape_line_separators(
        b'{"id":"%b","custom_id":%b,"response":{"status_code":%d,"request_id":"%b","body":%b},'
        b'"error":null}'
        % (line_id.encode(), orjson.dumps(custom_id), status_code, request_id.encode(), body)
    )


def error_line(batch_id: str, number: int, custom_id: str, code: str, message: str) -> bytes:
    """For a request that has no response."""
    line_id, _ = request_ids(batch_id, number)
    return escape_line_separators(
        orjson.dumps(
            {
                "id": line_id,
                "custom_id": custom_id,
                "response": None,
                "error": {"code": code, "message": message},
            }
        )
    )


class _Status(msgspec.Struct):
    status_code: int


class _Error(msgspec.Struct):
    """Whatever stands in it."""


class _Verdict(msgspec.Struct):
    """Of a line, what says whether its request failed."""

    response: _Status | None = None
    error: _Error | None = None


_decode_verdict = msgspec.json.Decoder(_Verdict).decode


def has_failed(line: bytes) -> bool:
    """Return whether this line's request counts as failed: the tally, the files that are published,
    the filter of downloads and a retry all go by `is_success`."""
    verdict = _decode_verdict(line)
    if verdict.response is None or verdict.error is not None:
        return True
    return not is_success(verdict.response.status_code)


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Line(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: msgspec.Raw


_NULL = msgspec.Raw(b"null")
_decode_line = msgspec.json.Decoder(_Line).decode
_encode_line = msgspec.json.Encoder().encode


def as_run_batch(line: bytes) -> bytes:
    """The same line as vLLM's `run-batch` writes it, with a line feed: the body of a refusal stands
    under `error`. Its own reader doesn't take it for a body."""
    read = _decode_line(line)
    if read.response is not None and not is_success(read.response.status_code):
        read.error, read.response.body = read.response.body, _NULL
    return escape_line_separators(_encode_line(read)) + b"\n"
