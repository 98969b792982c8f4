"""Sign-in with an API key, sign-out, and the page where an admin makes and revokes keys.

The browser never keeps the key: it gets a cookie that no script can read, no other site can send
along, and that the store knows by its SHA-256 only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from batch_app.dashboard.rendering import SEE_OTHER, SIGN_IN, first, page, read_form, safe_next
from batch_app.errors import BadRequest, Forbidden, NotFound, Unauthenticated
from batch_app.keys import Scope, is_key_id, new_key
from batch_app.routes.authentication import COOKIE
from batch_app.routes.services import note_object, services

router = APIRouter(include_in_schema=False)
logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 100
MAX_DAYS = 3650


@router.get(SIGN_IN)
def sign_in_page(request: Request, target: str = Query("/", alias="next")) -> Response:
    own = services(request)
    if not own.access.is_required():
        return RedirectResponse("/", SEE_OTHER)
    return page(request, "sign_in.html", target=safe_next(target), problem="")


@router.post(SIGN_IN)
async def sign_in(request: Request) -> Response:
    own = services(request)
    fields = await read_form(request)
    target = safe_next(first(fields, "next"))
    life_s = own.settings.session_s
    try:
        held = await run_in_threadpool(
            own.access.sign_in, first(fields, "key").strip(), float(life_s)
        )
    except (Unauthenticated, Forbidden) as error:
        return page(request, "sign_in.html", http_status=401, target=target, problem=error.message)
    response = RedirectResponse(target, SEE_OTHER)
    response.set_cookie(
        COOKIE,
        held,
        max_age=life_s,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    await read_form(request)
    session = getattr(request.state, "session", None)
    if session is not None:
        await run_in_threadpool(services(request).access.sign_out, session)
    response = RedirectResponse(SIGN_IN, SEE_OTHER)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


# -- keys ------------------------------------------------------------------------------------------


@router.get("/keys")
def keys_page(request: Request) -> Response:
    return _keys(request)


@router.post("/keys")
async def create(request: Request) -> Response:
    """Make a key, and show it this once."""
    fields = await read_form(request)
    own = services(request)
    if not await run_in_threadpool(own.access.is_required):
        raise Forbidden("The first key is made on the command line: vllm-batch keys create NAME")
    try:
        name, scopes = _name(first(fields, "name")), _scopes(fields)
        expires_at = _end(own.clock(), first(fields, "days").strip())
        key, token = new_key(name, scopes, own.clock(), expires_at=expires_at)
    except (BadRequest, ValueError) as error:
        return await run_in_threadpool(_keys, request, problem=str(error), status=400)
    await run_in_threadpool(own.store.add_key, key)
    own.access.note_change()
    note_object(request, key.id)
    return await run_in_threadpool(_keys, request, made=token, made_name=key.name)


@router.post("/keys/{key_id}/revoke")
async def revoke(request: Request, key_id: str) -> Response:
    await read_form(request)
    if not is_key_id(key_id):
        raise NotFound("No such key.", param="key_id")
    own = services(request)
    await run_in_threadpool(own.store.revoke_key, key_id, own.clock())
    own.access.note_change()
    return RedirectResponse("/keys", SEE_OTHER)


def _keys(
    request: Request, *, made: str = "", made_name: str = "", problem: str = "", status: int = 200
) -> Response:
    own = services(request)
    are_on = own.access.is_required()
    now = own.clock()
    found = own.store.list_keys() if are_on else []
    rows = [{"key": key, "state": key.refusal(now) or "active"} for key in reversed(found)]
    return page(
        request,
        "keys.html",
        http_status=status,
        are_on=are_on,
        rows=rows,
        made=made,
        made_name=made_name,
        problem=problem,
    )


def _name(text: str) -> str:
    name = text.strip()
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise BadRequest(f"A name has 1 to {MAX_NAME_CHARS} characters that can be printed.")
    return name


def _scopes(fields: Mapping[str, list[str]]) -> list[Scope]:
    try:
        return [Scope(value) for value in fields.get("scope", [])]
    except ValueError:
        raise BadRequest("There is no such scope.") from None


def _end(now: datetime, days: str) -> datetime | None:
    if not days:
        return None
    is_number = days.isascii() and days.isdigit() and len(days) <= len(str(MAX_DAYS))
    if not is_number or not 1 <= int(days) <= MAX_DAYS:
        raise BadRequest(f"A key ends after 1 to {MAX_DAYS} days, or never if that is empty.")
    return now + timedelta(days=int(days))
