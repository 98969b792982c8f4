"""For those who run the server: is it alive, and can it do its work?"""

from __future__ import annotations

import shutil

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from batch_app import __version__
from batch_app.errors import StorageFull, StoreUnavailable
from batch_app.metrics import CONTENT_TYPE, Reading, exposition
from batch_app.routes.answers import refusals
from batch_app.routes.services import Services, services

router = APIRouter(tags=["operation"])


class AliveBody(BaseModel):
    status: str
    version: str


class ReadyBody(BaseModel):
    """`status` is `ok` or `unavailable`; `checks` says of each part `ok` or what is wrong."""

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
    """The database answers and there is room for uploads."""
    return _readiness(services(request))


@router.get("/health", response_model=ReadyBody, responses={503: {"model": ReadyBody}})
def health(request: Request) -> Response:
    """The same as /readyz, under the name that most probes look for."""
    return _readiness(services(request))


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
        free_bytes=shutil.disk_usage(own.data.root).free,
        heartbeat_s=own.settings.heartbeat_s,
        now=own.clock(),
    )
    return Response(exposition(reading), headers={"content-type": CONTENT_TYPE})


def _readiness(own: Services) -> Response:
    checks = {"database": "ok", "disk": "ok"}
    try:
        own.store.ping()
    except (StoreUnavailable, StorageFull):
        checks["database"] = "does not answer"
    free_bytes = shutil.disk_usage(own.data.root).free
    if free_bytes < own.settings.min_free_bytes:
        checks["disk"] = f"less than {own.settings.min_free_bytes} bytes free (min_free_bytes)"
    good = all(state == "ok" for state in checks.values())
    body = ReadyBody(
        status="ok" if good else "unavailable",
        version=__version__,
        checks=checks,
        free_bytes=free_bytes,
    )
    return _json(body, 200 if good else 503)


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")
