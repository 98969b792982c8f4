"""Writes into the audit log what is asked for, and what became of it.

Written before the answer goes out: what changes something, what is refused, what looks for things
that aren't there, and what a key reads that sees everybody's.
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batch_app.audit import AuditLog, Deed
from batch_app.keys import Caller
from batch_app.routes.authentication import SAFE_METHODS

REFUSALS = frozenset({401, 403, 429})
MAX_PATH_CHARS = 100


class AuditTrail:
    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        answered = False

        async def send_noted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                await self._note(scope, state, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            if not answered:
                await self._note(scope, state, None)

    async def _note(self, scope: Scope, state: dict[str, object], outcome: int | None) -> None:
        caller = state.get("caller")
        key_id = caller.key_id if isinstance(caller, Caller) else None
        ids = scope.get("path_params") or {}
        is_looking = outcome == 404 and bool(ids)
        is_admin = key_id is not None and isinstance(caller, Caller) and caller.sees_all
        if not (
            scope["method"] not in SAFE_METHODS
            or outcome in REFUSALS
            or (key_id is not None and (is_looking or (is_admin and ids)))
        ):
            return
        route = getattr(scope.get("route"), "name", None)
        object_id = state.get("made") or next(iter(ids.values()), None)
        client = scope.get("client")
        refused = state.get("refused_key_id")
        deed = Deed(
            action=route or f"{scope['method']} {scope['path'][:MAX_PATH_CHARS]}",
            object_id=None if object_id is None else str(object_id)[:MAX_PATH_CHARS],
            outcome=outcome,
            key_id=key_id or (str(refused) if refused else None),
            client=client[0] if client else None,
            request_id=str(state["request_id"]) if "request_id" in state else None,
        )
        stranger = outcome in REFUSALS and deed.key_id is None
        await run_in_threadpool(self._log.write, deed, stranger=stranger)
