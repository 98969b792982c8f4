"""One server over HTTP: what is transient is tried again, what isn't becomes a typed error.

httpx is imported with the first connection: it takes a fifth of the start of a command, and many
commands call no server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from batch_app import __version__
from batch_app.core import LineError
from batch_app.errors import (
    BadLines,
    BadRequest,
    BatchAppError,
    Conflict,
    Forbidden,
    ModelNotFound,
    NotFound,
    ServerFailed,
    ServerUnreachable,
    StorageFull,
    StoreUnavailable,
    TooLarge,
    TooMany,
    Unauthenticated,
)

if TYPE_CHECKING:
    import httpx

DEFAULT_SERVER = "http://127.0.0.1:8080"
#: Pauses before the tries after the first one: a restart of the server fits in between.
PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MAX_PAUSE_S = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})

Content = Callable[[], Iterator[bytes]]


def server_url(server: str) -> str:
    """The server's address without a slash at its end; `http://` is understood.

    Raises:
        BadRequest: this is no address.
    """
    url = server.strip()
    url = url if "://" in url else f"http://{url}"
    url = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise BadRequest(f"{server!r} is no server's address. Say it as http://HOST:PORT.")
    return url


class Connection:
    """Calls to one server. Repeats only what may be repeated: the caller says so."""

    def __init__(
        self,
        server: str,
        api_key: str | None,
        *,
        timeout_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx

        self.url = server_url(server)
        headers = {"user-agent": f"vllm-batch-client/{__version__}", "accept-encoding": "identity"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            # One request for each connection: after a proxy that answers one of them twice, every
            # later one would get its neighbour's answer.
            limits=httpx.Limits(max_keepalive_connections=0),
            # A proxy of the environment has no business with a server on this machine.
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
        )
        self._sleep = sleep
        self._has_answered = False

    def close(self) -> None:
        self._http.close()

    def pause(self, seconds: float) -> None:
        self._sleep(seconds)

    def json(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        repeat: bool = True,
    ) -> dict[str, Any]:
        """The answer's JSON object.

        Raises:
            BatchAppError: what the server refused, or that it can't be reached.
        """
        answer = self._call(
            lambda: self._http.request(
                method, path, params=params, json=body, headers=dict(headers or {})
            ),
            repeat=repeat,
        )
        return _object(answer)

    def upload(
        self, path: str, content: Content, content_type: str, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """POST what `content` yields; called anew for each try."""
        answer = self._call(
            lambda: self._http.post(
                path,
                content=content(),
                headers={"content-type": content_type, **headers},
            ),
            repeat=True,
        )
        return _object(answer)

    @contextmanager
    def stream(
        self, path: str, *, params: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Iterator[httpx.Response]:
        """An answer whose body has not been read. One try; see `results.py` for going on."""
        request = self._http.build_request("GET", path, params=params, headers=dict(headers))
        answer = self._send(lambda: self._http.send(request, stream=True))
        try:
            if answer.status_code >= 400:
                answer.read()
                raise _refusal(answer)
            yield answer
        finally:
            answer.close()

    def _call(self, call: Callable[[], httpx.Response], *, repeat: bool) -> httpx.Response:
        for pause_s in PAUSES_S if repeat else ():
            try:
                answer = self._send(call)
            except ServerUnreachable:
                if not self._has_answered:
                    raise  # nobody there: say so at once
                self._sleep(pause_s)
                continue
            if answer.status_code < 400:
                return answer
            if not _is_transient(answer):
                raise _refusal(answer)
            self._sleep(max(pause_s, _retry_after_s(answer)))
        answer = self._send(call)
        if answer.status_code >= 400:
            raise _refusal(answer)
        return answer

    def _send(self, call: Callable[[], httpx.Response]) -> httpx.Response:
        import httpx

        try:
            answer = call()
        except httpx.ConnectError as error:
            raise ServerUnreachable(
                f"No server answers at {self.url} ({error}). Start one with `vllm-batch up`, or "
                "name yours with --server or VLLM_BATCH_SERVER."
            ) from error
        except httpx.TimeoutException as error:
            self._has_answered = True  # somebody took the connection
            raise ServerUnreachable(f"The server at {self.url} did not answer in time.") from error
        except httpx.TransportError as error:
            self._has_answered = True
            raise ServerUnreachable(f"The connection to {self.url} broke: {error}.") from error
        self._has_answered = True
        return answer


def _is_transient(answer: httpx.Response) -> bool:
    wanted = answer.headers.get("x-should-retry")
    if wanted in ("true", "false"):
        return bool(wanted == "true")
    return answer.status_code in _TRANSIENT


def _retry_after_s(answer: httpx.Response) -> float:
    try:
        return min(float(answer.headers.get("retry-after", "0")), MAX_PAUSE_S)
    except ValueError:
        return 0.0


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ServerFailed(
            f"{answer.request.url} answers, but not as a batch server does. Is the address right?",
            status=answer.status_code,
        )
    return body


def _refusal(answer: httpx.Response) -> BatchAppError:
    """The server's refusal, as the error it was on its side."""
    status = answer.status_code
    try:
        body = answer.json()
        error = body["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError):
        return ServerFailed(
            f"{answer.request.url} answered {status}, and not as a batch server does. Is the "
            "address right?",
            status=status,
        )
    if status == 400 and body.get("errors"):
        lines = [
            LineError(bad["code"], bad["message"], bad.get("line"), bad.get("param"))
            for bad in body["errors"]
        ]
        return BadLines(message, lines, body.get("total", len(lines)))
    if status == 401:
        return Unauthenticated(f"{message} Give it with --api-key or VLLM_BATCH_API_KEY.")
    if status == 403:
        return Forbidden(message, code=code or "forbidden")
    if status == 404:
        return (ModelNotFound if code == "model_not_found" else NotFound)(message, param=param)
    if status == 409:
        return Conflict(message, code=code or "conflict")
    if status == 413:
        return TooLarge(message, param=param)
    if status == 429:
        return TooMany(
            message, code=code or "rate_limited", retry_after_s=int(_retry_after_s(answer))
        )
    if status == 503:
        return StoreUnavailable(message)
    if status == 507:
        return StorageFull(message)
    if status >= 500:
        request_id = answer.headers.get("x-request-id", "unknown")
        return ServerFailed(f"{message} Its id: {request_id}.", status=status)
    return BadRequest(message, code=code or "invalid_request", param=param)
