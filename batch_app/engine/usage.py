"""The tokens of an answer, as its body tells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from batch_app.core import TokenCounts, token_count


class _Body(msgspec.Struct):
    usage: Any = None


_decode = msgspec.json.Decoder(_Body).decode


def usage_of(body: bytes) -> tuple[TokenCounts, bool]:
    """What the answer's `usage` counts, in either spelling: the Responses API says input and output
    tokens. And whether it says how much of the prompt came from the prefix cache.

    Each count that is missing or can't be understood is 0, and none is larger than the results log
    can hold or than the whole that it is a part of.
    """
    try:
        usage = _mapping(_decode(body).usage)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        usage = {}
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
