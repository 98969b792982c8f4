"""Batches, in both dialects: one set of routes, each batch answered in the dialect it came in.

`?format=native` or `?format=openai` asks for the other view. `POST /v1/batches` is told apart by
its content type: a form is the native dialect's, JSON the OpenAI one's.
"""

from __future__ import annotations

import hashlib

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from batch_app import tracing
from batch_app.batch_log import BatchLog
from batch_app.core import (
    Batch,
    BatchStatus,
    Dialect,
    Endpoint,
    FilePurpose,
    Idempotency,
)
from batch_app.errors import BadRequest, Conflict
from batch_app.files import new_id
from batch_app.incoming import receive
from batch_app.keys import Caller
from batch_app.retry import retry_batch
from batch_app.routes.answers import form_schema, json_answer, json_schema, refusals
from batch_app.routes.bodies import is_json, read_json
from batch_app.routes.openai_files import checked_file_id
from batch_app.routes.services import (
    Services,
    caller,
    checked_batch_id,
    note_object,
    services,
)
from batch_app.shared_files import remove_work, share_log
from batch_app.uploads import BatchUpload
from batch_app.validation import window_end
from batch_app.webhook_targets import requested_webhook
from batch_app.webhooks import Webhook
from batch_app.wire.batches import BatchListBody, ModelListBody, batch_list_body
from batch_app.wire.errors import BadLinesBody, ErrorBody
from batch_app.wire.native import (
    STATUS_NAMES,
    STATUSES,
    BatchBody,
    batch_body,
    model_body,
)
from batch_app.wire.openai import (
    BatchCreate,
    OpenAIBatchBody,
    OpenAIModelBody,
    openai_batch_body,
    openai_model_body,
)

router = APIRouter(tags=["batches"])
models_router = APIRouter(tags=["models"])

MAX_LIMIT = 100
DEFAULT_LIMIT = 20
MAX_KEY_CHARS = 255
AnyBatchBody = BatchBody | OpenAIBatchBody

_ENDPOINTS = tuple(endpoint.value for endpoint in Endpoint)
_NATIVE_FORM = form_schema(
    {
        "file": {
            "type": "string",
            "format": "binary",
            "description": 'JSONL, one request a line: {"custom_id": …, "body": {"messages": […]}}',
        },
        "model": {
            "type": "string",
            "description": "A model of GET /v1/models, or an alias of one. It runs all requests, "
            "whatever their bodies say.",
        },
        "deduplicate": {
            "type": "string",
            "enum": ["true", "false"],
            "description": "false: compute each of several equal requests. Default true.",
        },
        "webhook_url": {
            "type": "string",
            "description": "Told of the batch's end; the answer has its secret, this once.",
        },
        "webhook_secret": {
            "type": "string",
            "description": "A secret of your own for it: whsec_ and 24 to 64 bytes in base64.",
        },
    },
    ["file", "model"],
)
_NATIVE_FORM["requestBody"]["content"] |= json_schema(BatchCreate)
_KEYED = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS},
            "description": "A repetition of the request under the same key gets the same batch.",
        }
    ]
}
_FORMAT = Query(
    None, alias="format", description="The dialect of the answer; by default the batch's own."
)


# -- models ----------------------------------------------------------------------------------------


@models_router.get("/v1/models", response_model=ModelListBody)
def list_models(request: Request) -> Response:
    """The models of the registry, with what was last measured of each."""
    own = services(request)
    entries = own.registry.entries
    native = [model_body(entry, own.benchmarks.latest(entry.name)) for entry in entries]
    return json_answer(
        ModelListBody(
            data=[openai_model_body(entry, own.started_at) for entry in entries],
            models=native,
            count=len(native),
        )
    )


@models_router.get(
    "/v1/models/{model:path}", response_model=OpenAIModelBody, responses=refusals(404)
)
def get_model(request: Request, model: str) -> Response:
    """One model of the registry, by its name or an alias."""
    own = services(request)
    return json_answer(openai_model_body(own.registry.get(model), own.started_at))


# -- creating --------------------------------------------------------------------------------------


