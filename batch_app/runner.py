"""The runner: one batch from claim to publication.

Keeps a bounded window of requests in flight and refills it whenever one finishes. Everything here
may be cut off at any point and done again: what has a committed result is never run again, and
publishing twice writes the same files twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from batch_app import tracing
from batch_app.ahead import first_requests
from batch_app.appraisal import planning_of
from batch_app.batch_files import fetch_batch_files, load_index
from batch_app.batch_log import BatchLog, truncated_text
from batch_app.benchmarks import BenchmarkFolder
from batch_app.closing import Closed
from batch_app.config import Settings
from batch_app.copies import Copies, logged_outcome
from batch_app.core import Batch, BatchStatus, Waiting, utc_now
from batch_app.engine.base import Engine, EngineInfo, EngineStats
from batch_app.engine.prefetch import Prefetch
from batch_app.engine.slot import EngineSlot
from batch_app.errors import (
    BatchAppError,
    Conflict,
    EngineError,
    EngineUnavailable,
    ModelNotFound,
    StorageFull,
    StoreUnavailable,
)
from batch_app.failure_policy import Decide, Pause, decide
from batch_app.faults import crash_point
from batch_app.files import DataDir
from batch_app.finalize import CANCELLED, EXPIRED, Unfinished, publish
from batch_app.foresight import Foresight
from batch_app.index import Index
from batch_app.inputs import InputFile
from batch_app.keeper import Delivery, Keeper
from batch_app.lease import HeldLease
from batch_app.lives import Deliver, Lives
from batch_app.measuring import Tally, benchmark_of, reading_of
from batch_app.outlook import Left, Outlook
from batch_app.planner import Group, plan
from batch_app.progress_log import ProgressLog
from batch_app.provenance import model_revision, run_facts, with_run
from batch_app.registry import ModelEntry
from batch_app.registry_watch import WatchedRegistry
from batch_app.result_copies import ResultCopies
from batch_app.results import ResultsLog
from batch_app.shared_files import remove_work, share_log
from batch_app.store import Store
from batch_app.warmup import Warmup
from batch_app.window import Cancelled, Expired, Stopped, Window

logger = logging.getLogger(__name__)
LOOK_FOR_FOLDER_S = 1.0


class Runner:
    """Runs claimed batches, one after the other, on the engine of one slot."""

    def __init__(
        self,
        *,
        store: Store,
        data: DataDir,
        settings: Settings,
        slot: EngineSlot,
        benchmarks: BenchmarkFolder,
        stop: threading.Event,
        clock: Callable[[], datetime] = utc_now,
        prefetch: Prefetch | None = None,
        next_model: Callable[[], str | None] = lambda: None,
        registry: WatchedRegistry | None = None,
        decide: Decide = decide,
    ) -> None:
        """`next_model`: which one the next batch in the queue needs, as it stands now."""
        self.decide = decide
        self._registry = registry or WatchedRegistry(settings.models)
        #: The model that was at work last.
        self.model = ""
        self._prefetch = prefetch or Prefetch()
        self._next_model = next_model
        self._store = store
        self._data = data
        self._settings = settings
        self._slot = slot
        self._benchmarks = benchmarks
        self._stop = stop
        self._clock = clock
        self.outlook = Outlook(lambda: self._registry.current, benchmarks)

    def run(self, batch: Batch) -> None:
        """Work on a batch that was just claimed until it is published, or has to be given back.

        Raises:
            LeaseLost: another worker has it.
            Others: it can't go on. What is committed stays; `failure_policy` says whether the
                caller has to pause the batch or to fail it.
        """
        self.model = batch.model
        self._data.require_present()
        self._data.work_dir(batch.id).mkdir(parents=True, exist_ok=True)
        batch_log = BatchLog(self._data.log_file(batch.id))
        crash_point("claimed")
        batch_log.write(f"Claimed by worker {batch.lease_owner} (claim {batch.epoch}).")
        settings = self._settings
        with HeldLease(
            self._store, batch, lease_s=settings.lease_s, every_s=settings.heartbeat_s
        ) as lease:
            copied = fetch_batch_files(self._data, batch, lease)
            index = load_index(self._data, batch, settings, self._registry.current, batch_log)
            lease.check()
            log = ResultsLog(self._data.work_dir(batch.id), len(index), batch.epoch)
        try:
            if log.progress.done:
                batch_log.write(
                    f"Going on: {log.progress.done:,} of {len(index):,} requests are done."
                )
            if log.num_damaged:
                batch_log.write(
                    f"The results log was damaged in {log.num_damaged} places; "
                    "the requests concerned run again."
                )
            keeper = Keeper(
                store=self._store,
                batch=batch,
                log=log,
                batch_log=batch_log,
                settings=self._settings,
                clock=self._clock,
            )
            copies = ResultCopies(self._data, batch, log, batch_log, self._settings, copied)
            with _running(copies), _running(keeper):
                _Run(self, batch, index, log, batch_log, keeper, copies).to_the_end()
        finally:
            log.close()

    def expected_run_s(self, waiting: Waiting) -> float | None:
        """How long a batch that waits may be expected to run, loading included."""
        return self.outlook.usual_run_s(waiting.model, waiting.num_requests)


@contextmanager
def _running(threads: Keeper | ResultCopies) -> Iterator[None]:
    threads.start()
    try:
        yield
    finally:
        threads.stop()


class _Run:
    """One claim of one batch."""

    def __init__(
        self,
        runner: Runner,
        batch: Batch,
        index: Index,
        log: ResultsLog,
        batch_log: BatchLog,
        keeper: Keeper,
        copies: ResultCopies,
    ) -> None:
        self._copies = copies
        self._runner = runner
        self._settings = runner._settings
        self._batch = batch
        self._index = index
        self._log = log
        self._batch_log = batch_log
        self._keeper = keeper
        self._tally = Tally(index)
        self._entry: ModelEntry | None = None
        self._revision: str | None = None
        self._next_look = 0.0
        self._foresight = Foresight(
            outlook=runner.outlook,
            planning=planning_of(runner.outlook, runner._settings, batch),
            index=index,
            workload=self._workload,
            models=index.models_of(log.todo()),
        )
        self._lives: Lives | None = None
        self._warmup: Warmup | None = None
        self._progress_log = ProgressLog(batch_log, len(index), self._settings.progress_log_s)

    def to_the_end(self) -> None:
        status = self._batch.status
        try:
            if status is BatchStatus.RUNNING:
                self._check(draining=False)
                self._run_groups()
                crash_point("all-run")
                self._move(BatchStatus.FINALIZING)
                crash_point("finalizing")
            elif status is BatchStatus.FINALIZING and len(self._log.todo()):
                self._run_groups()  # a result that was there was damaged meanwhile
            self._finish(BatchStatus.CANCELLED if status is BatchStatus.CANCELLING else None)
        except Cancelled:
            self._keeper.flush()
            self._finish(BatchStatus.CANCELLED)
        except Expired:
            self._keeper.flush()
            self._batch_log.write(
                f"The completion window ({self._batch.completion_window}) is over."
            )
            self._finish(BatchStatus.EXPIRED)
        except Stopped:
            self._give_back()
        except (EngineError, ModelNotFound) as error:
            if isinstance(error, EngineUnavailable):
                self._runner._slot.unload()
            if self._runner._stop.is_set():
                self._give_back()
                return
            self._keeper.flush()
            self._end_or_raise(error)

    def _end_or_raise(self, error: BatchAppError) -> None:
        """Where the error is this batch's end, publish what there is; else the caller pauses it."""
        runner = self._runner
        decision = runner.decide(error, runner._store.get_batch(self._batch.id), runner.model)
        if isinstance(decision, Pause):
            raise error
        self._batch_log.write(f"Failed: {decision.message}")
        self._finish(BatchStatus.FAILED, decision.message)

    # -- running -------------------------------------------------------------------------------

    def _run_groups(self) -> None:
        registry = self._runner._registry.current
        input_path = self._runner._data.input_file(self._batch.input_file_id)
        slot, todo = self._runner._slot, self._log.todo()
        after = dict(pairwise(self._index.models_of(todo)))
        groups = plan(
            self._index,
            todo,
            by_prefix=self._settings.order == "prefix",
            deduplicate=self._settings.deduplicate and self._batch.deduplicate,
            usual_tokens=self._usual_tokens(),
        )
        with InputFile(input_path, self._index) as inputs:
            copies = Copies(self._index, inputs)

            def make_window(engine: Engine, size: int, deliver: Deliver) -> Window:
                return Window(
                    engine,
                    size=size,
                    index=self._index,
                    inputs=inputs,
                    deliver=deliver,
                    check=self._check,
                    drain_s=self._settings.drain_s,
                )

            lives = self._lives = Lives(
                slot=self._runner._slot,
                settings=self._settings,
                work_dir=self._runner._data.work_dir(self._batch.id),
                log=self._log,
                batch_log=self._batch_log,
                keeper=self._keeper,
                make_window=make_window,
                deliver=self._deliver,
                custom_id=lambda number: inputs.request(number).custom_id,
                copies=copies,
                check=self._check,
                stop=self._runner._stop,
                first=partial(
                    first_requests, self._index, inputs, most=self._settings.prepare_ahead
                ),
                on_engine=self._on_engine,
            )
            for group in groups:
                self._runner.model = group.model
                entry = registry.get(group.model)
                self._warmup = None
                self._copy_answers(group, copies)
                self._warmup = Warmup(
                    prefetch=self._runner._prefetch,
                    registry=registry,
                    current=entry,
                    num_requests=len(group.numbers) + len(group.waiting),
                    next_model=partial(self._next_model, after.get(group.model)),
                    say=self._batch_log.write,
                    stand_by=slot.stand_by,
                )
                self._tell(self._foresight.begin(entry, group, loads=not slot.holds(entry)))
                lives.run(entry, group)
        self._keeper.flush()

    def _on_engine(self, entry: ModelEntry, info: EngineInfo) -> None:
        """The engine is there: note on what the batch runs, and begin to watch it."""
        slot, machine = self._runner._slot, self._runner.outlook.machine()
        self._entry, self._revision = entry, model_revision(slot.folder, entry)
        facts = run_facts(entry, info, self._revision, machine)
        self._keeper.provenance = with_run(self._keeper.provenance or self._batch.provenance, facts)
        stats = slot.stats()
        self._tally.begin(info, reading_of(stats, at_s=time.monotonic()))
        self._foresight.loaded(info, stats)

    def _workload(self) -> Sequence[Any] | None:
        """What is known by now of what the batch asks for; it is counted in the background."""
        try:
            return self._runner._store.get_batch(self._batch.id).workload
        except StoreUnavailable:
            return self._batch.workload

    def _tell(self, left: Left | None) -> None:
        if left is not None:
            self._keeper.outlook = msgspec.to_builtins(left)

    def _usual_tokens(self) -> dict[str, int]:
        """By model: the output tokens that few answers of its latest benchmark exceeded."""
        latest = ((model, self._runner._benchmarks.latest(model)) for model in self._index.models)
        return {
            model: record.results.p95_completion_tokens
            for model, record in latest
            if record and record.results.p95_completion_tokens
        }

    def _copy_answers(self, group: Group, copies: Copies) -> None:
        """Give what an earlier claim computed to the requests that ask the same."""
        if group.waiting or group.answered:
            num = len(group.waiting) + len(group.answered)
            self._batch_log.write(
                f"{num:,} of the requests for {group.model} {'repeat' if num > 1 else 'repeats'} "
                "another one's body, and will get its answer."
            )
        for leader in np.unique(group.answered.leaders).tolist():
            outcome = logged_outcome(self._log, leader)
            for deliveries in copies.of(outcome, group.answered.of(leader).tolist()):
                self._check(draining=False)
                self._deliver(deliveries, 0)
        self._keeper.flush()

    def _next_model(self, of_next_group: str | None) -> str | None:
        """Which one runs next: in this batch, else in the queue."""
        return of_next_group or self._runner._next_model()

    def _check(self, *, draining: bool) -> None:
        """Raise whatever should end this run: LeaseLost, a full disk, Cancelled, Stopped."""
        self._keeper.check()
        self._look_for_folder()
        if self._keeper.cancel_requested.is_set():
            raise Cancelled
        ends = self._batch.expires_at if self._batch.status is BatchStatus.RUNNING else None
        if ends and self._runner._clock() >= ends:
            raise Expired
        if self._runner._stop.is_set() and not draining:
            raise Stopped

    def _look_for_folder(self) -> None:
        """Raises StorageLost. What is written into a folder that was removed is lost."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_FOR_FOLDER_S
            self._runner._data.require_present()

    def _deliver(self, deliveries: list[Delivery], num_in_flight: int) -> None:
        if deliveries:
            computed = [one.outcome for one in deliveries if not one.copied]
            self._tally.add(computed)
            self._foresight.finished(computed)
            self._keeper.deliver(deliveries)
        stats = self._runner._slot.stats()
        self._tally.read(stats)
        self._tell(self._foresight.look(stats))
        if self._warmup is not None:
            self._warmup.delivered(len(deliveries))
        self._log_progress(num_in_flight, stats)

    def _log_progress(self, num_in_flight: int, stats: EngineStats) -> None:
        self._progress_log.tell(
            self._log.progress,
            num_in_flight=num_in_flight,
            tokens=self._tally.tokens.total_tokens,
            written=stats.generation_tokens_total,
            prompt_tokens=stats.prompt_tokens_total,
        )

    # -- ending --------------------------------------------------------------------------------

    def _give_back(self) -> None:
        progress = self._keeper.flush()
        self._keeper.stop()
        self._copies.stop()
        self._runner._store.release(self._batch)
        crash_point("given-back")
        self._batch_log.write(
            f"The worker stops: given back with {progress.done:,} of {len(self._index):,} done. "
            "The next worker goes on from here."
        )
        share_log(self._runner._data, self._batch.id)

    def _finish(self, to: BatchStatus | None, message: str | None = None) -> None:
        runner, batch = self._runner, self._batch
        unfinished = CANCELLED if to is BatchStatus.CANCELLED else None
        if to is BatchStatus.EXPIRED:
            unfinished = EXPIRED
        elif to is BatchStatus.FAILED:
            unfinished = Unfinished("batch_failed", message or "The batch failed.")
        started = time.monotonic()
        with tracing.span("finalize", batch.id, requests=len(self._index)):
            published = publish(
                runner._data, batch, self._index, self._log, unfinished, runner._clock()
            )
        crash_point("published")
        closed = Closed(published, self._log.progress)
        tally = self._tally
        to = to or BatchStatus.COMPLETED
        speed = None
        if self._lives and self._lives.inference_s > 0 and tally.tokens.total_tokens:
            speed = tally.tokens.total_tokens / self._lives.inference_s
        self._keeper.stop()
        self._keeper.check()
        batch = self._move(
            to,
            **closed.for_store(),
            throughput_tokens_per_s=speed,
            error_message=message,
            **({} if self._keeper.provenance is None else {"provenance": self._keeper.provenance}),
        )
        crash_point("ended")
        try:
            self._after_the_end(batch, speed, written_s=time.monotonic() - started)
        except Exception:
            # It has ended, and its owner has the files: nothing that follows changes that.
            logger.exception("Batch %s has ended; what comes after that failed.", batch.id)

    def _after_the_end(self, batch: Batch, speed: float | None, *, written_s: float) -> None:
        data, to, progress = self._runner._data, batch.status, batch.progress
        self._batch_log.write(
            f"{to.value.capitalize()}: {progress.completed:,} succeeded, {progress.failed:,} "
            f"failed of {len(self._index):,}; {progress.tokens.total_tokens:,} tokens"
            + (f", {speed:,.0f} tokens/s" if speed else "")
            + (f", {progress.deduplicated:,} deduplicated" if progress.deduplicated else "")
            + (f", {truncated_text(progress.truncated)}" if progress.truncated else "")
            + f". Files written in {written_s:.1f} s."
        )
        if to in (BatchStatus.COMPLETED, BatchStatus.FAILED):
            self._write_benchmark(failed=to is BatchStatus.FAILED)
        self._copies.end()
        share_log(data, batch.id)
        remove_work(data, batch.id)

    def _move(self, to: BatchStatus, **values: Any) -> Batch:
        """Change the batch's state. A wish to cancel that came just now goes first."""
        store, now = self._runner._store, self._runner._clock()
        try:
            return store.transition(self._batch, to, now, **values)
        except Conflict:
            if store.get_batch(self._batch.id).status is not BatchStatus.CANCELLING:
                raise
            if to is BatchStatus.FINALIZING:
                raise Cancelled from None
            return store.transition(self._batch, BatchStatus.CANCELLED, now, **values)

    def _write_benchmark(self, *, failed: bool) -> None:
        tally, lives, runner, entry = self._tally, self._lives, self._runner, self._entry
        if lives is None or lives.info is None or entry is None:
            return
        if not tally.num_succeeded or len(self._index.models) != 1:
            return  # nothing was computed in this claim, or not by one model
        tally.num_deaths = lives.num_deaths
        machine = runner.outlook.machine()
        record = benchmark_of(
            tally,
            self._batch,
            entry,
            lives.info,
            inference_s=lives.inference_s,
            timestamp=runner._clock(),
            machine=machine.name,
            driver=machine.driver,
            model_revision=self._revision,
            prediction=self._foresight.prediction,
            failed=failed,
        )
        try:
            runner._benchmarks.write(record)
        except (OSError, StorageFull) as error:
            # The batch is done whether or not its benchmark could be kept.
            self._batch_log.write(f"The benchmark record was not written: {error}")
