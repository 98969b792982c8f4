"""What the buttons of a batch do. Plain forms: they work without the script, and by keyboard."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from batch_app.batch_log import BatchLog
from batch_app.core import BatchStatus
from batch_app.dashboard.rendering import SEE_OTHER, read_form
from batch_app.retry import retry_batch
from batch_app.routes.services import caller, checked_batch_id, note_object, services
from batch_app.shared_files import share_log

router = APIRouter(include_in_schema=False)


@router.post("/batches/{batch_id}/cancel")
async def cancel(request: Request, batch_id: str) -> Response:
    """End a batch; the results so far are kept."""
    await read_form(request)
    own, asks = services(request), caller(request)

    def work() -> str:
        batch = own.store.request_cancel(checked_batch_id(batch_id), own.clock(), seen_by=asks)
        if batch.status is BatchStatus.CANCELLING:
            BatchLog(own.data.log_file(batch.id), clock=own.clock).write("cancel requested")
            share_log(own.data, batch.id)
            own.housekeeping.wake()
        return batch.id

    return _to_batch(await run_in_threadpool(work))


@router.post("/batches/{batch_id}/retry")
async def retry(request: Request, batch_id: str) -> Response:
    """Run what failed once more, as a new batch."""
    await read_form(request)
    own, asks = services(request), caller(request)

    def work() -> str:
        batch = own.store.get_batch(checked_batch_id(batch_id), seen_by=asks)
        again = retry_batch(
            own.store, own.data, own.settings, own.registry, batch, own.clock(), seen_by=asks
        )
        return again.id

    again_id = await run_in_threadpool(work)
    note_object(request, again_id)
    return _to_batch(again_id)


def _to_batch(batch_id: str) -> Response:
    return RedirectResponse(f"/batches/{batch_id}", SEE_OTHER)