@router.post(
    "/v1/batches",
    response_model=AnyBatchBody,
    responses=refusals(400, 404, 409, 413, 415, 422, 503, 507, on_400=BadLinesBody | ErrorBody),
    openapi_extra=_NATIVE_FORM | _KEYED,
)
async def create_batch(request: Request) -> Response:
    """Create a batch: of a form with its file, or of a file uploaded before (JSON)."""
    own = services(request)
    if not is_json(request):
        asks, key = caller(request), _key(request)
        if key is None:  # else it may have its batch already
            # Before gigabytes arrive; once more when the batch is made.
            limit = own.settings.max_unfinished_batches
            await run_in_threadpool(own.store.require_room, asks.owner, limit)
        with own.keys_in_use.hold(asks.owner, key):
            upload = BatchUpload(own.for_uploads(asks), key)
            with tracing.span("upload", upload.batch_id):
                batch = await receive(upload, dict(request.headers), request.stream())
        note_object(request, batch.id)
        return await run_in_threadpool(_answer, own, batch, None, upload.webhook)
    wish, raw = await read_json(request, BatchCreate)
    batch, webhook = await run_in_threadpool(
        _create_from_file, own, caller(request), wish, _idempotency(request, raw)
    )
    note_object(request, batch.id)
    return await run_in_threadpool(_answer, own, batch, None, webhook)


def _key(request: Request) -> str | None:
    """The client's Idempotency-Key, if it sent one."""
    key = request.headers.get("idempotency-key")
    if not key:
        return None
    if len(key) > MAX_KEY_CHARS:
        raise BadRequest(
            f"The Idempotency-Key has more than {MAX_KEY_CHARS} characters.",
            param="Idempotency-Key",
        )
    return key


def _idempotency(request: Request, said: bytes) -> Idempotency | None:
    """The client's key, if it sent one, for the request that says this."""
    key = _key(request)
    return None if key is None else Idempotency(key, hashlib.sha256(said).hexdigest())


def _create_from_file(
    own: Services, asks: Caller, wish: BatchCreate, idempotency: Idempotency | None
) -> tuple[Batch, Webhook | None]:
    """The batch is there at once; its lines are checked in the background. Comes with the webhook
    that was made with it."""
    if idempotency is not None:
        earlier = own.store.batch_of_key(idempotency, seen_by=asks)
        if earlier is not None:
            return earlier, None
    if wish.endpoint not in _ENDPOINTS:
        raise BadRequest(f"The endpoint must be one of: {', '.join(_ENDPOINTS)}.", param="endpoint")
    now = own.clock()
    expires_at = window_end(now, wish.completion_window)
    file = own.store.get_file(checked_file_id(wish.input_file_id), seen_by=asks)
    if file.purpose is not FilePurpose.BATCH:
        raise BadRequest(
            f"File {file.id} has the purpose {file.purpose.value!r}; a batch needs one of the "
            'purpose "batch".',
            param="input_file_id",
        )
    batch = Batch(
        id=new_id("batch"),
        dialect=Dialect.OPENAI,
        status=BatchStatus.VALIDATING,
        endpoint=wish.endpoint,
        model="",
        input_file_id=file.id,
        created_at=now,
        completion_window=wish.completion_window,
        expires_at=expires_at,
        metadata=wish.metadata,
        priority=wish.priority,
        deduplicate=wish.deduplicate,
        output_expires_after_s=(
            wish.output_expires_after.seconds if wish.output_expires_after else None
        ),
        owner=asks.owner,
    )
    webhook = None
    if wish.webhook_url is not None:
        webhook = requested_webhook(
            own.settings,
            wish.webhook_url,
            now,
            owner=asks.owner,
            secret=wish.webhook_secret,
            batch_id=batch.id,
            prefix="webhook_",
        )
    created = own.store.add_batch(
        batch,
        idempotency=idempotency,
        webhook=webhook,
        seen_by=asks,
        max_unfinished=own.settings.max_unfinished_batches,
    )
    if created.id != batch.id:
        return created, None
    BatchLog(own.data.log_file(batch.id), clock=own.clock).write(
        f"submitted: file {file.id}, {file.size_bytes} bytes, endpoint {batch.endpoint}"
    )
    own.validation.wake()
    return created, webhook


# -- reading ---------------------------------------------------------------------------------------


@router.get("/v1/batches", response_model=BatchListBody, responses=refusals(400, 404, 503))
def list_batches(
    request: Request,
    status: str | None = Query(None, description=f"One of: {', '.join(STATUSES)}."),
    limit: int = Query(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT),
    after: str | None = Query(None, description="The last id of the page before."),
) -> Response:
    """Batches, newest first, the same page in both dialects: `data` and `batches`."""
    own = services(request)
    if status is not None and status not in STATUSES:
        raise BadRequest(
            f"There is no status {status[:64]!r}. There are: {', '.join(STATUSES)}.",
            param="status",
        )
    page, has_more = own.store.list_batches(
        limit=limit,
        after=None if after is None else checked_batch_id(after),
        statuses=None if status is None else STATUSES[status],
        seen_by=caller(request),
    )
    return json_answer(batch_list_body(page, own.estimates(page), has_more))


