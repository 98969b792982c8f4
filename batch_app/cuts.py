"""Cuts: where the prompt lies in a line, found by searching, and the typed decoders of the pieces.

What is found here is only probable: `batch_app.lines` proves it before it relies on it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from batch_app.core import Endpoint

MAX_CUSTOM_ID_CHARS = 512


CustomId = Annotated[str, Meta(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)]


class Around(Struct, forbid_unknown_fields=True, gc=False):
    """A line, with the hole as its body."""

    custom_id: CustomId
    body: int
    method: Literal["POST"] = "POST"
    url: str = Endpoint.CHAT_COMPLETIONS.value


class _Text(Struct, forbid_unknown_fields=True, gc=False):
    type: Literal["text"]
    text: str


class _Function(Struct, forbid_unknown_fields=True, gc=False):
    name: str
    arguments: str | None = None


class _ToolCall(Struct, forbid_unknown_fields=True, gc=False):
    function: _Function
    id: str | None = None
    type: Literal["function"] | None = None


class _Message(Struct, forbid_unknown_fields=True, gc=False):
    """The usual messages: text, tools that were called and what they said."""

    role: Annotated[str, Meta(max_length=64)]
    content: str | Annotated[list[_Text], Meta(max_length=64)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[_ToolCall], Meta(max_length=8)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class _Item(Struct, forbid_unknown_fields=True, gc=False):
    """The usual item of a response's input."""

    role: Annotated[str, Meta(max_length=64)]
    content: str


_Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None


class _UsualChat(Struct, forbid_unknown_fields=True, gc=False):
    """The fields that most bodies have, and no others."""

    hole: int = msgspec.field(name="messages")
    model: str | None = None
    max_tokens: _Integer = None
    max_completion_tokens: _Integer = None
    temperature: float | None = None
    top_p: float | None = None
    seed: _Integer = None
    stream: bool | None = None
    user: str | None = None


class _UsualCompletion(Struct, forbid_unknown_fields=True, gc=False):
    hole: int = msgspec.field(name="prompt")
    model: str | None = None
    max_tokens: _Integer = None
    temperature: float | None = None
    top_p: float | None = None
    seed: _Integer = None
    stream: bool | None = None
    user: str | None = None

    @property
    def max_completion_tokens(self) -> None:
        return None


#: What stands where something was cut out. Nobody can write it into a line, not knowing it.
HOLE_VALUE = 10**18 + secrets.randbelow(8 * 10**18)
HOLE = b"%d" % HOLE_VALUE

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
decode_id = msgspec.json.Decoder(CustomId).decode
decode_around = msgspec.json.Decoder(Around).decode
decode_raws = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode

#: By endpoint: the prompt's field, the end of a list of prompts or messages where another field
#: follows, and the prompt's decoder.
CUTS: Mapping[str, tuple[bytes, bytes, Callable[[bytes], Any]]] = {
    Endpoint.CHAT_COMPLETIONS.value: (
        b'"messages"',
        b"}],",
        msgspec.json.Decoder(list[_Message]).decode,
    ),
    # Several prompts in one request are counted against "n": the plain way does.
    Endpoint.COMPLETIONS.value: (b'"prompt"', b'"],', _decode_text),
    Endpoint.EMBEDDINGS.value: (
        b'"input"',
        b'"],',
        msgspec.json.Decoder(str | list[str]).decode,
    ),
    Endpoint.RESPONSES.value: (
        b'"input"',
        b"}],",
        msgspec.json.Decoder(str | list[_Item]).decode,
    ),
}


USUAL: Mapping[str, Callable[[bytes], Any]] = {
    Endpoint.CHAT_COMPLETIONS.value: msgspec.json.Decoder(_UsualChat).decode,
    Endpoint.COMPLETIONS.value: msgspec.json.Decoder(_UsualCompletion).decode,
}


def end_of_body(raw: bytes) -> int:
    """Where the body probably ends in a line that doesn't end in two brackets; -1: unknown."""
    line = raw.rstrip(b" \t\r\n")
    if line.endswith(b"}}"):
        return len(line) - 1
    # Sorted by name, the body comes first.
    return max(line.rfind(b'},"custom_id"'), line.rfind(b'}, "custom_id"')) + 1 or -1


def ends_of_prompt(body: bytes, at: int, list_end: bytes) -> Iterator[int]:
    """Where the list or string that begins at `at` may end, the likeliest first."""
    if body.startswith(b"[", at):
        yield body.rfind(b"]") + 1
        for end in (body.find(list_end, at), body.rfind(list_end, at)):
            if end > 0:
                yield end + 2
    elif match := _STRING.match(body, at):
        yield match.end()
