"""From a template to an answer: what every page has, and the pages that say what went wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

from batch_app import __version__
from batch_app.dashboard import formats
from batch_app.errors import BadRequest, BatchAppError, Forbidden, TooLarge, Unauthenticated
from batch_app.keys import Caller, form_token, is_form_token
from batch_app.keys import Scope as KeyScope
from batch_app.routes.authentication import API_FOLDER, SAFE_METHODS
from batch_app.routes.errors import answer, status_of

MAX_FORM_BYTES = 16 * 1024
SIGN_IN = "/sign-in"
SEE_OTHER = 303


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batch_app.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": formats.count,
        "rate": formats.rate,
        "duration": formats.duration,
        "size": formats.size,
        "moment": formats.moment,
        "iso": formats.iso,
    }
    environment.globals |= {"version": __version__, "asset": asset, "plural": formats.plural}
    return environment


@cache
def asset(name: str) -> str:
    """The address of a static file, which changes with its content."""
    content = (files("batch_app.dashboard") / "static" / name).read_bytes()
    return f"/static/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"


def page(request: Request, template: str, *, http_status: int = 200, **context: object) -> Response:
    """A whole page. It is nobody else's, so nothing on the way may keep it."""
    found = getattr(request.state, "caller", None)
    asks = found if isinstance(found, Caller) else None
    session = getattr(request.state, "session", None)
    text = (
        _environment()
        .get_template(template)
        .render(
            path=request.url.path,
            is_signed_in=session is not None,
            is_admin=asks is not None and asks.key_id is not None and asks.sees_all,
            can_write=asks is not None and KeyScope.WRITE in asks.scopes,
            form_token=form_token(session) if session else "",
            **context,
        )
    )
    return Response(text, http_status, {"cache-control": "no-store"}, media_type="text/html")


# -- what went wrong -------------------------------------------------------------------------------


def wants_page(scope: Scope) -> bool:
    """Whether this comes from somebody who looks at a browser, rather than from a program."""
    accepts = Headers(scope=scope).get("accept", "")
    return "text/html" in accepts and not scope["path"].startswith(API_FOLDER)


def refusal(error: BatchAppError, scope: Scope) -> Response:
    """What an error raised on purpose becomes: a page for a person, else the API's answer."""
    if not wants_page(scope):
        return answer(error)
    if isinstance(error, Unauthenticated):
        return to_sign_in(scope)
    status = status_of(error)
    if status >= 500:
        said = answer(error)  # which also writes it to the log
        headers = {name: said.headers[name] for name in ("retry-after",) if name in said.headers}
        message = (
            "The database does not answer at the moment. Try again shortly."
            if status == 503
            else error.message
            if status != 500
            else "Something went wrong in the server; its log has the details."
        )
        response = error_page(Request(scope), status, message)
        response.headers.update(headers)
        return response
    return error_page(Request(scope), status, error.message)


def error_page(request: Request, status: int, message: str) -> Response:
    return page(
        request,
        "error.html",
        http_status=status,
        error_status=status,
        title=HTTPStatus(status).phrase,
        message=message,
        request_id=getattr(request.state, "request_id", ""),
    )


def to_sign_in(scope: Scope) -> Response:
    """To where a key is asked for, and back from there. After a POST, back to the start."""
    back = ""
    if scope["method"] in SAFE_METHODS and scope["path"] != "/":
        query = scope.get("query_string", b"").decode("latin-1")
        back = "?next=" + quote(scope["path"] + (f"?{query}" if query else ""), safe="/")
    return RedirectResponse(SIGN_IN + back, SEE_OTHER)


def safe_next(target: str) -> str:
    """Where to go after signing in: a page of this server, whatever somebody wrote there."""
    is_ours = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if is_ours and target.isprintable() and "\\" not in target else "/"


# -- forms -----------------------------------------------------------------------------------------


async def read_form(request: Request) -> Mapping[str, list[str]]:
    """The fields of a page's form.

    Raises Forbidden where a signed-in browser sends a form that no page of its session holds;
    BadRequest, TooLarge.
    """
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_FORM_BYTES:
            raise TooLarge(f"The form is larger than {MAX_FORM_BYTES} bytes.")
    try:
        fields = parse_qs(raw.decode(), keep_blank_values=True, max_num_fields=50)
    except ValueError:
        raise BadRequest("The form can't be read.") from None
    session = getattr(request.state, "session", None)
    if session is not None and not is_form_token(first(fields, "form_token"), session):
        raise Forbidden(
            "This form did not come from a page of this sign-in. Reload the page and try again.",
            code="origin_not_allowed",
        )
    return fields


def first(fields: Mapping[str, Any], name: str) -> str:
    """A field's value; empty where it is missing."""
    values = fields.get(name)
    return str(values[0]) if values else ""
