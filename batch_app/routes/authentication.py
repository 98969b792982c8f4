"""Every request has a caller: found by its API key, by the cookie of a browser that signed in, or
everybody where there are no keys.

Stands before all routes and knows none: what isn't listed as open asks for a key, so that a route
that somebody adds is closed until it is opened here. Nothing of a body is read before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batch_app.access import Access
from batch_app.errors import (
    BatchAppError,
    Forbidden,
    StoreUnavailable,
    Unauthenticated,
)
from batch_app.keys import EVERYBODY, Caller, is_form_token, is_session_token
from batch_app.keys import Scope as KeyScope
from batch_app.routes.errors import answer

logger = logging.getLogger(__name__)

#: What answers anybody: probes, which tell of nobody's work, and pages that are everywhere alike.
OPEN_PATHS = frozenset(
    {
        "/livez",
        "/readyz",
        "/health",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
        "/sign-in",
    }
)
OPEN_FOLDERS = ("/static-offline-docs/", "/static/")
#: What tells of everybody's work, or gives others access to it.
ADMIN_PATHS = frozenset({"/metrics", "/keys", "/v1/benchmarks"})
ADMIN_FOLDERS = ("/keys/",)
#: What everybody may do who has come in.
UNSCOPED_PATHS = frozenset({"/sign-out"})
API_FOLDER = "/v1/"
COOKIE = "vllm_batch_session"
FORM_HEADER = "x-form-token"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
NOBODY = Caller(owner=None, sees_all=False, scopes=frozenset())


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def scopes_for(method: str, path: str) -> tuple[KeyScope, ...]:
    """What a key has to have for this."""
    if path in UNSCOPED_PATHS:
        return ()
    needed = KeyScope.READ if method in SAFE_METHODS else KeyScope.WRITE
    is_admins = path in ADMIN_PATHS or path.startswith(ADMIN_FOLDERS)
    return (needed, KeyScope.ADMIN) if is_admins else (needed,)


class Authentication:
    """Puts the caller into `scope["state"]`, or refuses. A key that is revoked ends, at its next
    piece, also what is under way with it.

    Who came in by cookie also has `session` there. A browser sends a cookie by itself, so a change
    of the API then needs the header `x-form-token`, which only pages of the session know; the
    handlers of pages check the field `form_token` of their forms.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        refusal: Callable[[BatchAppError, Scope], Response] = lambda error, _: answer(error),
    ) -> None:
        self._app = app
        self._access = access
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["caller"] = NOBODY
        if is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            token = await self._token(scope)
            if token is not None:
                state["caller"] = await self._caller(token)
                _require_scopes(state["caller"], scope)
                if is_session_token(token):
                    state["session"] = token
                    _require_form_token(token, scope)
        except BatchAppError as error:
            if isinstance(error, Unauthenticated):
                state["refused_key_id"] = error.key_id
            await self._refusal(error, scope)(scope, receive, send)
            return
        if token is None:
            state["caller"] = EVERYBODY
            await self._app(scope, receive, send)
        else:
            await self._serve(token, scope, receive, send)

    async def _token(self, scope: Scope) -> str | None:
        """The key that was sent; None where none is asked for. Raises Unauthenticated."""
        required = self._access.is_required_here()
        if required is None:
            required = await run_in_threadpool(self._access.is_required)
        if not required:
            return None
        headers = Headers(scope=scope)
        sent = headers.getlist("authorization")
        if not sent:
            held = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
            if is_session_token(held):
                return held
        kind, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        if kind.lower() != "bearer" or not token.strip():
            raise Unauthenticated(
                "This server asks for an API key: send it as `Authorization: Bearer KEY`, or as "
                "the api_key of the OpenAI SDK. Whoever runs the server makes one with "
                "`vllm-batch keys create NAME`.",
                is_missing=True,
            )
        if is_session_token(token.strip()):
            raise Unauthenticated("That is no API key of this server: it may be cut or mistyped.")
        return token.strip()

    async def _caller(self, token: str) -> Caller:
        found = self._access.caller_here(token)
        if found is not None:
            return found
        return await run_in_threadpool(self._access.caller, token)

    async def _serve(self, token: str, scope: Scope, receive: Receive, send: Send) -> None:
        cut_off = is_events = False

        async def receive_while_good() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                await self._require_good(token)
            return message

        async def send_while_good(message: Message) -> None:
            nonlocal cut_off, is_events
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_events = kind.startswith("text/event-stream")
            if message["type"] == "http.response.body" and message.get("more_body"):
                try:
                    await self._require_good(token)
                except Unauthenticated:
                    cut_off = True  # there is no way left to say why
                    raise
            await send(message)

        try:
            await self._app(scope, receive_while_good, send_while_good)
        except Exception:
            if not cut_off:
                raise
            logger.info("An answer was cut off: its API key is good no more.")
            if is_events:
                # Between two events nothing is missing: who signs out sees no broken connection.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _require_good(self, token: str) -> None:
        """Raises Unauthenticated. A store that does not answer ends nothing that has begun."""
        if self._access.caller_here(token) is None:
            try:
                await run_in_threadpool(self._access.caller, token)
            except StoreUnavailable:
                return


def _require_scopes(caller: Caller, scope: Scope) -> None:
    for needed in scopes_for(scope["method"], scope["path"]):
        if needed not in caller.scopes:
            raise Forbidden(
                f"This API key lacks the scope {needed.value!r}, which "
                f"{scope['method']} {scope['path'][:200]} needs.",
                scope=needed.value,
            )


def _require_form_token(session: str, scope: Scope) -> None:
    if scope["method"] in SAFE_METHODS or not scope["path"].startswith(API_FOLDER):
        return
    if not is_form_token(Headers(scope=scope).get(FORM_HEADER, ""), session):
        raise Forbidden(
            "This change did not come from a page of this sign-in. Reload the page; programs send "
            "an API key instead of a cookie.",
            code="origin_not_allowed",
        )
