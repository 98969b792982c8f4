"""What an answer's body says of it: its tokens, and why the model ended it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from batch_app.core import FinishReason, TokenCounts

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


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """`usage` in its two spellings: the Responses API says input and output tokens."""

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Body(msgspec.Struct):
    """`status` and `incomplete_details` are the Responses API's."""

    usage: _Usage | None = None
    choices: list[_Choice] | None = None
    object: str | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None


_decode = msgspec.json.Decoder(_Body).decode


def read_answer(body: bytes) -> AnswerFacts:
    """Return what the body of a response with status 200 says of itself.

    Whatever of it can't be understood is left out: tokens are 0 then, the finish reason is None.
    """
    try:
        said = _decode(body)
    except msgspec.MsgspecError:
        said = _what_can_be_read(body)
    return AnswerFacts(*_tokens(said.usage or _Usage()), _finish_reason(said))


def _what_can_be_read(body: bytes) -> _Body:
    """Of a body with a field of an odd type, the others. Slow."""
    said = _Body()
    with suppress(msgspec.MsgspecError):
        fields = msgspec.json.decode(body, type=dict[str, Any])
        for field in msgspec.structs.fields(_Body):
            with suppress(msgspec.MsgspecError):
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


def _tokens(usage: _Usage) -> tuple[TokenCounts, bool]:
    of_prompt = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    of_output = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    counts = TokenCounts(
        usage.prompt_tokens or usage.input_tokens or 0,
        usage.completion_tokens or usage.output_tokens or 0,
        of_prompt.cached_tokens or 0,
        of_output.reasoning_tokens or 0,
    )
    return counts, of_prompt.cached_tokens is not None
