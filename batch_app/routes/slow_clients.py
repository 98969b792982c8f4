"""Clients that send slowly, or send what would grow: they cost a connection, and that not for long.

Headers are bounded by the protocol (`bounded_headers`), bodies by `BodyLimits`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from batch_app.config import Settings
from batch_app.errors import TooSlow, UnsupportedMedia
from batch_app.routes.errors import answer

#: Seconds that the rest of a refused body may take, which is thrown away.
LONGEST_REST_S = 600.0
#: What a request may have beside its body; for each byte of that, so many of the frames around it.
MAX_HEADER_BYTES = 64 << 10
FRAME_BYTES = 16
_TOO_LONG = b"HTTP/1.1 431 Too Long\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BodyLimits:
    """Refuses encoded bodies, and gives up on those that do not come."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._timeout_s = settings.client_timeout_s
        self._min_rate = settings.min_upload_bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            refusal = UnsupportedMedia("Send the body as it is, with no Content-Encoding.")
            await answer(refusal)(scope, receive, send)
            return
        num_bytes = 0
        waited_s = 0.0
        more_body = True

        async def receive_in_time() -> Message:
            nonlocal num_bytes, waited_s, more_body
            if not more_body:
                return await receive()  # for the client to go away, which may take its time
            began = time.monotonic()
            with anyio.move_on_after(self._timeout_s):
                message = await receive()
                # Only what the client takes: this server may be slow at times, too.
                waited_s += time.monotonic() - began
                num_bytes += len(message.get("body", b""))
                more_body = message.get("more_body", False)
                if not more_body or waited_s <= self._timeout_s + self._allowance_s(num_bytes):
                    return message
            raise TooSlow(
                "The body did not arrive in time: at least some of it is expected every "
                f"{self._timeout_s:g} seconds (client_timeout_s), and {self._min_rate} bytes per "
                "second on average (min_upload_bytes_per_s). Nothing of it was kept."
            )

        await self._app(scope, receive_in_time, send)

    def _allowance_s(self, num_bytes: int) -> float:
        return num_bytes / self._min_rate if self._min_rate else float("inf")


def bounded_headers(timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection whose request headers, or trailers, take longer
    than this or become longer than `MAX_HEADER_BYTES`.

    uvicorn itself bounds only the pause between two requests, and what its pure Python parser
    reads; the other one gathers a header of any length, in a time that grows with its square.
    """
    tells_of_bodies = hasattr(AutoHTTPProtocol, "on_body")

    class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _header_timer: asyncio.TimerHandle | None = None
        _header_bytes = 0  # that have arrived of a request, beside those of its body

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait(timeout_s)

        def data_received(self, data: bytes) -> None:
            self._header_bytes += len(data)
            super().data_received(data)
            self._header_bytes = max(self._header_bytes, 0)
            if tells_of_bodies and self._header_bytes > MAX_HEADER_BYTES:
                self._refuse()
            elif not self._is_between_requests():
                self._stop_waiting()
            elif self._header_timer is None:
                # What was refused before it had all arrived may first be sent to its end: many
                # clients read no answer before.
                refused_early = self.cycle is not None and self.cycle.more_body
                self._wait(LONGEST_REST_S if refused_early else timeout_s)

        def on_headers_complete(self) -> None:
            self._header_bytes = 0  # what this piece has of them isn't long
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._header_bytes -= (1 + FRAME_BYTES) * len(body)
            super().on_body(body)

        def _refuse(self) -> None:
            if not self.transport.is_closing():
                if self._is_between_requests():
                    self.transport.write(_TOO_LONG)
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _is_between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _wait(self, seconds: float) -> None:
            self._header_timer = self.loop.call_later(seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _give_up(self) -> None:
            self._header_timer = None
            if self._is_between_requests() and not self.transport.is_closing():
                self.transport.close()

    return Protocol
