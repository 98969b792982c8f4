"""A batch's results and its log: the downloads of the usage guide, for batches of both dialects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from batch_app.core import Batch
from batch_app.errors import BadRequest, Conflict, NotFound
from batch_app.keys import Caller
from batch_app.routes.answers import JSONL, a_part_of, refusals
from batch_app.routes.downloads import (
    ResultFilter,
    follow_log,
    follow_shared_log,
    in_blocks,
    last_lines,
    lines_of_file,
    lines_so_far,
    log_blocks,
    selected,
)
from batch_app.routes.object_downloads import (
    LINK,
    LINK_CONTENT,
    Link,
    download,
    download_link,
    link_answers,
)
from batch_app.routes.services import Services, caller, checked_batch_id, services
from batch_app.routes.transfer import streamed
from batch_app.shared_files import fetch_logs, fetch_results_file, in_order, results_name
from batch_app.wire.native import STATUS_NAMES

router = APIRouter(tags=["batches"])

MAX_TAIL_LINES = 100_000


def _batch(request: Request, batch_id: str) -> tuple[Services, Batch]:
    own = services(request)
    return own, own.store.get_batch(checked_batch_id(batch_id), seen_by=caller(request))


@router.head("/v1/batches/{batch_id}/results", include_in_schema=False)
@router.get(
    "/v1/batches/{batch_id}/results",
    response_class=Response,
    responses={
        200: {
            "description": "One line a request, in input order once the batch has finished. "
            "`x-results-complete: false`: it has not, and these are the results so far. "
            "Compressed where `Accept-Encoding` names gzip and no `Range` is asked for.",
            "content": {JSONL: {"schema": {"type": "string"}}, **LINK_CONTENT},
        },
        **a_part_of("the results of a finished batch"),
        **link_answers(),
        **refusals(400, 404, 409, 503),
    },
)
def get_results(
    request: Request,
    batch_id: str,
    status: str | None = Query(None, description="`failed` or `completed`: only those lines."),
    link: Link | None = LINK,
) -> Response:
    """The results: all of them when the batch has finished, else those so far."""
    own, batch = _batch(request, batch_id)
    wanted = _result_filter(status)
    filename = f"{batch.id}_results.jsonl"
    headers = {"content-disposition": f'attachment; filename="{filename}"'}
    if not batch.is_terminal:
        lines = _results_so_far(own, caller(request), batch)
        if lines is not None:
            headers["x-results-complete"] = "false"
            return streamed(request, in_blocks(selected(lines, wanted)), headers, JSONL)
        batch = own.store.get_batch(batch.id, seen_by=caller(request))
    path, name = own.data.results_file(batch), results_name(batch)
    headers["x-results-complete"] = "true"
    try:
        if own.data.objects is not None:
            _require_live(own, batch)  # another machine may have deleted what is still here
        if wanted is None:
            return download_link(own, name, link) or download(
                request,
                own.data,
                name,
                path,
                batch.ended_at or batch.created_at,
                headers,
                may_compress=True,
            )
        path = fetch_results_file(own.data, batch)
        path.stat()
    except FileNotFoundError:
        raise NotFound(
            f"Batch {batch.id} has no results: it is {STATUS_NAMES[batch.status]}"
            f"{f' ({batch.error_message})' if batch.error_message else ''}."
        ) from None
    return streamed(request, in_blocks(selected(lines_of_file(path), wanted)), headers, JSONL)


def _require_live(own: Services, batch: Batch) -> None:
    """Raises FileNotFoundError where a published file of this batch was deleted."""
    names = [name for name in (batch.output_file_id, batch.error_file_id) if name]
    live = own.store.which_files_live(names)
    if not all(live.get(name, False) for name in names):
        raise FileNotFoundError(f"Files of {batch.id} were deleted.")


def _results_so_far(own: Services, asks: Caller, batch: Batch) -> Iterator[bytes] | None:
    """The lines of a batch that runs; None where it has just been published and has moved."""
    if batch.started_at is None:
        raise Conflict(
            f"Batch {batch.id} is pending: no request has run yet, so there are no results.",
            code="no_results_yet",
        )
    lines = lines_so_far(own.data, batch)
    try:
        first = next(lines, None)  # the files are open from here on
    except FileNotFoundError:
        return None
    if first is None:
        batch = own.store.get_batch(batch.id, seen_by=asks)
        return None if batch.is_terminal else iter(())
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
        **refusals(400, 404, 503),
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
    if own.data.objects is not None:
        if follow:
            content = follow_shared_log(own, caller(request), batch, tail)
            return StreamingResponse(content, headers=headers, media_type="text/plain")
        text = last_lines(in_order(fetch_logs(own.data, batch.id).values()), tail)
        return Response(text, headers=headers, media_type="text/plain")
    if follow:
        content = follow_log(own, caller(request), batch, path, tail)
        return StreamingResponse(content, headers=headers, media_type="text/plain")
    return StreamingResponse(log_blocks(path, tail), headers=headers, media_type="text/plain")
