"""The lives of the engine: requests of one model run to their end, however often it has to start.

A death costs the requests in flight, and only their time: what is delivered is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.engine.base import Engine, EngineInfo
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineDied, EngineHung, EngineLoadError
from batch_app.keeper import Delivery, Keeper
from batch_app.planner import Numbers
from batch_app.registry import ModelEntry
from batch_app.results import ResultsLog
from batch_app.window import Stopped, Window

RETRY_LOAD_S = 2.0

Deliver = Callable[[list[Delivery], int], None]


class MakeWindow(Protocol):
    """A window on this engine, with so many requests in flight at most."""

    def __call__(self, engine: Engine, size: int, deliver: Deliver) -> Window: ...


class Lives:
    """Runs requests through as many lives of the engine as it takes. One claim of one batch."""

    def __init__(
        self,
        *,
        slot: EngineSlot,
        settings: Settings,
        log: ResultsLog,
        batch_log: BatchLog,
        keeper: Keeper,
        make_window: MakeWindow,
        deliver: Deliver,
        stop: threading.Event,
    ) -> None:
        self._slot = slot
        self._settings = settings
        self._log = log
        self._batch_log = batch_log
        self._keeper = keeper
        self._make_window = make_window
        self._pass_on = deliver
        self._stop = stop
        self._num_answers = 0
        #: Of the engine that ran last.
        self.info: EngineInfo | None = None
        #: Seconds in which requests were in flight.
        self.inference_s = 0.0

    def run(self, entry: ModelEntry, numbers: Numbers) -> None:
        """Run these requests, in this order.

        Raises:
            EngineError: it can't be loaded, or was started too often without a result.
            Stopped, Cancelled and the like: as `Window.run`.
        """
        restarts_in_vain = 0
        while True:
            answers_before = self._num_answers
            try:
                self._live(entry, numbers)
                return
            except (EngineDied, EngineHung, EngineLoadError) as error:
                self._slot.unload()
                if isinstance(error, EngineLoadError) and not error.retriable:
                    raise
                if self._num_answers > answers_before:
                    restarts_in_vain = 0
                restarts_in_vain += 1
                if restarts_in_vain > self._settings.max_engine_restarts:
                    raise
                self._batch_log.write(f"{error.message} Starting the engine again.")
                if self._stop.wait(RETRY_LOAD_S * (restarts_in_vain - 1)):
                    raise Stopped from None
                self._keeper.flush()
                numbers = numbers[[not self._log.is_done(int(n)) for n in numbers]]

    def _live(self, entry: ModelEntry, numbers: Numbers) -> None:
        engine, info = self._load(entry)
        size = max(1, int(info.max_num_seqs * self._settings.window_factor))
        window = self._make_window(engine, size, self._deliver)
        started = time.monotonic()
        try:
            window.run(numbers)
        finally:
            self.inference_s += time.monotonic() - started

    def _load(self, entry: ModelEntry) -> tuple[Engine, EngineInfo]:
        loaded = self._slot.holds(entry)
        if not loaded:
            self._batch_log.write(f"Loading {entry.name} ({entry.engine}).")
        engine, info = self._slot.take(entry)
        self.info = info
        if not loaded:
            self._batch_log.write(
                f"{entry.name} loaded in {info.load_s:.1f} s on {info.device} "
                f"({info.engine} {info.engine_version})."
            )
        return engine, info

    def _deliver(self, deliveries: list[Delivery], num_in_flight: int) -> None:
        self._num_answers += len(deliveries)
        self._pass_on(deliveries, num_in_flight)
