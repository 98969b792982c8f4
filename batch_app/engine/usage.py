"""The tokens of an answer, as its body tells them."""

from __future__ import annotations

import msgspec

from batch_app.core import TokenCounts


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


class _Body(msgspec.Struct):
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Body).decode


def usage_of(body: bytes) -> tuple[TokenCounts, bool]:
    """What the answer's `usage` counts, nothing where it has none that can be understood; and
    whether it says how much of the prompt came from the prefix cache."""
    try:
        usage = _decode(body).usage or _Usage()
    except msgspec.MsgspecError:
        usage = _Usage()
    of_prompt = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    of_output = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    counts = TokenCounts(
        usage.prompt_tokens or usage.input_tokens or 0,
        usage.completion_tokens or usage.output_tokens or 0,
        of_prompt.cached_tokens or 0,
        of_output.reasoning_tokens or 0,
    )
    return counts, of_prompt.cached_tokens is not None
