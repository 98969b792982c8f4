"""From an exception to the answer the caller gets. One table, held complete by a test.

Every refusal has the body of `wire.errors`. `x-should-retry: false` stands where an SDK would
otherwise repeat a request that can't succeed (the OpenAI SDK repeats 409 and everything from 500).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from batch_app.errors import (
    BadLines,
    BadRequest,
    BatchAppError,
    Conflict,
    Forbidden,
    IdempotencyMismatch,
    KeyInUse,
    ModelNotFound,
    NotFound,
    ObjectsUnavailable,
    StorageFull,
    StorageLost,
    StoreLost,
    StoreUnavailable,
    TooLarge,
    TooMany,
    TooSlow,
    Unauthenticated,
    UnsupportedMedia,
)
from batch_app.wire.errors import ErrorBody, bad_lines_body, error_body

logger = logging.getLogger(__name__)

NO_RETRY = {"x-should-retry": "false"}
RETRY_SOON = {"retry-after": "2"}
RETRY_A_409 = {"x-should-retry": "true", **RETRY_SOON}
CHALLENGE = 'Bearer realm="vllm-batch"'
INVALID_TOKEN = f'{CHALLENGE}, error="invalid_token"'

#: The most specific class decides. What isn't here, nor below something that is, is a 500.
STATUS: Mapping[type[BatchAppError], int] = {
    BadRequest: 400,
    BadLines: 400,
    TooLarge: 413,
    IdempotencyMismatch: 422,
    UnsupportedMedia: 415,
    Unauthenticated: 401,
    Forbidden: 403,
    TooMany: 429,
    TooSlow: 408,
    NotFound: 404,
    ModelNotFound: 404,
    Conflict: 409,
    KeyInUse: 409,
    StorageFull: 507,
    StorageLost: 503,
    StoreUnavailable: 503,
    StoreLost: 503,
    ObjectsUnavailable: 503,
}
_HEADERS: Mapping[int, Mapping[str, str]] = {409: NO_RETRY, 507: NO_RETRY, 503: RETRY_SOON}
_CODES: Mapping[type[BatchAppError], str] = {
    StorageFull: "storage_full",
    StorageLost: "storage_lost",
    StoreUnavailable: "store_unavailable",
    StoreLost: "store_lost",
    ObjectsUnavailable: "object_storage_unavailable",
}


def json_response(
    body: ErrorBody, status: int, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


def status_of(error: BatchAppError) -> int:
    """The HTTP status of an error raised on purpose; 500 for those no caller should see."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def answer(error: BatchAppError) -> Response:
    """The answer that an error raised on purpose becomes."""
    status = status_of(error)
    headers = _headers(error, status)
    if isinstance(error, BadLines):
        body = bad_lines_body(
            error.message, error.errors, error.num_errors, code=error.code, param=error.param
        )
        return json_response(body, status, headers)
    if status == 500:
        logger.error("%s reached the API: %s", type(error).__name__, error, exc_info=error)
        return internal_error()
    code = getattr(error, "code", None) or _CODES.get(type(error))
    param = getattr(error, "param", None)
    if status >= 500:
        logger.warning("Answering %d: %s", status, error.message)
    message = error.message
    if isinstance(error, StoreUnavailable) and not isinstance(error, StoreLost):
        message = "The database does not answer at the moment. Try again shortly."
    return json_response(error_body(status, message, code=code, param=param), status, headers)


def _headers(error: BatchAppError, status: int) -> Mapping[str, str] | None:
    if isinstance(error, TooMany):
        retry = {"retry-after": str(error.retry_after_s)}
        return retry if error.repeatable else retry | NO_RETRY
    if isinstance(error, KeyInUse):
        return RETRY_A_409
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": CHALLENGE if error.is_missing else INVALID_TOKEN}
    if isinstance(error, Forbidden) and error.scope is not None:
        scope = f', error="insufficient_scope", scope="{error.scope}"'
        return {"www-authenticate": CHALLENGE + scope}
    if isinstance(error, TooSlow):
        return {"connection": "close"}  # else the rest would go on arriving as slowly
    return _HEADERS.get(status)


def internal_error() -> Response:
    """A bug of ours. The log has the traceback, the body nothing of it."""
    body = error_body(
        500,
        "Something went wrong in the server; its log has the details under this request's id.",
        code="internal_error",
    )
    return json_response(body, 500)


def install(app: FastAPI) -> None:
    """Have every refusal of the app, the framework's own included, answered in our shape."""

    async def on_app_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, BatchAppError)
        return answer(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        if status == 404:
            message = f"There is nothing at {request.method} {request.url.path[:200]}."
        elif status == 405:
            message = f"{request.url.path[:200]} does not take {request.method}."
        else:
            message = str(error.detail)
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        return json_response(error_body(status, message, code=code), status, error.headers)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{where or 'The request'}: {first['msg']}."
        return json_response(error_body(400, message, code="invalid_request", param=where), 400)

    app.add_exception_handler(BatchAppError, on_app_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
