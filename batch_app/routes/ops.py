"""For those who run the server: is it alive, and can it do its work?"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from types import MappingProxyType

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from batch_app import __version__
from batch_app.core import BatchStatus
from batch_app.errors import ObjectsUnavailable, StorageFull, StoreLost, StoreUnavailable
from batch_app.metrics import CONTENT_TYPE, Reading, exposition
from batch_app.routes.answers import refusals
from batch_app.routes.services import Services, services
from batch_app.store import LEASED

router = APIRouter(tags=["operation"])

#: Share of `engine_hang_s` after which a silent engine is called hung; at the whole it is killed.
HANGS_AFTER = 0.5
_NEED_A_WORKER = (BatchStatus.QUEUED, *LEASED)


class AliveBody(BaseModel):
    status: str
    version: str


class ReadyBody(BaseModel):
    """`status` is `ok`, `degraded` (it works, and somebody should look) or `unavailable`; `checks`
    says of each part `ok` or what is wrong."""

    status: str
    version: str
    checks: dict[str, str]
    free_bytes: int


@router.get("/livez", response_model=AliveBody)
async def livez() -> Response:
    """The process answers. Asks nothing of the database or the disk."""
    return _json(AliveBody(status="ok", version=__version__))


@router.get("/readyz", response_model=ReadyBody, responses={503: {"model": ReadyBody}})
def readyz(request: Request) -> Response:
    """The database answers, and the object storage if any, and there is room for uploads."""
    return _readiness(services(request))


@router.get("/health", response_model=ReadyBody, responses={503: {"model": ReadyBody}})
def health(request: Request) -> Response:
    """As /readyz, and somebody does the work: a worker lives where one is needed, and no engine
    hangs. `degraded`, with 200, where the model registry can't be read or batches are paused."""
    own = services(request)
    return _readiness(own, _work_checks(own), _concerns(own))


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **refusals(503),
    },
)
def metrics(request: Request) -> Response:
    """Counters and gauges for Prometheus, in its text format."""
    own = services(request)
    reading = Reading(
        totals=own.store.totals(),
        workers=own.store.list_workers(),
        free_bytes=_free_bytes(own),
        heartbeat_s=own.settings.heartbeat_s,
        now=own.clock(),
        deliveries=own.store.count_deliveries(),
    )
    return Response(exposition(reading), headers={"content-type": CONTENT_TYPE})


def _work_checks(own: Services) -> dict[str, str]:
    checks = {"worker": "ok", "engine": "ok"}
    try:
        workers = own.store.list_workers()
        num_batches = own.store.count_batches()
    except (StoreUnavailable, StorageFull):
        return dict.fromkeys(checks, "unknown: the database does not answer")
    now = own.clock()
    alive = [worker for worker in workers if worker.is_alive(now, own.settings.heartbeat_s)]
    if not alive and workers:
        last = max(worker.heartbeat_at for worker in workers)
        checks["worker"] = (
            f"gone: the last sign of life is {(now - last).total_seconds():.0f} s old"
        )
    elif not alive and any(num_batches.get(status, 0) for status in _NEED_A_WORKER):
        checks["worker"] = "none runs, and batches wait"
    longest_s = max(((worker.engine or {}).get("silent_s", 0.0) for worker in alive), default=0.0)
    if longest_s > own.settings.engine_hang_s * HANGS_AFTER:
        checks["engine"] = f"no token for {longest_s:.0f} s, with requests in flight"
    return checks


def _concerns(own: Services) -> dict[str, str]:
    """What keeps batches from running, though the server itself works."""
    concerns = {"registry": "ok", "batches": "ok"}
    problem = own.watched_registry.problem
    if problem is not None:  # anybody may read this: not in which folder it is
        concerns["registry"] = problem.replace(str(own.settings.models), own.settings.models.name)
    try:
        counts, has_keys = own.store.count_paused(), own.access.is_required()
    except (StoreUnavailable, StorageFull):
        concerns["batches"] = "unknown: the database does not answer"
        return concerns
    if counts:
        total = sum(count.num_batches for count in counts)
        kinds = ", ".join(f"{count.num_batches} {count.kind.value}" for count in counts)
        concerns["batches"] = f"{total} paused ({kinds})"
        if not has_keys:  # else reasons are for those who may see the batches
            concerns["batches"] += f": {counts[0].reason}"
    return concerns


def _readiness(
    own: Services,
    more: Mapping[str, str] = MappingProxyType({}),
    concerns: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    checks = {"database": _database_check(own), "disk": _disk_check(own), **more}
    if own.data.objects is not None:
        checks["object_storage"] = "ok"
        try:
            own.data.objects.ping()
        except ObjectsUnavailable as error:
            checks["object_storage"] = error.message
    status = "ok" if all(state == "ok" for state in checks.values()) else "unavailable"
    if status == "ok" and any(state != "ok" for state in concerns.values()):
        status = "degraded"
    body = ReadyBody(
        status=status,
        version=__version__,
        checks=checks | dict(concerns),
        free_bytes=_free_bytes(own),
    )
    return _json(body, 503 if status == "unavailable" else 200)


def _database_check(own: Services) -> str:
    try:
        own.store.ping()
        own.store.require_tables()
    except StoreLost as error:
        return error.message
    except (StoreUnavailable, StorageFull):
        return "does not answer"
    return "ok"


def _disk_check(own: Services) -> str:
    trouble = own.data.trouble()
    if trouble is None and _free_bytes(own) < own.settings.min_free_bytes:
        trouble = f"less than {own.settings.min_free_bytes} bytes free (min_free_bytes)"
    return trouble or "ok"


def _free_bytes(own: Services) -> int:
    """0 where the data folder is gone."""
    try:
        return shutil.disk_usage(own.data.root).free
    except OSError:
        return 0


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")
