"""The worker: claims batches, one at a time, and runs each to its end.

    python -m batch_app.worker

SIGINT or SIGTERM drains: requests in flight get `drain_s` seconds to finish, the batch is given
back, and the process exits with 0. A second signal ends it at once; what is committed stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import psutil

from batch_app import floors, logs, tracing
from batch_app.background import BackgroundThread
from batch_app.batch_log import BatchLog
from batch_app.benchmarks import BenchmarkFolder
from batch_app.cache import evict
from batch_app.clock import DueClock
from batch_app.closing import Closed, close_with_results_so_far
from batch_app.config import Settings, load_settings
from batch_app.core import Batch, BatchStatus, Choice, Paused, PauseKind, Waiting
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.prefetch import Prefetch
from batch_app.engine.process import EngineProcess
from batch_app.engine.slot import EngineSlot
from batch_app.engine.watch import EngineReading, EngineWatch
from batch_app.errors import (
    BatchAppError,
    Conflict,
    LeaseLost,
    NotFound,
    ObjectsUnavailable,
    StorageFull,
    StorageLost,
    StoreUnavailable,
)
from batch_app.failure_policy import Decide, Fail, Pause, decide, to_paused
from batch_app.files import DataDir, new_id, remove_tree
from batch_app.finalize import CANCELLED, Published, Unfinished
from batch_app.lease import HeldLease
from batch_app.machine import Machine, host_identity, process_lives, this_machine
from batch_app.objects import open_objects
from batch_app.orphans import remove_orphans
from batch_app.pause_watch import PauseWatch
from batch_app.queue import choose
from batch_app.registry_watch import WatchedRegistry
from batch_app.runner import Runner
from batch_app.service import ServiceNotifier
from batch_app.shared_files import remove_work, share_log
from batch_app.stop_signals import StopSignals
from batch_app.store import Store, WorkerRow
from batch_app.wakeup import WakeupFile

logger = logging.getLogger(__name__)

LINE = "=" * 80
EXIT_AT_ONCE = 130
#: Worker and engine yield to the API server where all share few cores: a batch that runs for hours
#: doesn't notice, somebody who asks for its status does. Not with a GPU: the engine inherits it,
#: and the GPU would wait for the processor.
NICENESS_ON_CPU = 5
#: How soon a data folder that couldn't be used is looked at again, and how often at most the queue.
LOOK_AT_FOLDER_S, SHORTEST_LOOK_S = 1.0, 0.05
#: A process that stands ready for a batch which then didn't come takes memory for nothing.
STAND_DOWN_S = 60.0
TIDY_EVERY_S, TIDY_STOP_S = 600.0, 5.0
#: To write the files of a batch that met a defect; its keeper, which renews the lease, has ended.
CLOSING_LEASE_S = 300.0


class Worker:
    """One worker process's work. `stop` may be set from any thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        stop: threading.Event,
        clock: Callable[[], datetime] | None = None,
        ready: EngineProcess | None = None,
        decide: Decide = decide,
    ) -> None:
        """`ready`: an engine process that was started already, for the first model. `decide`:
        what errors mean for their batch."""
        clock = clock or DueClock()
        self.id = new_id("worker")
        self._settings = settings
        self._stop = stop
        self._clock = clock
        self._data = DataDir(settings.data_dir, open_objects(settings))
        self._data.create()
        self._store = Store(settings.resolved_database_url)
        self._store.migrate()
        self._registry = WatchedRegistry(settings.models)
        self._slot = EngineSlot(
            settings,
            self._data.engine_log,
            stop.is_set,
            LoweredLimits(self._data.lowered_limits_file),
            self._count_load,
            self._count_lost,
            ready,
        )
        self._watch = EngineWatch(self._slot)
        self._benchmarks = BenchmarkFolder(settings.benchmarks_dir)
        self._prefetch = Prefetch()
        self._runner = Runner(
            store=self._store,
            data=self._data,
            settings=settings,
            slot=self._slot,
            benchmarks=self._benchmarks,
            stop=stop,
            clock=clock,
            prefetch=self._prefetch,
            next_model=self._next_model,
            registry=self._registry,
            decide=decide,
        )
        self._listener = self._store.queue_listener()
        self._wakeup = self._listener or WakeupFile(self._data.wakeup_file)
        self._notifier = ServiceNotifier()
        self._started_at = clock()
        self._batch_id: str | None = None
        self._pauses = PauseWatch(self._started_at, self._registry.entry_fingerprint)
        self._trouble: str | None = None  # of the data folder
        self._tidying = BackgroundThread("cache", self._tidy, TIDY_EVERY_S)
        #: Still to be given back: what `Store.pause` is told.
        self._kept: tuple[Batch, Paused, int] | None = None

    def run(self) -> None:
        """Work until `stop` is set."""
        heart = threading.Thread(target=self._beat, name="heart", daemon=True)
        heart.start()
        if self._data.objects is not None:
            self._tidying.start()
        self._notifier.ready()
        try:
            self._sweep_work_dirs()
            idle_since = time.monotonic()
            while not self._stop.is_set():
                batch = self._claim()
                if batch is not None:
                    self._work_on(batch)
                    idle_since = time.monotonic()
                    continue
                idle_s = time.monotonic() - idle_since
                if self._settings.idle_unload_s and idle_s > self._settings.idle_unload_s:
                    self._slot.unload()
                if idle_s > STAND_DOWN_S:
                    self._slot.stand_down()
                self._wakeup.wait(self._next_look_s(), self._stop)
        finally:
            self._notifier.stopping()
            self._prefetch.stop()
            self._slot.close()
            self._stop.set()
            heart.join()
            self._tidying.stop(TIDY_STOP_S)
            self._leave()

    # -- the queue -----------------------------------------------------------------------------

    def _next_look_s(self) -> float:
        """Seconds to wait for a wake-up: no longer than until the next pause ends."""
        longest_s = self._settings.poll_interval_s
        if self._trouble is not None:
            longest_s = min(longest_s, LOOK_AT_FOLDER_S)
        if self._pauses.next_look_s is not None:
            longest_s = min(longest_s, max(self._pauses.next_look_s, SHORTEST_LOOK_S))
        return longest_s

    def _claim(self) -> Batch | None:
        try:
            self._give_back()
        except (StoreUnavailable, StorageFull) as error:
            logger.warning("Can't give a batch back: %s", error.message)
            return None
        trouble = self._data.trouble()
        if trouble != self._trouble:
            logger.warning("%s", trouble or "The data folder can be used again.")
            self._trouble = trouble
        if trouble:
            return None  # a batch would only meet the same, perhaps after minutes of loading
        try:
            self._release_dead_workers()
            now = self._clock()
            return self._store.claim_next(
                self.id, self._settings.lease_s, now, pick=lambda waiting: self._pick(waiting, now)
            )
        except (StoreUnavailable, StorageFull) as error:
            logger.warning("Can't look at the queue: %s", error.message)
            return None

    def _pick(self, waiting: Sequence[Waiting], now: datetime) -> Choice | None:
        return choose(
            self._pauses.ready(waiting, now),
            loaded_model=self._slot.model,
            now=now,
            bound_s=self._settings.max_passed_over_s,
            run_s=self._expected_run_s,
        )

    def _next_model(self) -> str | None:
        try:
            now = self._clock()
            return self._store.next_model(lambda waiting: self._pick(waiting, now))
        except (StoreUnavailable, StorageFull):
            return None

    def _expected_run_s(self, batch: Waiting) -> float | None:
        return self._runner.expected_run_s(batch)

    def _release_dead_workers(self) -> None:
        """A worker of this machine whose process is gone can't object: its batches are free now,
        not when their leases run out."""
        for worker in self._store.list_workers():
            if worker.host != host_identity() or worker.id == self.id:
                continue
            if process_lives(worker.pid, worker.process_started_at):
                continue
            num_batches = self._store.release_dead(worker.id)
            self._store.forget_worker(worker.id)
            if num_batches:
                logger.warning("Worker %s is gone; its batch goes on here.", worker.id)

    def _work_on(self, batch: Batch) -> None:
        _say(f"▶ {batch.id}: {batch.total:,} requests, model {batch.model}")
        self._batch_id = batch.id
        batch_log = BatchLog(self._data.log_file(batch.id))
        try:
            with tracing.span("batch run", batch.id, model=batch.model, requests=batch.total):
                self._runner.run(batch)
            _say(f"■ {batch.id}: {self._status(batch)}")
        except LeaseLost as error:
            _say(f"■ {batch.id}: {error.message}")
            batch_log.write(f"Worker {self.id} lost this batch to another one.")
        except Exception as error:  # noqa: BLE001 - decided on there, and logged
            # Whatever it is, it must not stop the queue.
            self._fail_or_pause(batch, batch_log, error)
        finally:
            self._batch_id = None

    def _fail_or_pause(self, batch: Batch, batch_log: BatchLog, error: Exception) -> None:
        current = batch
        with contextlib.suppress(BatchAppError):  # it has told its progress since it was claimed
            current = self._store.get_batch(batch.id)
        try:
            self._data.require_present()
        except StorageLost as lost:  # whatever came of it
            error = lost
        decision = self._runner.decide(error, current, self._runner.model)
        is_defect = isinstance(decision, Fail) or decision.kind is PauseKind.INTERNAL
        if is_defect:
            logger.error("Batch %s met an error.", batch.id, exc_info=error)
        if isinstance(decision, Fail):
            with contextlib.suppress(OSError):
                batch_log.write(f"Failed: {decision.message}")
            self._fail(batch, batch_log, decision.message)
        else:
            self._pause(batch, current, batch_log, decision)

    def _pause(self, batch: Batch, current: Batch, batch_log: BatchLog, decision: Pause) -> None:
        paused, num_pauses = to_paused(
            decision,
            current,
            self._clock(),
            first_s=self._settings.pause_first_s,
            longest_s=self._settings.pause_longest_s,
            entry_of=self._registry.entry_fingerprint,
        )
        until = "until its entry in the model registry changes"
        if paused.retry_at is not None:
            until = f"for {(paused.retry_at - paused.since).total_seconds():.0f} s"
        _say(f"■ {batch.id}: paused {until}: {paused.reason}")
        try:
            batch_log.write(f"Paused {until} ({paused.kind}): {paused.reason}")
        except OSError:
            logger.warning("The log of %s can't be written either.", batch.id)
        share_log(self._data, batch.id)
        self._kept = (batch, paused, num_pauses)
        try:
            self._give_back()
        except (BatchAppError, OSError):
            logger.warning("%s is given back when the database answers.", batch.id)

    def _give_back(self) -> None:
        if self._kept is not None:
            with contextlib.suppress(LeaseLost, NotFound):
                self._store.pause(*self._kept)
            self._kept = None

    def _fail(self, batch: Batch, batch_log: BatchLog, message: str) -> None:
        """End a batch that met a defect of ours, with its results so far."""
        to, unfinished = BatchStatus.FAILED, Unfinished("batch_failed", message)
        try:
            status = self._store.renew(batch, lease_s=CLOSING_LEASE_S)
            if status is BatchStatus.CANCELLING:
                to, unfinished = BatchStatus.CANCELLED, CANCELLED
            with HeldLease(self._store, batch, lease_s=CLOSING_LEASE_S):
                closed = self._close(self._store.get_batch(batch.id), unfinished)
            self._store.transition(
                batch,
                to,
                self._clock(),
                **closed.for_store(),
                error_message=message if to is BatchStatus.FAILED else None,
            )
            share_log(self._data, batch.id)
            remove_work(self._data, batch.id)
        except Conflict as error:
            # It was cancelled just now. Housekeeping ends what nobody has.
            self._pause(batch, batch, batch_log, Pause(PauseKind.INTERNAL, error.message))
        except (
            StorageFull,
            StorageLost,
            StoreUnavailable,
            ObjectsUnavailable,
            OSError,
        ) as error:
            decision = decide(error, batch)
            assert isinstance(decision, Pause)
            self._pause(batch, batch, batch_log, decision)
        except BatchAppError as error:
            logger.warning("Can't mark %s as %s: %s", batch.id, to.value, error.message)

    def _close(self, batch: Batch, unfinished: Unfinished) -> Closed:
        """Publish what there is; where the defect is met again, nothing."""
        try:
            return close_with_results_so_far(
                batch,
                unfinished,
                data=self._data,
                settings=self._settings,
                registry=self._registry.current,
                now=self._clock(),
            )
        except (StorageFull, StorageLost, ObjectsUnavailable, OSError) as error:
            if not isinstance(error, FileNotFoundError):
                raise
            logger.exception("The results of %s can't be published.", batch.id)
        except Exception:
            logger.exception("The results of %s can't be published.", batch.id)
        return Closed(Published(None, None), batch.progress)

    def _status(self, batch: Batch) -> str:
        try:
            now = self._store.get_batch(batch.id)
        except (NotFound, StoreUnavailable):
            return "done"
        what = now.status.value if now.is_terminal else "given back"
        return f"{what}, {now.progress.done:,} of {now.total:,} done"

    def _sweep_work_dirs(self) -> None:
        """Remove the work folders of batches that ended while nobody was left to clean up."""
        for folder in (self._data.batches / "active").iterdir():
            try:
                if self._store.get_batch(folder.name).is_terminal:
                    remove_tree(folder)
            except NotFound:
                continue  # an upload on its way
            except StoreUnavailable:
                return

    def _tidy(self) -> bool:
        """Without a shared folder there may be no server here that does it: what was deleted
        elsewhere goes here too, and copies that were not used for long."""
        kept_s = self._settings.retention_log_s
        ended_before = self._clock() - timedelta(seconds=kept_s) if kept_s else None
        remove_orphans(self._data, self._store, logs_ended_before=ended_before)
        evict(self._data, self._settings.storage_cache_bytes)
        return False

    def _count_load(self, model: str, load_s: float | None) -> None:
        try:
            self._store.count_load(model, load_s)
        except (StoreUnavailable, StorageFull) as error:
            logger.warning("Can't count a load of %s: %s", model, error.message)

    def _count_lost(self, model: str) -> None:
        try:
            self._store.count_engine(model, num_lost=1)
        except (StoreUnavailable, StorageFull) as error:
            logger.warning("Can't count an engine of %s that ended: %s", model, error.message)

    # -- signs of life -------------------------------------------------------------------------

    def _beat(self) -> None:
        while True:
            try:
                self._report()
            except (StoreUnavailable, StorageFull) as error:
                logger.warning("Can't report to the store: %s", error.message)
            # What this can't show, a main thread that is stuck, the engine's own watch and
            # `engine_hang_s` are for; a lease that isn't renewed is for the other workers.
            self._notifier.alive()
            if self._stop.wait(self._settings.heartbeat_s):
                return

    def _report(self) -> None:
        reading = self._watch.read()
        self._store.report_worker(self._row(reading))
        if reading is not None and (counts := self._watch.counts()):
            self._store.count_engine(reading.model, **counts)
            self._watch.counted()

    def _row(self, reading: EngineReading | None) -> WorkerRow:
        batch_id = self._batch_id
        return WorkerRow(
            id=self.id,
            host=host_identity(),
            pid=os.getpid(),
            process_started_at=psutil.Process().create_time(),
            started_at=self._started_at,
            heartbeat_at=self._clock(),
            state="working" if batch_id else "idle",
            model=self._slot.model,
            batch_id=batch_id,
            engine=None if reading is None else reading.figures(),
        )

    def _leave(self) -> None:
        try:
            self._store.forget_worker(self.id)
        except BatchAppError as error:
            logger.warning("Can't sign off: %s", error.message)
        if self._listener is not None:
            self._listener.close()
        self._store.close()