@router.get(
    "/v1/batches/{batch_id}", response_model=AnyBatchBody, responses=refusals(400, 404, 503)
)
def get_batch(request: Request, batch_id: str, dialect: Dialect | None = _FORMAT) -> Response:
    """How far a batch is."""
    own = services(request)
    batch = own.store.get_batch(checked_batch_id(batch_id), seen_by=caller(request))
    return _answer(own, batch, dialect)


# -- ending ----------------------------------------------------------------------------------------


@router.delete(
    "/v1/batches/{batch_id}", response_model=AnyBatchBody, responses=refusals(400, 404, 409, 503)
)
def cancel_pending_batch(
    request: Request, batch_id: str, dialect: Dialect | None = _FORMAT
) -> Response:
    """Cancel a batch that is still `pending`."""
    own = services(request)
    batch_id = checked_batch_id(batch_id)
    try:
        batch = own.store.cancel_queued(batch_id, own.clock(), seen_by=caller(request))
    except Conflict as conflict:
        batch = own.store.get_batch(batch_id, seen_by=caller(request))
        if batch.is_terminal:
            raise Conflict(
                f"Batch {batch_id} is {STATUS_NAMES[batch.status]}: there is nothing to cancel.",
                code=conflict.code,
            ) from None
        raise Conflict(
            f"Batch {batch_id} is running; DELETE cancels only pending ones. "
            f"POST /v1/batches/{batch_id}/cancel stops it and keeps the results so far.",
            code=conflict.code,
        ) from None
    if batch.status is BatchStatus.CANCELLING:  # it was paused, and may have results
        _log(own, batch, "cancel requested")
        own.housekeeping.wake()
    else:
        remove_work(own.data, batch.id)
        _log(own, batch, "cancelled before it started")
    return _answer(own, batch, dialect)


@router.post(
    "/v1/batches/{batch_id}/cancel",
    response_model=AnyBatchBody,
    responses=refusals(400, 404, 409, 503),
)
def cancel_batch(request: Request, batch_id: str, dialect: Dialect | None = _FORMAT) -> Response:
    """Cancel a batch, also one that runs: it ends soon after and keeps the results so far."""
    own = services(request)
    batch = own.store.request_cancel(
        checked_batch_id(batch_id), own.clock(), seen_by=caller(request)
    )
    if batch.status is BatchStatus.CANCELLING:
        _log(own, batch, "cancel requested")
        own.housekeeping.wake()
    return _answer(own, batch, dialect)


@router.post(
    "/v1/batches/{batch_id}/retry",
    response_model=AnyBatchBody,
    responses=refusals(400, 404, 409, 422, 503, 507),
    openapi_extra=_KEYED,
)
def retry(request: Request, batch_id: str, dialect: Dialect | None = _FORMAT) -> Response:
    """Run the requests of a finished batch that did not succeed once more, as a new batch."""
    own = services(request)
    asks = caller(request)
    batch = own.store.get_batch(checked_batch_id(batch_id), seen_by=asks)
    idempotency = _idempotency(request, f"retry {batch.id}".encode())
    again = None
    if idempotency is not None:
        again = own.store.batch_of_key(idempotency, seen_by=asks)
    if again is None:
        again = retry_batch(
            own.store,
            own.data,
            own.settings,
            own.registry,
            batch,
            own.clock(),
            idempotency,
            seen_by=asks,
        )
    return _answer(own, again, dialect)


def _log(own: Services, batch: Batch, message: str) -> None:
    BatchLog(own.data.log_file(batch.id), clock=own.clock).write(message)
    share_log(own.data, batch.id)


def _answer(
    own: Services, batch: Batch, dialect: Dialect | None, webhook: Webhook | None = None
) -> Response:
    estimate = own.estimate(batch)
    batch = own.with_pause(batch)
    body: BaseModel
    if (dialect or batch.dialect) is Dialect.OPENAI:
        body = openai_batch_body(batch, estimate, webhook)
    else:
        body = batch_body(batch, estimate, webhook)
    return json_answer(body)
