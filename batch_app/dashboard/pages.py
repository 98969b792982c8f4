"""The pages that show something: queue, batch, submit, models, machine; and their charts."""

from __future__ import annotations

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from batch_app.core import BatchStatus
from batch_app.dashboard import charts
from batch_app.dashboard.charts import Look, Theme, Width
from batch_app.dashboard.events import device
from batch_app.dashboard.failures import FailureReader
from batch_app.dashboard.feed import present_crew, seen_batches
from batch_app.dashboard.rendering import page
from batch_app.errors import BadRequest, Forbidden
from batch_app.keys import Caller
from batch_app.routes.services import Services, caller, checked_batch_id, services
from batch_app.wire.native import STATUSES

router = APIRouter(include_in_schema=False)

PAGE_SIZE = 25
LOG_LINES = 300
SVG = "image/svg+xml"
#: Nothing but the style within; whoever opens the picture by itself sees the same.
SVG_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; sandbox",
    "cache-control": "no-store",
}


@router.get("/")
def queue(
    request: Request, status: str | None = Query(None), after: str | None = Query(None)
) -> Response:
    """The queue and the history: the caller's batches, newest first."""
    own, asks = services(request), caller(request)
    if status is not None and status not in STATUSES:
        raise BadRequest("There is no such status.", param="status")
    found, has_more = own.store.list_batches(
        limit=PAGE_SIZE,
        after=None if after is None else checked_batch_id(after),
        statuses=None if status is None else STATUSES[status],
        seen_by=asks,
    )
    crew = present_crew(own)
    views = [seen.view for seen in seen_batches(own, found, crew)]
    return page(
        request,
        "queue.html",
        views=views,
        crew=crew,
        status=status,
        statuses=list(STATUSES),
        after=after,
        next_after=found[-1].id if has_more else None,
        is_empty=not found and status is None and after is None,
        models=[entry.name for entry in own.registry.entries],
        registry_problem=own.watched_registry.problem,
        address=_address(request),
    )


@router.get("/batches/{batch_id}")
def batch_page(request: Request, batch_id: str) -> Response:
    """One batch."""
    own, asks = services(request), caller(request)
    batch = own.store.get_batch(checked_batch_id(batch_id), seen_by=asks)
    (seen,) = seen_batches(own, [batch], present_crew(own))
    pace = charts.pace_of(batch, own.store.samples(batch.id, seen_by=asks))
    return page(
        request,
        "batch.html",
        batch=batch,
        view=seen.view,
        num_samples=seen.num_samples,
        pace=pace,
        failures=_failure_reader(request).of(batch),
        log_lines=LOG_LINES,
        is_finished=batch.is_terminal,
        provenance=_facts(batch.provenance),
        is_cut_short=batch.status in (BatchStatus.CANCELLED, BatchStatus.EXPIRED),
    )


def _failure_reader(request: Request) -> FailureReader:
    """The app's."""
    found = request.app.state.failures
    assert isinstance(found, FailureReader)
    return found


def _facts(provenance: object) -> list[tuple[str, str]]:
    """What a batch ran on, as pairs of words; nested ones are left to the API."""
    if not isinstance(provenance, dict):
        return []
    plain = {
        name: value for name, value in provenance.items() if isinstance(value, str | int | float)
    }
    return [(name.replace("_", " "), str(value)[:200]) for name, value in plain.items()]


@router.get("/batches/{batch_id}/throughput.svg")
def throughput(
    request: Request, batch_id: str, theme: Theme = Theme.LIGHT, width: Width = Width.WIDE
) -> Response:
    """A batch's throughput over time."""
    own, asks = services(request), caller(request)
    batch = own.store.get_batch(checked_batch_id(batch_id), seen_by=asks)
    pace = charts.pace_of(batch, own.store.samples(batch.id, seen_by=asks))
    return Response(charts.draw_pace(pace, Look(theme, width)), 200, SVG_HEADERS, SVG)


@router.get("/submit")
def submit(request: Request) -> Response:
    """A file dropped, checked, estimated, and queued."""
    own = services(request)
    entries = [
        (entry, own.benchmarks.latest(entry.name) is not None) for entry in own.registry.entries
    ]
    return page(
        request,
        "submit.html",
        entries=entries,
        max_bytes=own.settings.max_upload_bytes,
        address=_address(request),
    )


def _address(request: Request) -> str:
    """Of this server, as the reader's browser calls it; without a slash at the end."""
    return str(request.base_url).rstrip("/")


@router.get("/models")
def models(request: Request) -> Response:
    """The registry, with what was measured. Runs of everybody are shown to who may see them."""
    own, asks = services(request), caller(request)
    loaded = present_crew(own).models
    found = []
    for entry in own.registry.entries:
        records = own.benchmarks.all(entry.name)
        runs = charts.runs_of(records) if asks.sees_all else []
        found.append(
            {
                "entry": entry,
                "latest": own.benchmarks.latest(entry.name),
                "records": records[:10] if asks.sees_all else (),
                "num_records": len(records),
                "runs": runs,
                "text": charts.accuracy_text(runs),
                "is_loaded": entry.name in loaded,
            }
        )
    return page(
        request,
        "models.html",
        models=found,
        sees_all=asks.sees_all,
        registry_problem=own.watched_registry.problem,
    )


@router.get("/models/accuracy.svg")
def accuracy(
    request: Request, model: str, theme: Theme = Theme.LIGHT, width: Width = Width.WIDE
) -> Response:
    """Predicted against actual times of a model's runs, which are everybody's."""
    own = services(request)
    _require_sees_all(caller(request))
    entry = own.registry.get(model)
    runs = charts.runs_of(own.benchmarks.all(entry.name))
    return Response(charts.draw_accuracy(runs, Look(theme, width)), 200, SVG_HEADERS, SVG)


def _require_sees_all(asks: Caller) -> None:
    if not asks.sees_all:
        raise Forbidden("The runs of a model are everybody's; this needs the scope 'admin'.")


@router.get("/machine")
def machine(request: Request) -> Response:
    """The workers and the device."""
    own, asks = services(request), caller(request)
    crew = present_crew(own)
    now = own.clock()
    workers = [
        {
            "id": worker.id,
            "host": worker.host.partition("/")[0],
            "pid": worker.pid,
            "state": worker.state,
            "model": worker.model,
            "batch_id": _visible_batch(own, worker.batch_id, asks),
            "is_alive": worker in crew.alive,
            "engine": worker.engine if worker in crew.alive and worker.model else None,
            "started_at": worker.started_at,
            "heard_s": max((now - worker.heartbeat_at).total_seconds(), 0.0),
        }
        for worker in own.store.list_workers()
    ]
    return page(request, "machine.html", workers=workers, reading=device(request).read(), crew=crew)


def _visible_batch(own: Services, batch_id: str | None, asks: Caller) -> str | None:
    """The id, if it is the caller's to know."""
    if batch_id is None:
        return None
    return next(iter(own.store.which_batches([batch_id], seen_by=asks)), None)
