"""What a server's answer is: a good one, an error, or nothing that can be used.

Nothing that a server sends may end up as a line that readers of the results can't read. What is
good stays as it came, byte for byte, but for line breaks and for what no reader of JSON takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from batch_app.core import Endpoint
from batch_app.engine.server_client import Answer, NoAnswer

#: Levels of lists and objects in an answer. Readers and writers of JSON give up at some hundreds
#: (orjson writes 254), and the line around the answer has some of its own.
MAX_DEPTH = 200
#: What orjson takes.
_ORJSON_DEPTH = 1024
#: Where an answer to each endpoint has what was asked for.
_CONTENT: Mapping[str, tuple[str, ...]] = {
    Endpoint.CHAT_COMPLETIONS: ("choices",),
    Endpoint.COMPLETIONS: ("choices",),
    Endpoint.RESPONSES: ("output",),
    Endpoint.EMBEDDINGS: ("data",),
    Endpoint.SCORE: ("data", "scores"),  # as vLLM and as SGLang answer
    Endpoint.RERANK: ("results",),
}
_ALL_CONTENT = frozenset({"choices", "data", "results", "output", "scores"})
#: The status that goes with an error's `code` or `type`, where that is a name. From OpenAI's,
#: Anthropic's and vLLM's documentation.
_STATUS_OF = {
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "NotFoundError": 404,
    "insufficient_quota": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "api_error": 500,
    "internal_server_error": 500,
    "InternalServerError": 500,
    "server_error": 500,
    "overloaded_error": 529,
}
#: Of an error that names none: the request was refused, as far as can be known.
_REFUSED = 400
_STATUSES = range(400, 600)
_STATUS_TEXT = re.compile("[45][0-9][0-9]")
_OTHER_SUCCESS = {
    202: "it took the request to answer it later",
    204: "it sent no answer",
    206: "it sent a part of the answer",
}
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\."
)
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_NOT_A_NUMBER = re.compile(rb"\b(NaN|Infinity|inf|nan)\b")
_EVENT = re.compile(rb"\s*(data|event|id|retry)?:")


class _Unusable(Exception):
    """Says what is wrong with the body, for "The server's answer …"."""


def understood(endpoint: str, answer: Answer) -> Answer | NoAnswer:
    """The answer as one line of JSON, which its body will be a part of.

    - A 200 with an error instead of what was asked for becomes an answer with the error's status.
    - A 200 without what was asked for is no answer, nor is any other 2xx.
    - An error that is no JSON object is put into one.
    """
    if 200 < answer.status < 300:
        what = _OTHER_SUCCESS.get(answer.status, "only a 200 has an answer")
        return _invalid(f"The server answered {answer.status}: {what}.")
    try:
        fields, body = _read(answer.body)
    except _Unusable as problem:
        if answer.status == 200:
            return _invalid(f"The server's answer {problem}.")
        message = f"The server answered {answer.status} without saying more in JSON"
        return replace(answer, body=error_body(answer.status, message))
    answer = replace(answer, body=body)
    if answer.status != 200:
        return answer
    error = _error_in(fields)
    if error is not None:
        return replace(answer, status=_status_of(error))
    lacks = _lack(endpoint, fields)
    return answer if lacks is None else _invalid(f"The server's answer has {lacks}.")


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """An error in OpenAI's shape."""
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return orjson.dumps({"error": error})


def _invalid(why: str) -> NoAnswer:
    return NoAnswer("invalid_response", why)


# -- errors, and what is missing -------------------------------------------------------------------


def _error_in(fields: Mapping[str, Any]) -> object | None:
    """The error that came in place of content; None where there is none."""
    if any(fields.get(name) for name in _ALL_CONTENT):
        return None
    if fields.get("object") == "error":  # without a field of its own
        return fields
    error: object = fields.get("error")
    return error or None


def _status_of(error: object) -> int:
    if isinstance(error, Mapping):
        for name in ("code", "status", "status_code", "type"):
            status = _as_status(error.get(name))
            if status is not None:
                return status
    return _REFUSED


def _as_status(value: object) -> int | None:
    if isinstance(value, str):
        if value in _STATUS_OF:
            return _STATUS_OF[value]
        return int(value) if _STATUS_TEXT.fullmatch(value) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return next((status for status in _STATUSES if is_number and status == value), None)


def _lack(endpoint: str, fields: Mapping[str, Any]) -> str | None:
    """What an answer to this endpoint should have and hasn't, in words."""
    names = _CONTENT.get(endpoint, ())
    if not names:
        return None
    name = next((one for one in names if one in fields), None)
    if name is None:
        return f"no `{names[0]}`"
    content = fields[name]
    if content is None:
        return f"`{name}`: null"
    if not isinstance(content, list):
        return f"a `{name}` that is no list"
    if not content and name != "output":  # a response may end before it has any
        return f"an empty `{name}`"
    if name == "choices" and not all(isinstance(choice, dict) for choice in content):
        return "a choice that is no object"
    return None


# -- JSON ------------------------------------------------------------------------------------------


def _read(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON object, and its text on one line.

    Half a surrogate pair, and bytes that are no UTF-8, become U+FFFD. Raises _Unusable.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        body, broken = _without_broken_characters(body), body
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise _Unusable(_what_is_wrong(broken)) from None
    if not isinstance(value, dict):
        raise _Unusable("is JSON, but not an object")
    if _is_too_deep(body):
        raise _Unusable(f"is nested more than {MAX_DEPTH} levels deep")
    if b"\n" in body or b"\r" in body:
        # Between the parts of JSON, where a blank means the same; never in a string.
        body = body.replace(b"\r", b" ").replace(b"\n", b" ")
    return value, body


def _without_broken_characters(body: bytes) -> bytes:
    whole = body.decode("utf-8", errors="replace").encode()
    return _ESCAPE.sub(lambda found: b"\\ufffd" if found["lone"] else found[0], whole)


def _is_too_deep(body: bytes) -> bool:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    around = _ORJSON_DEPTH - MAX_DEPTH
    try:  # the parser counts
        orjson.loads(b"[" * around + body + b"]" * around)
    except orjson.JSONDecodeError:
        return True
    return False


def _what_is_wrong(body: bytes) -> str:
    """Why a body isn't JSON: what follows "The server's answer". Says nothing of its content."""
    if not body.strip():
        return "is empty"
    if body.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte order mark (BOM), which JSON must not"
    if body.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in body[:4]:
        return "is no UTF-8, which JSON has to be"
    if _EVENT.match(body):
        return "is a stream of server-sent events: the server streams although it wasn't asked to"
    if body.lstrip().startswith(b"<"):
        return "is HTML or XML, no JSON: is base_url right?"
    if _NOT_A_NUMBER.search(_STRING.sub(b'""', body)):
        return "has a NaN or Infinity, which is no JSON"
    if not body.lstrip().startswith((b"{", b"[", b'"')):
        return "is no JSON"
    return "is no JSON: it is damaged or cut off, or has a number that is too large"
