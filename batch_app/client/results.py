"""Results as they come from the server, beside the requests they answer.

A download that breaks goes on where it was: the files of a finished batch don't change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from batch_app.client.connection import PAUSES_S, Connection
from batch_app.core import is_success
from batch_app.errors import BadRequest, BatchAppError, ServerUnreachable, StoreUnavailable

#: How models mark their reasoning; many templates open the mark in the prompt, so that an answer
#: has only its end.
_REASONING_STARTS, _REASONING_ENDS = ("<think>", "[THINK]"), ("</think>", "[/THINK]")
#: What a request's limit may be called, the one that counts first.
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
#: What OpenAI's Responses API says, by the finish reason that the others have for it.
_OF_RESPONSES = {"max_output_tokens": "length", "completed": "stop"}


@dataclass(frozen=True, slots=True)
class ResultError:
    """Why a request has no answer. `status_code` is None for one that never ran."""

    code: str
    message: str
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one request. `request` is its input line, where that was asked for."""

    custom_id: str
    status_code: int | None
    body: Mapping[str, Any] | None
    error: ResultError | None
    request: Mapping[str, Any] | None = None
    raw: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def text(self) -> str | None:
        """The (first) answer's text; None for a failure, or an endpoint that answers no text."""
        return _text(self.body) if self.ok and self.body else None

    @property
    def has_reasoning(self) -> bool:
        """Whether the text has the model's reasoning, which a reasoning parser would set apart."""
        text = self.text or ""
        return text.lstrip().startswith(_REASONING_STARTS) or any(
            mark in text for mark in _REASONING_ENDS
        )

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or another, where the endpoint says so: of the first choice.

        Of the Responses API: `length` for an answer that is incomplete for want of tokens.
        """
        body = self.body if self.ok and self.body else {}
        choice = _first(body, "choices")
        if choice is not None:
            reason = choice.get("finish_reason")
        elif body.get("object") != "response":
            return None
        else:
            reason = _object(body.get("incomplete_details")).get("reason") or body.get("status")
            reason = _OF_RESPONSES.get(reason, reason) if isinstance(reason, str) else None
        return reason if isinstance(reason, str) else None

    @property
    def max_tokens(self) -> int | None:
        """Of an answer that was cut off: the tokens that it was allowed, as far as is known."""
        if self.finish_reason != "length":
            return None
        asked = _object((self.request or {}).get("body"))
        limits = [asked.get(name) for name in _LIMITS]
        body = self.body or {}
        limits.append(body.get("max_output_tokens"))
        choices = body.get("choices")
        if not isinstance(choices, list) or len(choices) == 1:
            limits.append(self.tokens("completion"))
        return next((limit for limit in limits if isinstance(limit, int)), None)

    def tokens(self, kind: str) -> int | None:
        """`prompt` or `completion` tokens, where the answer counts them."""
        usage = _object((self.body or {}).get("usage"))
        other = {"prompt": "input_tokens", "completion": "output_tokens"}[kind]
        value = usage.get(f"{kind}_tokens", usage.get(other))
        is_count = isinstance(value, int) and not isinstance(value, bool)
        return value if is_count and 0 <= value < 1 << 63 else None

    def json(self) -> Any:
        """The answer's text, parsed as JSON; a code fence around it is taken off.

        Raises:
            ValueError: there is no text, or it isn't JSON.
        """
        if self.text is None:
            raise ValueError("there is no answer")
        return orjson.loads(_without_fence(self.text))


def result_of(line: bytes, request: Mapping[str, Any] | None = None) -> Result:
    """From a line of the results."""
    said = orjson.loads(line)
    response, error = said.get("response"), said.get("error")
    status = None if response is None else response["status_code"]
    body = None if response is None else response["body"]
    problem = None
    if error is not None:
        problem = ResultError(error.get("code") or "error", error["message"], status)
    elif response is None:
        problem = ResultError("no_response", "The request has no response.")
    elif not is_success(status):
        said_why = _object(body).get("error")
        detail = _object(said_why)
        code = detail.get("code") or detail.get("type") or status
        message = said_why if isinstance(said_why, str) else detail.get("message")
        problem = ResultError(str(code), str(message or f"status {status}"), status)
    return Result(said["custom_id"], status, body, problem, request, line)


def joined(results: Iterator[bytes], requests: Iterator[bytes]) -> Iterator[Result]:
    """Each result with its request. Both come in input order; of the results, some may be missing.

    Raises:
        BadRequest: a result's request isn't there: these are not the batch's requests.
    """
    for line in results:
        result = result_of(line)
        for asked in requests:
            request = orjson.loads(asked)
            if request["custom_id"] == result.custom_id:
                yield result_of(line, request)
                break
        else:
            raise BadRequest(
                f"The request {result.custom_id!r} is not in the input, or not in the order of "
                "the results: is it the file that the batch was made of?"
            )


def content(
    connection: Connection, path: str, params: Mapping[str, Any], *, may_go_on: bool = True
) -> Iterator[bytes]:
    """A download in pieces; goes on where it broke.

    Raises:
        ServerUnreachable: it broke again and again, or `may_go_on` is false.
    """
    import httpx  # see `connection`

    received, etag, num_breaks = 0, "", 0
    while True:
        headers = {"range": f"bytes={received}-"} if received else {}
        if received and etag:
            headers["if-range"] = etag
        before = received
        try:
            with connection.stream(path, params=params, headers=headers) as answer:
                if answer.headers.get("x-results-complete") == "false":
                    may_go_on = False  # their order is another one once the batch has finished
                etag = answer.headers.get("etag", "")
                skip = received if answer.status_code != httpx.codes.PARTIAL_CONTENT else 0
                for block in answer.iter_bytes():
                    fresh = block[skip:]
                    skip -= min(skip, len(block))
                    if fresh:
                        received += len(fresh)
                        yield fresh
                return
        except (httpx.TransportError, ServerUnreachable, StoreUnavailable) as error:
            num_breaks = 1 if received > before else num_breaks + 1
            if not may_go_on or num_breaks > len(PAUSES_S):
                if isinstance(error, BatchAppError):
                    raise
                raise ServerUnreachable(
                    f"The connection to {connection.url} broke: {error}."
                ) from error
            connection.pause(PAUSES_S[num_breaks - 1])


def lines_of(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The lines that aren't blank, without their line feeds."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from filter(None, whole)
    if rest.strip():
        yield rest


def _object(value: object) -> Mapping[str, Any]:
    """Servers may answer anything where OpenAI's have an object."""
    return value if isinstance(value, Mapping) else {}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [_object(one) for one in value] if isinstance(value, list) else []


def _first(body: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    items = (body or {}).get(name)
    if isinstance(items, list) and items and isinstance(items[0], dict):
        return items[0]
    return None


def _text(body: Mapping[str, Any]) -> str | None:
    choice = _first(body, "choices")
    if choice is not None:  # chat and completions
        text = choice.get("text", _object(choice.get("message")).get("content"))
        return text if isinstance(text, str) else None
    if body.get("object") == "response":
        parts = [
            text
            for item in _objects(body.get("output"))
            if item.get("type") == "message"
            for part in _objects(item.get("content"))
            if part.get("type") == "output_text" and isinstance(text := part.get("text"), str)
        ]
        return "".join(parts) if parts else None
    return None


def _without_fence(text: str) -> str:
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text.split("\n", 1)[1][:-3].strip()
    return text
