"""One line of an input file: what it must look like, and what is wrong when it doesn't.

The check is of form and policy: JSON, the line's own fields, and the fields of its body
(`batch_app.policy`). What only the model can judge (a prompt too long for its context, a tool the
template doesn't know) the engine answers for that request alone.

There are three ways through. The **plain way** parses the line and walks it; it alone says what is
wrong. The **short way** takes only good lines, for speed. It rests on this: in one file, the lines
differ in their ids and prompts, and hardly in anything else. So the line is cut into three, by
searching for bytes: the prompt (`messages`), the rest of the body around it, and the line around
the body. The prompt and the line are decoded by typed decoders; the rest is judged as the plain way
would, and the verdict is kept for other lines with the same bytes there. In the place of what was
cut out stands a secret number, and it must come back as the value of the field: a cut in the wrong
place can't pass. Once two lines in a row were cut alike, the **shortest way** takes those that
are the same byte for byte but for the text of the id and the prompt, which two typed decoders read.
What a shorter way doesn't take, for whatever reason, goes the next longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import msgspec
import orjson
from msgspec import Struct

from batch_app.core import Endpoint
from batch_app.cuts import (
    CUTS,
    HOLE,
    HOLE_VALUE,
    MAX_CUSTOM_ID_CHARS,
    USUAL,
    decode_around,
    decode_id,
    decode_raws,
    end_of_body,
    ends_of_prompt,
)
from batch_app.policy import check_body
from batch_app.shapes import BodyLimits, LineProblem, kind

__all__ = ["LineParser", "LineProblem", "RequestLine", "parse_line"]

#: Verdicts kept, and the longest rest of a body that is worth keeping.
MAX_VERDICTS = 1024
MAX_VERDICT_BYTES = 64 << 10

_ENDPOINTS = frozenset(endpoint.value for endpoint in Endpoint)
#: Endpoints whose answers are made token by token.
GENERATES = frozenset(
    {Endpoint.CHAT_COMPLETIONS.value, Endpoint.COMPLETIONS.value, Endpoint.RESPONSES.value}
)
#: Endpoints whose prompt is a list of messages.
_CONVERSATIONS = frozenset({Endpoint.CHAT_COMPLETIONS.value, Endpoint.RESPONSES.value})
_SCORED = ("query", "queries", "data_1", "text_1", "documents", "items", "data_2", "text_2")
#: By endpoint: the fields that the prompt is made of, in its order.
_STREAM: Mapping[str, tuple[str, ...]] = {
    Endpoint.CHAT_COMPLETIONS.value: ("messages",),
    Endpoint.COMPLETIONS.value: ("prompt",),
    Endpoint.RESPONSES.value: ("input",),
    Endpoint.EMBEDDINGS.value: ("input",),
    Endpoint.SCORE.value: _SCORED,
    Endpoint.RERANK.value: _SCORED,
}
#: Fields that stand in the rendered prompt before those, or decide how it begins.
_HEAD = (
    "instructions",
    "instruction",
    "tools",
    "tool_choice",
    "documents",
    "chat_template_kwargs",
    "reasoning",
    "reasoning_effort",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "cache_salt",
)


class Verdict(Struct, frozen=True, gc=False):
    """What a line says besides its id and its prompt. Lines that are alike share one.

    `model` is None where the body names none. `max_tokens` 0: none given. `head`: the JSON of what
    comes before the stream in the prompt. `deterministic`: whether the same body always has the
    same answer. `template_arguments`: the names in `chat_template_kwargs`, which only the registry
    can judge.
    """

    endpoint: str
    model: str | None
    max_tokens: int
    head: bytes
    deterministic: bool
    template_arguments: tuple[str, ...]


class RequestLine(Struct, frozen=True, gc=False):
    """A line that passed.

    `body`: the JSON of the body, byte for byte as it was sent. `stream`: the JSON of what the
    prompt is made of; equal heads and streams with equal beginnings make prompts with equal
    beginnings.
    """

    custom_id: str
    body: bytes
    stream: bytes
    verdict: Verdict


class LineParser:
    """Checks the lines of one file. Not for several threads at a time.

    `only_endpoint`: what the `url` of each must be; None: any that there is.
    """

    def __init__(self, only_endpoint: str | None = None, limits: BodyLimits | None = None) -> None:
        self._only_endpoint = only_endpoint
        self._limits = limits or BodyLimits()
        self._verdicts: dict[tuple[str, bytes], Verdict] = {}
        self._last = _Cut(b"", b"", str, 0, Verdict("", None, 0, b"", False, ()))
        self._layout: Layout | None = None

    def parse(self, raw: bytes) -> RequestLine:
        """Check one line (without its line feed) and take it apart.

        Raises:
            LineProblem: with a code of the OpenAI dialect's list, and what to do.
        """
        return self.parse_alike(raw) or self.parse_short(raw) or self.parse_plain(raw)

    # -- the shortest way ----------------------------------------------------------------------

    def parse_alike(self, raw: bytes) -> RequestLine | None:
        """The line taken apart, where it has the layout of those before it; None: it hasn't."""
        layout = self._layout
        if layout is None or not (raw.startswith(layout.before) and raw.endswith(layout.after)):
            return None
        at = len(layout.before)
        id_end = raw.find(b'"', at)
        if not raw.startswith(layout.between, id_end):
            return None
        stream = raw[id_end + len(layout.between) : -len(layout.after)]
        try:
            custom_id = decode_id(raw[at - 1 : id_end + 1])
            prompt = layout.cut.decode(stream)
        except (ValueError, msgspec.MsgspecError, RecursionError):
            return None
        if prompt.__class__ is list and not 0 < len(prompt) <= layout.cut.max_entries:
            return None
        body = raw[id_end + layout.body_at : len(raw) - layout.body_end]
        return RequestLine(custom_id, body, stream, layout.cut.verdict)

    def _layout_of(self, raw: bytes, start: int, end: int, custom_id: str) -> Layout | None:
        """What this line, whose body is raw[start:end] and cut as the last one, has in common with
        others; None: nothing that can be relied on."""
        cut = self._last
        at = raw.find(b'"custom_id"') + len(b'"custom_id"')
        at = raw.find(b'"', at) + 1
        id_end = raw.find(b'"', at)
        before, between = raw[:at], raw[id_end : start + len(cut.before)]
        if not 0 < at <= id_end < start or raw[at:id_end] != custom_id.encode():
            return None
        # The same proof as for the body's place: a secret must come back.
        around = decode_around(before + HOLE + raw[id_end:start] + HOLE + raw[end:])
        if (around.custom_id, around.body) != (HOLE.decode(), HOLE_VALUE):
            return None
        after = cut.after + raw[end:]
        return Layout(before, between, after, start - id_end, len(raw) - end, cut)

    # -- the short way -------------------------------------------------------------------------

    def parse_short(self, raw: bytes) -> RequestLine | None:
        """The line taken apart; None: go the plain way, be the line good or bad."""
        start = raw.find(b"{", raw.find(b'"body"') + 6)
        end = len(raw) - 1 if raw.endswith(b"}}") else end_of_body(raw)
        if start <= 0 or end <= start:
            return None
        try:
            around = decode_around(raw[:start] + HOLE + raw[end:])
            endpoint = around.url
            if around.body != HOLE_VALUE or endpoint not in CUTS:
                return None
            if endpoint != self._only_endpoint and self._only_endpoint is not None:
                return None
            body = raw[start:end]
            prompt = None
            cut = self._last
            # Most lines are around their prompts exactly as the one before.
            if (
                cut.verdict.endpoint == endpoint
                and body.startswith(cut.before)
                and body.endswith(cut.after)
            ):
                stream = body[len(cut.before) : -len(cut.after)]
                try:
                    prompt = cut.decode(stream)
                except (ValueError, msgspec.MsgspecError):
                    prompt = None
            if prompt is None:
                stream, prompt, cut = self._cut(endpoint, body)
                self._last = cut
            else:
                self._layout = self._layout_of(raw, start, end, around.custom_id)
        except (ValueError, msgspec.MsgspecError, RecursionError):
            return None
        if prompt.__class__ is list and not 0 < len(prompt) <= cut.max_entries:
            return None
        return RequestLine(around.custom_id, body, stream, cut.verdict)

    def _cut(self, endpoint: str, body: bytes) -> tuple[bytes, Any, _Cut]:
        """The prompt of this body, as bytes and decoded, and what is around it.

        Raises ValueError or msgspec.MsgspecError: the plain way shall look.
        """
        quoted, list_end, decode = CUTS[endpoint]
        at = body.find(quoted) + len(quoted)
        at += 2 if body.startswith(b": ", at) else 1
        limits = self._limits
        most = limits.max_messages if endpoint in _CONVERSATIONS else limits.max_inputs
        before = body[:at]
        for stop in ends_of_prompt(body, at, list_end):
            after = body[stop:]
            try:
                prompt = decode(body[at:stop])
            except (ValueError, msgspec.MsgspecError):
                continue
            rest = before + HOLE + after
            verdict = (
                self._verdicts.get((endpoint, rest))
                or self._judge_usual(endpoint, rest)
                or self._judge(endpoint, rest)
            )
            return body[at:stop], prompt, _Cut(before, after, decode, most, verdict)
        raise ValueError("not where it is sought")

    def _judge_usual(self, endpoint: str, rest: bytes) -> Verdict | None:
        """The same as `_judge`, sooner, where `max_tokens` or `seed` differ from line to line."""
        decode = USUAL.get(endpoint)
        if decode is None:
            return None
        try:
            body = decode(rest)
        except (ValueError, msgspec.MsgspecError):
            return None
        if body.hole != HOLE_VALUE or body.stream:
            return None
        max_tokens, most = body.max_tokens or 0, body.max_completion_tokens or 0
        if max(max_tokens, most) > self._limits.max_output_tokens:
            return None
        deterministic = body.temperature == 0 or body.seed is not None
        return Verdict(endpoint, body.model, most or max_tokens, b"", deterministic, ())

    def _judge(self, endpoint: str, rest: bytes) -> Verdict:
        """The verdict on a body without its prompt. Raises ValueError: the plain way shall look."""
        (field,) = _STREAM[endpoint]
        body = orjson.loads(rest)
        if type(body) is not dict or body.get(field) != HOLE_VALUE:
            raise ValueError("not a body with a hole")
        try:
            check_body(endpoint, body, self._limits, without=field)
        except LineProblem as refusal:
            raise ValueError("refused") from refusal
        verdict = _verdict(endpoint, body, decode_raws(rest))
        if len(rest) <= MAX_VERDICT_BYTES:
            if len(self._verdicts) >= MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[endpoint, rest] = verdict
        return verdict

    # -- the plain way -------------------------------------------------------------------------

    def parse_plain(self, raw: bytes) -> RequestLine:
        """The same, for any line. Raises LineProblem."""
        line = _parse_json(raw)
        custom_id = _custom_id(line)
        if line.get("method", "POST") != "POST":
            raise LineProblem(
                "invalid_method", '"method" must be "POST", or be left out.', "method"
            )
        endpoint = self._endpoint(line)
        body = line.get("body")
        if not isinstance(body, dict):
            if body is None:
                raise LineProblem("missing_required_parameter", 'The line has no "body".', "body")
            raise LineProblem(
                "invalid_request", f'"body" must be an object, not {kind(body)}.', "body"
            )
        check_body(endpoint, body, self._limits)
        try:
            raw_body = bytes(decode_raws(raw)["body"])
            raws = decode_raws(raw_body)
        except (msgspec.MsgspecError, RecursionError):
            raise LineProblem("invalid_json_line", "The JSON is nested too deeply.") from None
        verdict = _verdict(endpoint, body, raws)
        stream = b",".join(
            bytes(raws[field]) for field in _STREAM[endpoint] if body.get(field) is not None
        )
        return RequestLine(custom_id, raw_body, stream, verdict)

    def _endpoint(self, line: Mapping[str, Any]) -> str:
        endpoint = line.get("url", Endpoint.CHAT_COMPLETIONS.value)
        only = self._only_endpoint
        if only is not None and isinstance(endpoint, str) and endpoint != only:
            raise LineProblem(
                "url_mismatch", f'"url" is "{endpoint[:64]}", but the batch is for "{only}".', "url"
            )
        if not isinstance(endpoint, str) or endpoint not in _ENDPOINTS:
            raise LineProblem(
                "invalid_request", f'"url" must be one of: {", ".join(sorted(_ENDPOINTS))}.', "url"
            )
        return endpoint


