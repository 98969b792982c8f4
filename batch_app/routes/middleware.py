"""What stands before every route. Plain ASGI: a status call passes here thousands of times."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import logging
import re
import secrets
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batch_app.access import Access
from batch_app.batch_log import printable
from batch_app.config import Settings
from batch_app.errors import BatchAppError, Forbidden, StoreUnavailable
from batch_app.routes.authentication import SAFE_METHODS
from batch_app.routes.errors import answer, internal_error

logger = logging.getLogger(__name__)

#: For answers that are no pages: whatever somebody makes of them, nothing is loaded or run.
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
PAGE_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'"
)
PAGES_WITH_INLINE_SCRIPTS = frozenset({"/docs", "/redoc", "/docs/oauth2-redirect"})
_INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)
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
        scope.setdefault("state", {})["request_id"] = request_id
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
        except ClientDisconnect:
            path = printable(scope["path"])  # what it was escaped for could forge a line
            logger.info("%s %s: the client went away", scope["method"], path)
        except Exception:
            path = printable(scope["path"])
            logger.exception("%s %s failed (%s)", scope["method"], path, request_id)
            if not started:
                await internal_error()(scope, receive, send_with_id)


class Hosts:
    """Answers only requests for a name that this server goes by.

    A page on the internet can point its own name at 127.0.0.1 and then read what listens there
    (DNS rebinding); the Host header still gives it away. Where every request has to bring an API
    key, which such a page hasn't, names need no check unless a list is set.
    """

    def __init__(self, app: ASGIApp, settings: Settings, access: Access) -> None:
        self._app = app
        self._names = frozenset(name.rstrip(".").lower() for name in settings.allowed_hosts)
        self._is_let_open = settings.no_auth and not is_loopback(settings.host)
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = Headers(scope=scope).get("host")
            if host is not None and not await self._goes_by(host_name(host)):
                error = Forbidden(
                    "This server was asked for by a name that it does not go by. On its own "
                    "machine use http://localhost; for others, its operator sets API keys or "
                    "allowed_hosts.",
                    code="host_not_allowed",
                )
                await answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _goes_by(self, name: str) -> bool:
        if is_loopback(name) or name.rstrip(".").lower() in self._names:
            return True
        if self._names:
            return False
        if self._is_let_open:
            return True
        try:
            return await run_in_threadpool(self._access.is_required)
        except StoreUnavailable:
            return False


class Origins:
    """Refuses what a page of another origin would have a browser change here.

    Every browser of today sends Sec-Fetch-Site, older ones at least Origin; other clients send
    neither.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers = Headers(scope=scope)
            if not _is_own_page(headers):
                error = Forbidden(
                    "A page of another origin asked for this change. Send it without a browser, "
                    "or from a page of this server.",
                    code="origin_not_allowed",
                )
                await answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_own_page(headers: Headers) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return True
    # Without the scheme: in front of this server may be one that speaks TLS.
    return origin.partition("://")[2].lower() == headers.get("host", "").lower()


class SecurityHeaders:
    """Headers that keep a browser from taking an answer for more than it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: Message | None = None  # the start of a page whose scripts aren't known yet

        async def send_guarded(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers.setdefault("x-content-type-options", "nosniff")
                headers.setdefault("referrer-policy", "no-referrer")
                headers.setdefault("x-frame-options", "DENY")
                if "content-security-policy" not in headers:
                    if scope["path"] in PAGES_WITH_INLINE_SCRIPTS:
                        held = message
                        return
                    is_page = headers.get("content-type", "").startswith("text/html")
                    headers["content-security-policy"] = PAGE_POLICY if is_page else DATA_POLICY
            elif held is not None:
                start, held = held, None
                headers = MutableHeaders(raw=start["headers"])
                headers["content-security-policy"] = documentation_policy(message.get("body", b""))
                await send(start)
            await send(message)

        await self._app(scope, receive, send_guarded)


def documentation_policy(page: bytes) -> str:
    """The policy for a page of fastapi-offline: the scripts that stand in it, and no others."""
    hashes = (
        base64.b64encode(hashlib.sha256(script).digest()).decode()
        for script in _INLINE_SCRIPT.findall(page)
    )
    scripts = " ".join(["script-src 'self'", *(f"'sha256-{digest}'" for digest in hashes)])
    return (
        f"{PAGE_POLICY}; {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "worker-src 'self' blob:"
    )


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


class StorageGuard:
    """Refuses what would change something while the database or the data folder that was opened is
    gone: it would be accepted, and lost."""

    def __init__(self, app: ASGIApp, require: Callable[[], None]) -> None:
        """`require` raises the error to be answered."""
        self._app = app
        self._require = require

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            try:
                await run_in_threadpool(self._require)
            except BatchAppError as error:
                await answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
