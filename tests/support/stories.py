"""A world for stories of batches: one process, every part one step at a time, a clock to turn.

The API is the real app; validation, housekeeping and the runner are the real ones. Replaced are
only the engine's process (the simulated engine runs here) and the passing of time.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from batch_app import database
from batch_app.api_server import create_app
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus
from batch_app.engine.base import EngineInfo, EngineRequest, EngineStats, Outcome
from batch_app.engine.sim import SimEngine
from batch_app.engine.slot import model_spec
from batch_app.errors import StoreUnavailable
from batch_app.housekeeping import Housekeeping
from batch_app.registry import ModelEntry
from batch_app.routes.services import Services
from batch_app.runner import Runner
from batch_app.store import Store, WorkerRow
from batch_app.validation import Validation

LEASE_S = 30.0
REGISTRY = """
[[model]]
name = "sim"
source = "sim"
engine = "sim"
[[model]]
name = "tiny-context"
source = "sim"
engine = "sim"
[model.engine_args]
max_model_len = 3
"""


class Crash(BaseException):
    """The end of a process, at a chosen place."""


class FragileStore:
    """A store whose caller dies right before, or right after, a batch changes to some state."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.dies_before: BatchStatus | None = None
        self.dies_after: BatchStatus | None = None
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def renew(self, *rest: Any, **values: Any) -> BatchStatus:
        """How far a batch is isn't always told before its worker dies."""
        if self.is_away:
            raise StoreUnavailable("It is away.")
        return self._store.renew(*rest, **values)

    def transition(self, batch: Batch, to: BatchStatus, *rest: Any, **values: Any) -> Batch:
        if to is self.dies_before:
            raise Crash
        changed = self._store.transition(batch, to, *rest, **values)
        if to is self.dies_after:
            raise Crash
        return changed


class HereEngine(SimEngine):
    """Gives one answer at a time; after `answers` of them `event` happens, and no more come."""

    answers: int | None = None
    event: Callable[[], None] = staticmethod(lambda: None)

    def collect(self, timeout_s: float) -> list[Outcome]:
        if self.answers is None:
            return super().collect(timeout_s)
        if not hasattr(self, "ready"):
            self.ready: list[Outcome] = []
        self.ready += super().collect(0.0)
        if self.answers == 0:
            self.answers = -1
            self.event()
        if self.answers < 0:
            threading.Event().wait(0.002)  # what happened has to be noticed elsewhere
            return []
        self.answers -= 1
        outcomes, self.ready = self.ready[:1], self.ready[1:]
        return outcomes


class HereSlot:
    """An engine slot without a process."""

    model: str | None = None
    folder = ""

    def __init__(self) -> None:
        self.answers: int | None = None
        self.event: Callable[[], None] = lambda: None

    def holds(self, entry: ModelEntry) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats()

    def take(
        self,
        entry: ModelEntry,
        say: Callable[[str], None] = lambda _: None,
        ahead: Callable[[], Sequence[EngineRequest]] = tuple,
    ) -> tuple[HereEngine, EngineInfo]:
        engine = HereEngine(model_spec(entry))
        engine.answers, engine.event = self.answers, self.event
        return engine, engine.load()

    def stand_by(self, entry: ModelEntry) -> bool:
        return False

    def lower(self) -> None:
        pass

    def unload(self) -> None:
        pass

    lost = unload


class NoBenchmarks:
    def write(self, record: object) -> None:
        pass

    def latest(self, model: str) -> None:
        return None

    def all(self, model: str | None = None) -> tuple[()]:
        return ()


class World:
    """One server's folder and app; `reset` makes it new for the next story."""

    def __init__(self, root: Path, **settings: Any) -> None:
        (root / "models.toml").write_text(REGISTRY)
        self.settings = Settings(
            data_dir=root / "data",
            models=root / "models.toml",
            benchmarks_dir=root / "benchmarks",
            min_free_bytes=0,
            heartbeat_s=0.004,
            commit_interval_s=0.002,
            lease_s=LEASE_S,
            **settings,
        )
        app = create_app(self.settings)
        app.router.lifespan_context = _nothing_in_the_background
        own: Services = app.state.services
        self.services = app.state.services = replace(own, clock=lambda: self.now)
        self.store, self.data = own.store, own.data
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        # So that /health is content: it misses a worker where batches wait.
        self.store.report_worker(
            WorkerRow("worker", "host", 1, 0.0, self.now, self.now, "idle", None, None)
        )
        self.store.lease_watch.monotonic = self._seconds
        self.client = TestClient(app, base_url="http://localhost")
        self._engine = database.connect(self.settings.resolved_database_url)

    def __enter__(self) -> World:
        self.client.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.client.__exit__(*error)
        self._engine.dispose()
        self.store.close()

    def reset(self) -> None:
        writing = self._engine.connect().execution_options(**{database.WRITES: True})
        with writing as connection, connection.begin():
            for table in reversed(database.metadata.sorted_tables):
                connection.execute(table.delete())
        shutil.rmtree(self.data.batches)
        self.data.create()

    def _seconds(self) -> float:
        return self.now.timestamp()

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def validate(self, dies_before: BatchStatus | None = None) -> bool:
        """One step of validation. Returns whether there was something to do."""
        store = FragileStore(self.store)
        store.dies_before = dies_before
        own = self.services
        work = Validation(
            own.settings,
            own.data,
            store,  # type: ignore[arg-type]
            lambda: own.registry,
            "server",
            own.clock,
        )
        try:
            return work.run_once()
        except Crash:
            return True

    def keep_house(self, dies_before: BatchStatus | None = None) -> bool:
        store = FragileStore(self.store)
        store.dies_before = dies_before
        own = self.services
        work = Housekeeping(
            own.settings,
            own.data,
            store,  # type: ignore[arg-type]
            lambda: own.registry,
            "server",
            own.clock,
        )
        try:
            return work.run_once()
        except Crash:
            return True

    def work(
        self,
        *,
        answers: int | None = None,
        event: Callable[[Batch, threading.Event], None] = lambda batch, stop: None,
        dies_before: BatchStatus | None = None,
        dies_after: BatchStatus | None = None,
        untold: bool = False,
    ) -> str | None:
        """Claim a batch and run it, until it ends or something happens after so many answers.
        `untold`: its progress does not reach the store.

        Returns the batch's id; None where none waited.
        """
        batch = self.store.claim_next("worker", LEASE_S, self.now)
        if batch is None:
            return None
        store, slot, stop = FragileStore(self.store), HereSlot(), threading.Event()
        store.dies_before, store.dies_after, store.is_away = dies_before, dies_after, untold
        slot.answers, slot.event = answers, lambda: event(batch, stop)
        runner = Runner(
            store=store,  # type: ignore[arg-type]
            data=self.data,
            settings=self.settings.model_copy(update={"drain_s": 0.0}),
            slot=slot,  # type: ignore[arg-type]
            benchmarks=NoBenchmarks(),  # type: ignore[arg-type]
            stop=stop,
            clock=lambda: self.now,
        )
        with suppress(Crash):
            runner.run(batch)
        return batch.id


@asynccontextmanager
async def _nothing_in_the_background(app: FastAPI) -> AsyncIterator[None]:
    yield
