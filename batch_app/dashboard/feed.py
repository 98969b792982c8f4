"""The feed: one look at the store a second, however many pages are open; none while none is.

Each page's stream takes from a look what its caller may see. So a page costs a comparison, not a
query.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from batch_app.core import TERMINAL, Batch, BatchStatus
from batch_app.dashboard.views import BatchView, Crew, Line, batch_view
from batch_app.errors import BatchAppError
from batch_app.keys import EVERYBODY, Caller
from batch_app.routes.services import Services

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
#: Most unfinished batches that are followed; and of all batches, as many as a page may show.
MAX_FOLLOWED = 500
NEWEST = 100
_UNFINISHED = tuple(status for status in BatchStatus if status not in TERMINAL)


@dataclass(frozen=True, slots=True)
class Seen:
    """One batch at one look. `num_samples`: how long its series is."""

    owner: str | None
    view: BatchView
    num_samples: int

    def is_visible_to(self, caller: Caller) -> bool:
        """The rule of `store.visibility`, for what is in memory already."""
        return caller.sees_all or self.owner == caller.owner


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one time. `number` grows; `trouble`: why nothing could be seen."""

    number: int = 0
    batches: dict[str, Seen] = field(default_factory=dict)
    crew: Crew = field(default_factory=Crew)
    trouble: str = ""


def seen_batches(own: Services, page: list[Batch], crew: Crew) -> list[Seen]:
    """These batches as the pages show them. Asks the store for what goes with them; blocks."""
    now = own.clock()
    names = own.store.file_names({batch.input_file_id for batch in page}, seen_by=EVERYBODY)
    is_line_asked = any(batch.status is BatchStatus.QUEUED for batch in page)
    line = Line.of(own.store.waiting()) if is_line_asked else Line()
    found = []
    for batch, estimate in zip(page, own.estimates(page), strict=True):
        is_running = batch.status is BatchStatus.RUNNING
        samples = own.store.samples(batch.id, seen_by=EVERYBODY) if is_running else []
        view = batch_view(
            own.with_pause(batch),
            estimate,
            name=names.get(batch.input_file_id, ""),
            line=line,
            crew=crew,
            samples=samples,
            now=now,
        )
        found.append(Seen(batch.owner, view, len(samples)))
    return found


def present_crew(own: Services) -> Crew:
    """The workers that show signs of life. Blocks."""
    return Crew.of(own.store.list_workers(), own.settings.heartbeat_s, own.clock())


class Feed:
    """One per app. All but `look` is for the event loop."""

    def __init__(self, own: Services, every_s: float = LOOK_EVERY_S) -> None:
        self._own = own
        self._every_s = every_s
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._latest = Look()

    def look(self, before: Look) -> Look:
        """All unfinished batches, the newest ones, and those that ended since the look before."""
        own = self._own
        crew = present_crew(own)
        unfinished, _ = own.store.list_batches(
            limit=MAX_FOLLOWED, statuses=_UNFINISHED, seen_by=EVERYBODY
        )
        newest, _ = own.store.list_batches(limit=NEWEST, seen_by=EVERYBODY)
        page = {batch.id: batch for batch in (*newest, *unfinished)}
        for batch_id, seen in before.batches.items():
            if batch_id not in page and not seen.view.is_over:
                page[batch_id] = own.store.get_batch(batch_id, seen_by=EVERYBODY)
        fresh, kept = [], {}
        for batch in page.values():
            seen_before = before.batches.get(batch.id)
            if batch.is_terminal and seen_before is not None and seen_before.view.is_over:
                kept[batch.id] = seen_before  # nothing of it changes any more
            else:
                fresh.append(batch)
        # Newest first, as `Services.estimates` asks for.
        fresh.sort(key=lambda batch: batch.created_at, reverse=True)
        found = {one.view.id: one for one in seen_batches(own, fresh, crew)}
        return Look(before.number + 1, kept | found, crew)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While anybody watches, looks are taken."""
        self._watchers += 1
        if self._task is None:
            self._latest = Look(self._latest.number)
            self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0 and self._task is not None:
                self._task.cancel()
                self._task = None

    async def next(self, after: int) -> Look | None:
        """The latest look, if there is a later one than this number within a few seconds."""
        if self._latest.number <= after:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 2 * self._every_s)
        return self._latest if self._latest.number > after else None

    async def _run(self) -> None:
        while True:
            before = self._latest
            try:
                self._latest = await run_in_threadpool(self.look, before)
            except (BatchAppError, OSError) as error:
                message = error.message if isinstance(error, BatchAppError) else str(error)
                self._latest = Look(before.number + 1, before.batches, before.crew, message)
            except Exception:
                # A defect of ours met one batch; the pages must not stand still for good.
                logger.exception("The pages' look at the store failed.")
                self._latest = Look(
                    before.number + 1, before.batches, before.crew, "Something went wrong."
                )
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            await asyncio.sleep(self._every_s)
