"""What stands before every route. Plain ASGI: a status call passes here thousands of times."""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batch_app.routes.errors import internal_error, json_response
from batch_app.wire.errors import error_body

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Gives each answer an `x-request-id`, the caller's own if it sent a sane one.

    Also where exceptions that nobody foresaw end: in the log with their traceback and the id, and
    in an answer that shows nothing of them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        header = (b"x-request-id", request_id.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
            if not started:
                await internal_error()(scope, receive, send_with_id)


class LoopbackHosts:
    """Answers only requests whose Host is this machine's own name.

    A page on the internet can point its own name at 127.0.0.1 and then read what listens there
    (DNS rebinding); the Host header still gives it away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = Headers(scope=scope).get("host")
            if host is not None and not is_loopback(host_name(host)):
                body = error_body(
                    403,
                    "This server listens on this machine only, and was asked for by another "
                    "name. Use http://localhost, or set API keys.",
                    code="host_not_allowed",
                )
                await json_response(body, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_name(header: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean the machine itself."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
