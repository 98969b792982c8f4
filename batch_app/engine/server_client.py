"""A model's server, over HTTP: one attempt at one request, and a look at what the server has.

Says what happened, and decides nothing: retries are `engine.openai`'s. Redirects aren't followed,
no proxy of the environment is used, an answer has a size it may not exceed. What is raised or told
has words of its own: never an address, a key, or anything of a request or an answer.

Each request has an id (`x-request-id`). Many servers repeat it, vLLM in the answer's `id`; an
answer with the id of another request is refused, and `server_transport` says what else is checked.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import httpx
import orjson

from batch_app import __version__
from batch_app.core import utc_now
from batch_app.engine.retries import retry_after_s
from batch_app.engine.server_transport import SingleAnswerTransport, TwoAnswers
from batch_app.errors import EngineLoadError, EngineUnavailable
from batch_app.model_server import ModelServer

#: A look is at small answers; a server that takes longer for them is not well.
LOOK_TIMEOUT_S = 30.0
#: Less than what servers usually wait before they close a connection that is idle: 5 s.
KEEPALIVE_S = 3.0
#: Connections are kept beside those that are needed at a time, for each rests before it is reused.
_MAX_RESTING = 128
MAX_LOOK_BYTES = 4 << 20
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_MAX_NAMES = 10
_MAX_LENGTH = (1 << 31) - 1
_NO_LIST = frozenset({404, 405, 501})
_KEY_REFUSED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, of whatever status. `retry_after_s`: when the server wants to be asked again,
    if it says so."""

    status: int
    body: bytes
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Nothing came back that could be used. `code` and `why` for the request's error line.

    `is_slow`: it took too long. `is_final`: another attempt would end the same way.
    """

    code: str
    why: str
    is_slow: bool = False
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself and of the model; empty or None where it doesn't."""

    software: str = ""
    version: str = ""
    max_model_len: int | None = None


class _TooLarge(Exception):
    pass


class _Encoded(Exception):
    pass


class _RequestIds:
    """Ids of requests, in the form of a UUID: a part that nobody else has, and a number."""

    def __init__(self) -> None:
        token = secrets.token_hex(9)
        self._start = f"{token[:8]}-{token[8:12]}-4{token[12:15]}-8{token[15:18]}-"
        self._numbers = itertools.count(1)
        self._any = re.compile(re.escape(self._start.encode()) + rb"[0-9a-f]{12}")

    def new(self) -> str:
        return f"{self._start}{next(self._numbers):012x}"

    def is_of_another(self, request_id: str, headers: httpx.Headers, content: bytes) -> bool:
        """Whether an answer has ids of ours, and not this one."""
        told = headers.get("x-request-id", "").encode()
        found = {*self._any.findall(told), *self._any.findall(content)}
        return bool(found) and request_id.encode() not in found


