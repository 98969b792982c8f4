"""The usage guide's routes. Handlers that ask the store are plain functions, run in threads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response, StreamingResponse

from batch_app.batch_log import BatchLog
from batch_app.core import Batch, BatchStatus
from batch_app.errors import BadRequest, Conflict, NotFound
from batch_app.files import remove_tree
from batch_app.results import iter_results
from batch_app.routes.downloads import (
    ResultFilter,
    follow_log,
    in_blocks,
    lines_of_file,
    log_blocks,
    selected,
)
from batch_app.routes.services import Services, checked_batch_id, services
from batch_app.uploads import receive_batch
from batch_app.wire.errors import BadLinesBody, ErrorBody
from batch_app.wire.native import (
    STATUS_NAMES,
    STATUSES,
    BatchBody,
    BatchListBody,
    ModelListBody,
    batch_body,
    batch_list_body,
    model_body,
    model_list_body,
)

router = APIRouter(tags=["batches"])

MAX_LIMIT = 100
DEFAULT_LIMIT = 20
MAX_TAIL_LINES = 100_000
JSONL = "application/jsonl"

_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "model"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL, one request a line: "
                            '{"custom_id": …, "body": {"messages": […]}}',
                        },
                        "model": {
                            "type": "string",
                            "description": "A model of GET /v1/models, or an alias of one. It "
                            "runs all requests, whatever their bodies say.",
                        },
                    },
                }
            }
        },
    }
}


def _refusals(*statuses: int, **models: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": models.get(f"on_{status}", ErrorBody)} for status in statuses}


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _batch(request: Request, batch_id: str) -> tuple[Services, Batch]:
    own = services(request)
    return own, own.store.get_batch(checked_batch_id(batch_id))


def _batch_answer(own: Services, batch: Batch) -> Response:
    return _json(batch_body(batch, own.estimate(batch)))


@router.get("/v1/models", response_model=ModelListBody, tags=["models"])
def list_models(request: Request) -> Response:
    """The models of the registry, with what was last measured of each."""
    own = services(request)
    return _json(
        model_list_body(
            [model_body(entry, own.benchmarks.latest(entry.name)) for entry in own.registry.entries]
        )
    )


@router.post(
    "/v1/batches",
    response_model=BatchBody,
    responses=_refusals(400, 404, 413, 415, 503, 507, on_400=BadLinesBody),
    openapi_extra=_UPLOAD_FORM,
)
async def submit_batch(request: Request) -> Response:
    """Submit a JSONL file of requests. Each line is checked before the batch exists."""
    own = services(request)
    batch = await receive_batch(own.for_uploads, dict(request.headers), request.stream())
    return await run_in_threadpool(_batch_answer, own, batch)


@router.get("/v1/batches", response_model=BatchListBody, responses=_refusals(400, 404, 503))
def list_batches(
    request: Request,
    status: str | None = Query(None, description=f"One of: {', '.join(STATUSES)}."),
    limit: int = Query(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT),
    after: str | None = Query(None, description="The last batch_id of the page before."),
) -> Response:
    """Batches, newest first."""
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
    )
    bodies = [
        batch_body(batch, guess) for batch, guess in zip(page, own.estimates(page), strict=True)
    ]
    return _json(batch_list_body(bodies, has_more))


@router.get("/v1/batches/{batch_id}", response_model=BatchBody, responses=_refusals(404, 503))
def get_batch(request: Request, batch_id: str) -> Response:
    """How far a batch is."""
    return _batch_answer(*_batch(request, batch_id))


@router.delete(
    "/v1/batches/{batch_id}", response_model=BatchBody, responses=_refusals(404, 409, 503)
)
def cancel_pending_batch(request: Request, batch_id: str) -> Response:
    """Cancel a batch that is still `pending`."""
    own = services(request)
    batch_id = checked_batch_id(batch_id)
    try:
        batch = own.store.cancel_queued(batch_id, own.clock())
    except Conflict as conflict:
        batch = own.store.get_batch(batch_id)
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
    _after_cancel(own, batch)
    return _batch_answer(own, batch)


@router.post(
    "/v1/batches/{batch_id}/cancel", response_model=BatchBody, responses=_refusals(404, 409, 503)
)
def cancel_batch(request: Request, batch_id: str) -> Response:
    """Cancel a batch, also one that runs: it ends soon after and keeps the results so far."""
    own = services(request)
    batch = own.store.request_cancel(checked_batch_id(batch_id), own.clock())
    _after_cancel(own, batch)
    return _batch_answer(own, batch)


def _after_cancel(own: Services, batch: Batch) -> None:
    log = BatchLog(own.data.log_file(batch.id), clock=own.clock)
    if batch.status is BatchStatus.CANCELLED and batch.started_at is None:
        remove_tree(own.data.work_dir(batch.id))
        log.write("cancelled before it started")
    elif batch.status is BatchStatus.CANCELLING:
        log.write("cancel requested")


@router.get(
    "/v1/batches/{batch_id}/results",
    response_class=Response,
    responses={
        200: {
            "description": "One line a request, in input order once the batch has finished. "
            "`x-results-complete: false`: it has not, and these are the results so far.",
            "content": {JSONL: {"schema": {"type": "string"}}},
        },
        **_refusals(400, 404, 409, 503),
    },
)
def get_results(
    request: Request,
    batch_id: str,
    status: str | None = Query(None, description="`failed` or `completed`: only those lines."),
) -> Response:
    """The results: all of them when the batch has finished, else those so far."""
    own, batch = _batch(request, batch_id)
    wanted = _result_filter(status)
    filename = f"{batch.id}_results.jsonl"
    headers = {"content-disposition": f'attachment; filename="{filename}"'}
    if not batch.is_terminal:
        lines = _results_so_far(own, batch)
        if lines is not None:
            headers["x-results-complete"] = "false"
            content = in_blocks(selected(lines, wanted))
            return StreamingResponse(content, headers=headers, media_type=JSONL)
        batch = own.store.get_batch(batch.id)
    path = own.data.results_file(batch)
    if not path.is_file():
        raise NotFound(
            f"Batch {batch.id} has no results: it is {STATUS_NAMES[batch.status]}"
            f"{f' ({batch.error_message})' if batch.error_message else ''}."
        )
    headers["x-results-complete"] = "true"
    if wanted is None:
        return FileResponse(path, headers=headers, media_type=JSONL)
    content = in_blocks(selected(lines_of_file(path), wanted))
    return StreamingResponse(content, headers=headers, media_type=JSONL)


def _results_so_far(own: Services, batch: Batch) -> Iterator[bytes] | None:
    """The lines of a batch that runs; None where it has just been published and has moved."""
    if batch.started_at is None:
        raise Conflict(
            f"Batch {batch.id} is pending: no request has run yet, so there are no results.",
            code="no_results_yet",
        )
    work_dir = own.data.work_dir(batch.id)
    lines = iter_results(work_dir)
    try:
        first = next(lines, None)  # the files are open from here on
    except FileNotFoundError:
        return None
    if first is None:
        return iter(()) if work_dir.is_dir() else None
    return chain([first], lines)


def _result_filter(status: str | None) -> ResultFilter | None:
    if status is None:
        return None
    try:
        return ResultFilter(status)
    except ValueError:
        raise BadRequest(
            f"There is no result status {status[:64]!r}. There are: {', '.join(ResultFilter)}.",
            param="status",
        ) from None


@router.get(
    "/v1/batches/{batch_id}/logs",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **_refusals(400, 404, 503),
    },
)
def get_logs(
    request: Request,
    batch_id: str,
    tail: int | None = Query(None, ge=0, le=MAX_TAIL_LINES, description="Only so many last lines."),
    follow: bool = Query(False, description="Go on until the batch has finished."),
) -> Response:
    """The batch's log, for a person to read."""
    own, batch = _batch(request, batch_id)
    path = own.data.log_file(batch.id)
    headers = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
    if follow:
        content = follow_log(own, batch, path, tail)
        return StreamingResponse(content, headers=headers, media_type="text/plain")
    return StreamingResponse(log_blocks(path, tail), headers=headers, media_type="text/plain")