def _say(message: str) -> None:
    logs.say(f"{datetime.now().astimezone():%H:%M:%S} {message}", as_json=message)


def _print_banner(settings: Settings) -> None:
    lines = [
        LINE,
        "🚀 BATCH WORKER STARTED",
        LINE,
        f"Poll interval: {settings.poll_interval_s:g}s",
        "Waiting for jobs...",
        LINE,
    ]
    logs.say("\n".join(lines), as_json="The worker has started and waits for batches.")


def niceness(machine: Machine) -> int:
    """How much nicer than others the worker is, and with it the engine."""
    return NICENESS_ON_CPU if machine.device_type == "cpu" else 0


def run_worker(settings: Settings) -> int:
    """Run a worker in this process until a signal ends it. Returns the exit code."""
    logs.set_up(settings.log_format)
    with contextlib.suppress(OSError):
        os.nice(niceness(this_machine()))
    stop = threading.Event()

    def on_signal() -> None:
        stop.set()  # before it is said: who then signals once more is understood
        _say("Stopping: finishing what is in flight. Once more to stop at once.")

    # At the second, the engine process ends itself: its channel closes.
    with StopSignals(on_signal, exit_code=EXIT_AT_ONCE):
        worker = Worker(settings, stop=stop)
        _print_banner(settings)
        for warning in floors.warnings(floors.WORKER_FLOORS):
            logger.warning("%s", warning)
        tracing.set_up(settings.otlp_endpoint, "vllm-batch-worker")
        worker.run()
        tracing.shut_down()
    _say("Stopped.")
    return 0


def main(settings: Settings | None = None) -> int:
    """The process: prints the banner, works, and returns its exit code."""
    try:
        return run_worker(settings or load_settings())
    except BatchAppError as error:
        logs.say_error(f"error: {error.message}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
