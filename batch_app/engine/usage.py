"""What an answer's body says of it: its tokens, and why the model ended it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from batch_app.core import FinishReason, TokenCounts, token_count

#: By the names of OpenAI, and of servers that speak its API.
_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "max_output_tokens": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
#: Of several choices, the answer has the reason that comes first here.
_FIRST = (
    FinishReason.LENGTH,
    FinishReason.CONTENT_FILTER,
    FinishReason.OTHER,
    FinishReason.TOOL_CALLS,
    FinishReason.STOP,
)


class AnswerFacts(NamedTuple):
    """`tells_cached`: whether `usage` says how much of the prompt came from the prefix cache."""

    tokens: TokenCounts
    tells_cached: bool
    finish_reason: FinishReason | None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Body(msgspec.Struct):
    """`status` and `incomplete_details` are the Responses API's."""

    usage: Any = None
    choices: list[_Choice] | None = None
    object: str | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None


#: What decoders raise: of no JSON, of bytes that are not UTF-8, of deep nesting.
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
_decode = msgspec.json.Decoder(_Body).decode


def read_answer(body: bytes) -> AnswerFacts:
    """Return what the body of a response with status 200 says of itself.

    Whatever of it can't be understood is left out: tokens are 0 then, the finish reason is None.
    """
    try:
        said = _decode(body)
    except _UNREADABLE:
        said = _what_can_be_read(body)
    return AnswerFacts(*_tokens(_mapping(said.usage)), _finish_reason(said))


def _what_can_be_read(body: bytes) -> _Body:
    """Of a body with a field of an odd type, the others. Slow."""
    said = _Body()
    with suppress(*_UNREADABLE):
        fields = msgspec.json.decode(body, type=dict[str, Any])
        for field in msgspec.structs.fields(_Body):
            with suppress(*_UNREADABLE):
                value = msgspec.convert(fields.get(field.name), field.type)
                setattr(said, field.name, value)
    return said


def _finish_reason(said: _Body) -> FinishReason | None:
    if said.choices is not None:
        if len(said.choices) == 1 and (only := said.choices[0].finish_reason):
            return _FINISH_REASONS.get(only, FinishReason.OTHER)
        reasons: Iterable[str | None] = {choice.finish_reason for choice in said.choices}
    elif said.object == "response" and said.status is not None:
        reason = said.incomplete_details.reason if said.incomplete_details else None
        reasons = ["stop" if said.status == "completed" else reason or said.status]
    else:
        return None
    found = {_FINISH_REASONS.get(name, FinishReason.OTHER) for name in reasons if name}
    return next((reason for reason in _FIRST if reason in found), None)


def _tokens(usage: Mapping[str, Any]) -> tuple[TokenCounts, bool]:
    """What `usage` counts, in either spelling: the Responses API says input and output tokens. And
    whether it says how much of the prompt came from the prefix cache.

    Each count that is missing or can't be understood is 0, and none is larger than the results log
    can hold or than the whole that it is a part of.
    """
    prompt = _first(usage, "prompt_tokens", "input_tokens")
    output = _first(usage, "completion_tokens", "output_tokens")
    cached = _detail(usage, "cached_tokens", "prompt_tokens_details", "input_tokens_details")
    reasoning = _detail(
        usage, "reasoning_tokens", "completion_tokens_details", "output_tokens_details"
    )
    counts = TokenCounts(
        prompt, output, min(token_count(cached), prompt), min(token_count(reasoning), output)
    )
    return counts, cached is not None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(usage: Mapping[str, Any], *names: str) -> int:
    counts = (token_count(usage.get(name)) for name in names)
    return next((count for count in counts if count), 0)


def _detail(usage: Mapping[str, Any], name: str, *places: str) -> object:
    """None where it isn't told."""
    found = (_mapping(usage.get(place)).get(name) for place in places)
    return next((value for value in found if value is not None), None)