class ServerClient:
    """For one event loop. Each attempt uses a connection of a pool, and closes it if cancelled."""

    def __init__(self, server: ModelServer, model: str, served_name: str, api_key: str) -> None:
        """Raises EngineLoadError where `ca_file` can't be used."""
        self._server = server
        self._model = model
        self._served_name = served_name
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            # What is unpacked could be of any size.
            "accept-encoding": "identity",
            "user-agent": f"vllm-batch-server/{__version__}",
        }
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._ids = _RequestIds()
        self._transport = SingleAnswerTransport(
            _tls_context(server, model),
            max_idle=server.max_concurrency + _MAX_RESTING,
            keepalive_s=KEEPALIVE_S,
            reuse=server.reuse_connections,
        )
        self._http = httpx.AsyncClient(
            transport=self._transport,
            trust_env=False,
            follow_redirects=False,
            headers=headers,
            timeout=httpx.Timeout(None, connect=server.connect_timeout_s),
        )

    async def post(self, endpoint: str, body: bytes) -> Answer | NoAnswer:
        """One attempt. Raises nothing but CancelledError."""
        url = self._server.base_url + endpoint.removeprefix("/v1")
        request_id = self._ids.new()
        try:
            async with (
                asyncio.timeout(self._server.timeout_s),
                self._sent("POST", url, body, {"x-request-id": request_id}) as response,
            ):
                content = await _read(response, self._server.max_response_bytes)
            if self._ids.is_of_another(request_id, response.headers, content):
                self._transport.stop_reusing()
                return NoAnswer("connection_error", _OF_ANOTHER)
            retry_after = retry_after_s(response.headers, utc_now())
            return Answer(response.status_code, content, retry_after)
        except httpx.ConnectTimeout:
            return NoAnswer("connection_error", _NO_CONNECTION)
        except (TimeoutError, httpx.TimeoutException):
            seconds = f"{self._server.timeout_s:g}"
            return NoAnswer(
                "request_timeout", f"The server did not answer within {seconds} s.", is_slow=True
            )
        except _TooLarge:
            most = self._server.max_response_bytes
            why = f"The server's answer is larger than {most:,} bytes (max_response_bytes)."
            return NoAnswer("response_too_large", why, is_final=True)
        except _Encoded:
            return NoAnswer("invalid_response", "The server compressed its answer unasked.")
        except TwoAnswers as error:
            return NoAnswer("connection_error", str(error))
        except (OSError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            return NoAnswer("connection_error", _in_words(error))

    async def look(self) -> ServerFacts:
        """Ask for the list of models, which costs the server nothing.

        Raises:
            EngineUnavailable: it doesn't answer, refuses the key, or hasn't the model.
        """
        status, content = await self._get(f"{self._server.base_url}/models")
        if status in _NO_LIST:
            return ServerFacts()
        if status in _KEY_REFUSED:
            raise self._unavailable(f"refuses the API key ({status})")
        if 300 <= status < 400:
            raise self._unavailable(f"answers {status}: redirects are not followed")
        if status != 200:
            raise self._unavailable(f"answers {status}")
        listed = _models(content)
        if listed is None:
            raise self._unavailable("answers with something that is no list of models")
        card = listed.get(self._served_name) or listed.get(f"{self._served_name}:latest")
        if card is None:
            names = ", ".join(repr(name[:100]) for name in list(listed)[:_MAX_NAMES]) or "none"
            raise self._unavailable(f"has no model {self._served_name!r}; it has: {names}")
        length = card.get("max_model_len")
        return ServerFacts(
            software=_plain(card.get("owned_by")),
            max_model_len=length if _is_length(length) else None,
        )

    async def version(self) -> str:
        """As vLLM and Ollama tell theirs; empty where nothing is told."""
        root = self._server.base_url.removesuffix("/v1")
        for path in ("/version", "/api/version"):
            try:
                status, content = await self._get(root + path)
                found = _plain(orjson.loads(content)["version"]) if status == 200 else ""
            except (EngineUnavailable, orjson.JSONDecodeError, KeyError, TypeError):
                continue
            if found:
                return found
        return ""

    async def close(self) -> None:
        await self._http.aclose()

    # -- inside --------------------------------------------------------------------------------

    @asynccontextmanager
    async def _sent(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        async with self._http.stream(method, url, content=body, headers=headers) as response:
            yield response

    async def _get(self, url: str) -> tuple[int, bytes]:
        timeout_s = min(LOOK_TIMEOUT_S, self._server.timeout_s)
        try:
            async with asyncio.timeout(timeout_s), self._sent("GET", url, None) as response:
                return response.status_code, await _read(response, MAX_LOOK_BYTES)
        except (TimeoutError, httpx.TimeoutException):
            raise self._unavailable("does not answer in time") from None
        except (_TooLarge, _Encoded):
            raise self._unavailable("answers with something that is no list of models") from None
        except (OSError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            why = _in_words(error).rstrip(".")
            raise self._unavailable(f"can't be used: {why[0].lower()}{why[1:]}") from None

    def _unavailable(self, what: str) -> EngineUnavailable:
        return EngineUnavailable(f"The server of {self._model} {what}.", model=self._model)


_NO_CONNECTION = "No connection to the server."
_OF_ANOTHER = "The server sent the answer to another request."


async def _read(response: httpx.Response, most: int) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Encoded
    chunks, size = [], 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > most:
            raise _TooLarge
        chunks.append(chunk)
    return b"".join(chunks)


def _models(content: bytes) -> dict[str, Mapping[str, Any]] | None:
    """The models of a list in OpenAI's form, by name; None where it is none."""
    try:
        found: Iterable[Any] = orjson.loads(content)["data"] or ()
        return {str(card["id"]): card for card in found}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _is_length(value: Any) -> TypeGuard[int]:
    """Whether a model can have a length of so many tokens."""
    return type(value) is int and 0 < value <= _MAX_LENGTH


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and _VERSION.fullmatch(value) else ""


def _tls_context(server: ModelServer, model: str) -> ssl.SSLContext:
    context = httpx.create_ssl_context(trust_env=False)
    if server.ca_file is not None:
        try:
            context.load_verify_locations(server.ca_file)
        except OSError as error:  # ssl's own errors are some of these
            raise EngineLoadError(
                f"model {model!r}: ca_file can't be used: {error.strerror or 'no certificates'}"
            ) from None
    return context


def _in_words(failure: Exception) -> str:
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "The server's TLS certificate can't be trusted."
        if isinstance(cause, ssl.SSLError):
            return "TLS with the server failed."
        cause = cause.__cause__ or cause.__context__
    if isinstance(failure, httpx.ConnectError):
        return _NO_CONNECTION
    return "The connection to the server broke, or what came is no HTTP."