def parse_line(raw: bytes, only_endpoint: str | None = None) -> RequestLine:
    """`LineParser.parse` of a single line, within the default limits."""
    return _default_parser(only_endpoint).parse(raw)


@lru_cache(maxsize=8)
def _default_parser(only_endpoint: str | None) -> LineParser:
    return LineParser(only_endpoint)


# -- what is known of a line already --------------------------------------------------------------


class _Cut(Struct, frozen=True, gc=False):
    """The bytes of a body around its prompt, what decodes the prompt, and the verdict on them."""

    before: bytes
    after: bytes
    decode: Callable[[bytes], Any]
    max_entries: int
    verdict: Verdict


def _verdict(endpoint: str, body: Mapping[str, Any], raws: Mapping[str, msgspec.Raw]) -> Verdict:
    stream = _STREAM[endpoint]
    return Verdict(
        endpoint=endpoint,
        model=body.get("model"),
        max_tokens=body.get("max_completion_tokens")
        or body.get("max_tokens")
        or body.get("max_output_tokens")
        or 0,
        head=b",".join(
            b'"%b":%b' % (field.encode(), bytes(raws[field]))
            for field in _HEAD
            if field not in stream and body.get(field) is not None
        ),
        deterministic=endpoint not in GENERATES
        or (
            (body.get("temperature") == 0 or body.get("seed") is not None)
            and body.get("n") in (None, 1)
        ),
        template_arguments=tuple(body.get("chat_template_kwargs") or ()),
    )


class Layout(Struct, frozen=True, gc=False):
    """A line is `before`, its id as plain text, `between`, its prompt, `after`.

    `between` begins with the quote behind the id; there begin, `body_at` bytes on, the body's
    bytes, and they end `body_end` bytes before the line does.
    """

    before: bytes
    between: bytes
    after: bytes
    body_at: int
    body_end: int
    cut: _Cut


# -- what the plain way says -------------------------------------------------------------------


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise LineProblem("invalid_json_line", _json_message(raw, error)) from None
    except RecursionError:
        raise LineProblem("invalid_json_line", "The JSON is nested too deeply.") from None
    if not isinstance(line, dict):
        raise LineProblem(
            "invalid_json_line", f"A line must be a JSON object, not {kind(line)}.", None
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
            "invalid_request", f'"custom_id" must be a string, not {kind(custom_id)}.', "custom_id"
        )
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise LineProblem(
            "invalid_request",
            f'"custom_id" must have 1 to {MAX_CUSTOM_ID_CHARS} characters, not {len(custom_id)}.',
            "custom_id",
        )
    return custom_id
