"""The lives of the engine: requests of one model run to their end, however often it has to start.

A death costs the requests in flight, and only their time: what is delivered is done. Whoever was in
flight becomes a suspect and runs last, apart from the others (`suspects`), until the one that kills
the engine is found, or all have their answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from batch_app import tracing
from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.copies import Copies
from batch_app.engine.base import Engine, EngineInfo, EngineRequest, Outcome
from batch_app.engine.limits import in_words, told
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineDied, EngineError, EngineHung, EngineLoadError, EngineOutOfMemory
from batch_app.faults import crash_point
from batch_app.keeper import Delivery, Keeper
from batch_app.planner import Duplicates, Group, Numbers
from batch_app.registry import ModelEntry
from batch_app.results import ResultsLog
from batch_app.suspects import DEATHS_ALONE, QUARANTINED, Suspects
from batch_app.window import Check, Window

LONGEST_BACKOFF_S = 60.0
#: More requests than this that kill the engine say that something else is wrong.
MAX_GUILTY = 100
#: How often the engine is started with less after it ran out of memory.
MAX_SHRINKS = 4
SUSPECTS_FILE = "suspects.json"

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
        work_dir: Path,
        log: ResultsLog,
        batch_log: BatchLog,
        keeper: Keeper,
        make_window: MakeWindow,
        deliver: Deliver,
        custom_id: Callable[[int], str],
        copies: Copies,
        check: Check,
        stop: threading.Event,
        first: Callable[[Numbers], Sequence[EngineRequest]] = lambda _: (),
        on_engine: Callable[[ModelEntry, EngineInfo], None] = lambda *_: None,
    ) -> None:
        """`first`: of these numbers, what an engine is told while it loads. `on_engine` is called
        whenever an engine is there, and nothing in flight yet."""
        self._first = first
        #: Until an engine didn't load: a request that it prepared may have been why.
        self._tells_first = True
        self._on_engine = on_engine
        self._slot = slot
        self._settings = settings
        self._batch_id = work_dir.name
        self._suspects_path = work_dir / SUSPECTS_FILE
        self._suspects = Suspects.load(self._suspects_path)
        self._log = log
        self._batch_log = batch_log
        self._keeper = keeper
        self._make_window = make_window
        self._pass_on = deliver
        self._custom_id = custom_id
        self._copies = copies
        self._check = check
        self._stop = stop
        self._num_guilty = 0
        self._num_shrinks = 0
        self._deaths_in_a_row = 0  # without an answer in between
        self._longest_search = 0
        #: Of the engine that ran last.
        self.info: EngineInfo | None = None
        self.num_deaths = 0
        #: Seconds in which requests were in flight.
        self.inference_s = 0.0

    def run(self, entry: ModelEntry, group: Group) -> None:
        """Run what this group still lacks, in its order.

        Raises:
            EngineError: it can't be loaded, or was started too often without an answer.
            EngineUnavailable: the server that has the model doesn't work.
            StorageFull, OSError: who is a suspect can't be written down.
            Stopped, Cancelled and the like: as `Window.run`.
        """
        self._num_shrinks = 0
        while True:
            numbers = self._without_the_guilty(group)
            if not len(numbers):
                return
            suspected = np.isin(numbers, self._suspects.numbers)
            beside = not suspected.all()
            if beside:
                numbers = numbers[~suspected]
            else:
                numbers = np.array(self._suspects.next_group(set(numbers.tolist())), dtype=np.int64)
                self._batch_log.write(
                    f"Now, apart from the others, {len(numbers):,} of those in flight when it died."
                )
            try:
                self._live(entry, numbers, group.waiting, beside=beside)
            except EngineOutOfMemory as error:
                self._shrink()
                self._count_death(error)
            except (EngineDied, EngineHung) as error:
                self._count_death(error)
            except EngineLoadError as error:
                if not error.retriable:
                    raise
                self._count_death(error)

    # -- one life ------------------------------------------------------------------------------

    def _live(
        self, entry: ModelEntry, numbers: Numbers, waiting: Duplicates, *, beside: bool
    ) -> None:
        engine, info = self._load(entry, numbers if beside else numbers[:0])
        size = max(1, int(info.max_num_seqs * self._settings.window_factor))
        window = self._make_window(engine, size, self._deliver)
        started = time.monotonic()
        try:
            window.run(numbers, waiting, with_shared=info.max_replicas > 1)
        except EngineOutOfMemory:
            if info.max_num_seqs < 2 or self._num_shrinks >= MAX_SHRINKS:
                self._suspect(window, beside=beside)
            raise
        except (EngineDied, EngineHung):
            self._suspect(window, beside=beside)
            raise
        finally:
            self.inference_s += time.monotonic() - started

    def _load(self, entry: ModelEntry, numbers: Numbers) -> tuple[Engine, EngineInfo]:
        """The engine, which is going to run these, in this order."""
        loaded = self._slot.holds(entry)
        if not loaded:
            self._batch_log.write(f"Loading {entry.name} ({entry.engine}).")
        if loaded:
            engine, info = self._slot.take(entry, self._batch_log.write)
        else:
            first = partial(self._first, numbers) if self._tells_first else tuple
            with tracing.span("engine load", self._batch_id, model=entry.name):
                try:
                    engine, info = self._slot.take(entry, self._batch_log.write, first)
                except EngineError:
                    self._tells_first = False
                    raise
        self.info = info
        if not loaded:
            precision = "".join(f", {name} {value}" for name, value in info.precision.items())
            self._batch_log.write(
                f"{entry.name} loaded in {info.load_s:.1f} s on {info.device} "
                f"({info.engine} {info.engine_version}{precision}). Limits: {told(info)}."
            )
        self._on_engine(entry, info)
        return engine, info

    def _deliver(self, deliveries: list[Delivery], num_in_flight: int) -> None:
        if deliveries:
            self._deaths_in_a_row = self._longest_search = 0
        self._pass_on(deliveries, num_in_flight)

    # -- deaths --------------------------------------------------------------------------------

    def _suspect(self, window: Window, *, beside: bool) -> None:
        """Write down who was in flight, before anything else is tried."""
        in_flight = window.in_flight
        if not beside:
            self._longest_search = max(self._longest_search, self._suspects.longest_search)
        self._suspects.died(in_flight, beside=beside)
        self._suspects.save(self._suspects_path)
        crash_point("suspects-written")
        if in_flight:
            self._batch_log.write(
                f"{len(in_flight):,} requests were in flight; they run again, after the others."
            )

    def _count_death(self, error: EngineError) -> None:
        """Get ready for another start.

        Raises the error where there were too many, and what `check` raises while it waits.
        """
        self._slot.lost()
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > self._settings.max_engine_restarts + self._longest_search:
            raise EngineError(
                f"The engine ended {self._deaths_in_a_row} times without an answer in between "
                f"(max_engine_restarts). The last time: {error.message}"
            ) from error
        self._batch_log.write(f"{error.message} Starting the engine again.")
        if self._deaths_in_a_row > 1:
            wait_s = self._settings.engine_backoff_s * 2.0 ** (self._deaths_in_a_row - 2)
            deadline = time.monotonic() + min(wait_s, LONGEST_BACKOFF_S)
            while (remaining := deadline - time.monotonic()) > 0:
                self._check(draining=False)
                self._stop.wait(min(remaining, 1.0))
        self._check(draining=False)

    def _shrink(self) -> None:
        """Have the next life begin with smaller limits, unless that was done often enough."""
        if self._num_shrinks >= MAX_SHRINKS:
            return
        limits = self._slot.lower()
        if limits is not None:
            self._num_shrinks += 1
            self._batch_log.write(
                f"The engine ran out of memory. From now on it gets {in_words(limits)}."
            )

    def _without_the_guilty(self, group: Group) -> Numbers:
        """What this group still lacks, after the guilty have their error lines.

        While the engine has answered nothing at all, that waits: it may die of anything.
        """
        self._keeper.flush()
        self._suspects.forget(self._log.is_done)
        guilty = self._suspects.guilty
        numbers = group.left(self._log.todo())
        if guilty and (self._log.progress.completed or np.isin(numbers, guilty).all()):
            self._quarantine(guilty, group.waiting)
            numbers = group.left(self._log.todo())
        self._suspects.save(self._suspects_path)
        return numbers[~np.isin(numbers, guilty)]

    def _quarantine(self, guilty: list[int], waiting: Duplicates) -> None:
        for number in guilty:
            self._num_guilty += 1
            if self._num_guilty > MAX_GUILTY:
                raise EngineError(
                    f"More than {MAX_GUILTY} requests killed the engine. Something else is wrong."
                )
            custom_id = self._custom_id(number)
            self._batch_log.write(
                f"Request {custom_id} is quarantined: the engine died {DEATHS_ALONE} times with "
                "no other request in flight."
            )
            message = (
                f"The engine died {DEATHS_ALONE} times with only this request in flight. "
                "It was not run again."
            )
            outcome = Outcome(number, 500, message.encode(), error_code=QUARANTINED)
            self._pass_on([Delivery(custom_id, outcome)], 0)
            for deliveries in self._copies.of(outcome, waiting.of(number).tolist()):
                self._pass_on(deliveries, 0)
        self._deaths_in_a_row = 0  # the engine works, but for these
        self._keeper.flush()
        self._suspects.forget(self._log.is_done)
