"""One line of an input file: what it must look like, and what is wrong when it doesn't.

The check is of form: JSON, the line's own fields, the fields of the body that every endpoint
needs, and the types of the usual sampling parameters. What only the model can judge (a prompt too
long for its context, a tool the template doesn't know) the engine answers for that request alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from batch_app.core import Endpoint

MAX_CUSTOM_ID_CHARS = 512

_ENDPOINTS = frozenset(endpoint.value for endpoint in Endpoint)
_NUMBERS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "length_penalty",
    }
)
_INTEGERS = frozenset(
    {
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "min_tokens",
        "n",
        "seed",
        "top_k",
        "top_logprobs",
        "truncate_prompt_tokens",
        "prompt_logprobs",
    }
)
_BOOLEANS = frozenset(
    {"stream", "ignore_eos", "skip_special_tokens", "add_generation_prompt", "echo"}
)
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    Endpoint.CHAT_COMPLETIONS: ("messages",),
    Endpoint.COMPLETIONS: ("prompt",),
    Endpoint.EMBEDDINGS: ("input",),
    Endpoint.RESPONSES: ("input",),
    Endpoint.SCORE: (),  # vLLM takes several spellings of the pair
    Endpoint.RERANK: ("query", "documents"),
}
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class LineProblem(Exception):
    """Why a line can't run; becomes a `core.LineError` where the line's number is known."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line that passed. `model` is None where the body names none."""

    custom_id: str
    endpoint: str
    model: str | None
    max_tokens: int
    body: dict[str, Any]


def parse_line(raw: bytes, only_endpoint: str | None = None) -> RequestLine:
    """Check one line (without its line feed) and take it apart.

    `only_endpoint`: what its `url` must be; None: any that there is.

    Raises:
        LineProblem: with a code of the OpenAI dialect's list, and a message that says what to do.
    """
    line = _parse_json(raw)
    custom_id = _custom_id(line)
    method = line.get("method", "POST")
    if method != "POST":
        raise LineProblem("invalid_method", '"method" must be "POST", or be left out.', "method")
    endpoint = line.get("url", Endpoint.CHAT_COMPLETIONS.value)
    if only_endpoint is not None and isinstance(endpoint, str) and endpoint != only_endpoint:
        raise LineProblem(
            "url_mismatch",
            f'"url" is "{endpoint[:64]}", but the batch is for "{only_endpoint}".',
            "url",
        )
    if not isinstance(endpoint, str) or endpoint not in _ENDPOINTS:
        raise LineProblem(
            "invalid_request", f'"url" must be one of: {", ".join(sorted(_ENDPOINTS))}.', "url"
        )
    body = line.get("body")
    if not isinstance(body, dict):
        if body is None:
            raise LineProblem("missing_required_parameter", 'The line has no "body".', "body")
        raise LineProblem(
            "invalid_request", f'"body" must be an object, not {_kind(body)}.', "body"
        )
    _check_body(endpoint, body)
    return RequestLine(
        custom_id=custom_id,
        endpoint=endpoint,
        model=body.get("model"),
        max_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or 0,
        body=body,
    )


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise LineProblem("invalid_json_line", _json_message(raw, error)) from None
    except RecursionError:
        raise LineProblem("invalid_json_line", "The JSON is nested too deeply.") from None
    if not isinstance(line, dict):
        raise LineProblem(
            "invalid_json_line", f"A line must be a JSON object, not {_kind(line)}.", None
        )
    return line


def _json_message(raw: bytes, error: orjson.JSONDecodeError) -> str:
    message = f"This line is not valid JSON (column {error.colno}): {error.msg}."
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as decode_error:
        return f"This line is not valid UTF-8 (byte {decode_error.start + 1}). Save it as UTF-8."
    if raw[max(0, error.pos - 2) : error.pos + 9].find(b"NaN") >= 0 or b"Infinity" in raw:
        message += " JSON has no NaN or Infinity: give a number, or leave the field out."
    return message


def _custom_id(line: Mapping[str, Any]) -> str:
    custom_id = line.get("custom_id")
    if custom_id is None:
        raise LineProblem(
            "missing_required_parameter",
            'The line has no "custom_id". Give each line one of its own.',
            "custom_id",
        )
    if not isinstance(custom_id, str):
        raise LineProblem(
            "invalid_request", f'"custom_id" must be a string, not {_kind(custom_id)}.', "custom_id"
        )
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise LineProblem(
            "invalid_request",
            f'"custom_id" must have 1 to {MAX_CUSTOM_ID_CHARS} characters, not {len(custom_id)}.',
            "custom_id",
        )
    return custom_id


def _check_body(endpoint: str, body: Mapping[str, Any]) -> None:
    if body.get("stream"):
        raise LineProblem(
            "invalid_request",
            '"stream" can\'t be true in a batch: results are written to a file. Leave it out.',
            "body.stream",
        )
    for field in _REQUIRED[endpoint]:
        if body.get(field) is None:
            raise LineProblem(
                "missing_required_parameter", f'The body has no "{field}".', f"body.{field}"
            )
    for field, value in body.items():
        if value is None:
            continue
        if field in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise _wrong_type(field, "a number", value)
        elif field in _INTEGERS:
            if isinstance(value, bool) or not isinstance(value, int):
                raise _wrong_type(field, "an integer", value)
            if not -(2**63) <= value < 2**63:
                raise _wrong_type(field, "an integer of at most 64 bits", value)
        elif field in _BOOLEANS:
            if not isinstance(value, bool):
                raise _wrong_type(field, "true or false", value)
        elif field == "model":
            if not isinstance(value, str):
                raise _wrong_type(field, "a string", value)
        elif field == "messages" and endpoint == Endpoint.CHAT_COMPLETIONS:
            _check_messages(value)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise LineProblem(
            "invalid_request", '"messages" must be a list of at least one message.', "body.messages"
        )
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise LineProblem(
                "invalid_request",
                f"Message {position} must be an object, not {_kind(message)}.",
                f"body.messages[{position}]",
            )
        if not isinstance(message.get("role"), str):
            raise LineProblem(
                "invalid_request",
                f'Message {position} needs a "role": "user", "system" or "assistant", for example.',
                f"body.messages[{position}].role",
            )


def _wrong_type(field: str, wanted: str, value: Any) -> LineProblem:
    return LineProblem(
        "invalid_request", f'"{field}" must be {wanted}, not {_kind(value)}.', f"body.{field}"
    )


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)
