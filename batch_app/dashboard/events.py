"""`GET /events`: what a page needs to stay up to date, as server-sent events.

| event | data |
|---|---|
| `batch` | the fields of a `BatchView` that changed hands since the last one, whole |
| `ready` | all that there was has been told; from here on it's news |
| `crew` | `text`: what the workers do |
| `machine` | readings of the machine, where the page asked for them |
| `trouble` | `text`: the store does not answer; empty when it does again |
| `beat` | every look: the stream is alive |
| `end` | the server stops |
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from batch_app.dashboard.device import Device
from batch_app.dashboard.feed import Feed, Seen
from batch_app.json_lines import escape_line_separators
from batch_app.keys import Caller
from batch_app.routes.services import caller, checked_batch_id, services

router = APIRouter(include_in_schema=False)

HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # proxies would hold events back
}


def feed(request: Request) -> Feed:
    """The app's feed."""
    found = request.app.state.feed
    assert isinstance(found, Feed)
    return found


def device(request: Request) -> Device:
    found = request.app.state.device
    assert isinstance(found, Device)
    return found


@router.get("/events")
async def events(
    request: Request, batch: str | None = Query(None), machine: bool = Query(False)
) -> Response:
    own, asks = services(request), caller(request)
    if batch is not None:
        batch = checked_batch_id(batch)
        await run_in_threadpool(own.store.get_batch, batch, seen_by=asks)
    content = stream(
        feed(request),
        asks,
        own.stopping.is_set,
        batch_id=batch,
        machine=device(request) if machine else None,
    )
    return StreamingResponse(content, headers=HEADERS, media_type="text/event-stream")


async def stream(
    source: Feed,
    asks: Caller,
    is_stopping: Callable[[], bool],
    *,
    batch_id: str | None = None,
    machine: Device | None = None,
) -> AsyncIterator[bytes]:
    """The events of one page, until the server stops or the client goes away."""
    told: dict[str, Seen] = {}
    crew_told = trouble_told = ""
    number, is_first = 0, True
    async with source.watched():
        yield b"retry: 2000\n\n"
        while not is_stopping():
            look = await source.next(number)
            if look is None:
                yield event("beat", {})
                continue
            number = look.number
            pieces = []
            if look.trouble != trouble_told:
                trouble_told = look.trouble
                pieces.append(event("trouble", {"text": trouble_told}))
            for seen in look.batches.values():
                its_id = seen.view.id
                if batch_id not in (None, its_id) or not seen.is_visible_to(asks):
                    continue
                if told.get(its_id) != seen:
                    told[its_id] = seen
                    pieces.append(
                        event("batch", {**seen.view.as_event(), "samples": seen.num_samples})
                    )
            if look.crew.text != crew_told:
                crew_told = look.crew.text
                pieces.append(event("crew", {"text": crew_told}))
            if machine is not None:
                reading = await run_in_threadpool(machine.read)
                pieces.append(event("machine", reading.as_event()))
            if is_first and not look.trouble:
                is_first = False
                pieces.append(event("ready", {}))
            pieces.append(event("beat", {}))
            yield b"".join(pieces)
        yield event("end", {})


def event(name: str, data: dict[str, Any]) -> bytes:
    """JSON has no raw line feeds, so whatever stands in it stays within its line."""
    text = escape_line_separators(orjson.dumps(data))
    return b"event: %b\ndata: %b\n\n" % (name.encode(), text)
