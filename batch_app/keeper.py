"""The keeper of a claimed batch: commits its results in groups and keeps its lease.

In a thread of its own, so that neither a slow disk nor a busy database ever holds the engine up.
Progress is told to the store only after the results it counts are on disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Progress, TokenCounts
from batch_app.engine.base import Outcome
from batch_app.errors import BatchAppError, LeaseLost, StoreUnavailable
from batch_app.faults import crash_point
from batch_app.results import ResultsLog
from batch_app.store import Store
from batch_app.wire.lines import error_line, response_line

#: Results that may wait for a commit before `deliver` makes the engine's loop wait too.
MAX_BACKLOG = 20_000
MAX_LOGGED_FAILURES = 1000


@dataclass(frozen=True, slots=True)
class Delivery:
    """One outcome with the id its owner knows it by. `copied`: computed for an equal request."""

    custom_id: str
    outcome: Outcome
    copied: bool = False


class Keeper:
    """Runs from `start` to `stop`. All other methods are for the thread that runs the batch."""

    def __init__(
        self,
        *,
        store: Store,
        batch: Batch,
        log: ResultsLog,
        batch_log: BatchLog,
        settings: Settings,
    ) -> None:
        self._store = store
        self._batch = batch
        self._log = log
        self._batch_log = batch_log
        self._settings = settings
        self._lock = threading.Condition()
        self._backlog: list[Delivery] = []
        self._busy = False
        self._stopping = False
        self._error: BatchAppError | None = None
        self._told = log.progress
        self._store_is_away = False
        self._num_failures_logged = 0
        #: Set when somebody asked for the batch to be cancelled.
        self.cancel_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Hand over finished requests. Waits when the disk is far behind. Raises as `check`."""
        with self._lock:
            self._backlog.extend(deliveries)
            self._lock.notify_all()
            while len(self._backlog) > MAX_BACKLOG and self._error is None:
                self._lock.wait()
        self.check()

    def check(self) -> None:
        """Raise what has gone wrong in the keeper's thread, if anything has.

        Raises:
            LeaseLost: another worker owns the batch; nothing more must be written.
            StorageFull, ResultsLogError: results can't be committed.
        """
        if self._error is not None:
            raise self._error

    def flush(self) -> Progress:
        """Wait until everything delivered is committed, and told. Raises as `check`."""
        with self._lock:
            while (self._backlog or self._busy) and self._error is None:
                self._lock.notify_all()
                self._lock.wait(self._settings.commit_interval_s)
        self.check()
        return self._log.progress

    def stop(self) -> None:
        """End the thread. What was delivered and not flushed may be lost, to be run again."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join()

    # -- the keeper's thread -------------------------------------------------------------------

    def _run(self) -> None:
        next_beat = 0.0
        while True:
            with self._lock:
                if not self._stopping:
                    self._lock.wait(self._settings.commit_interval_s)
                if self._stopping and not self._backlog:
                    return
                deliveries, self._backlog = self._backlog, []
                self._busy = True
                self._lock.notify_all()
            try:
                self._commit(deliveries)
                if self._log.progress != self._told or time.monotonic() >= next_beat:
                    self._tell()
                    next_beat = time.monotonic() + self._settings.heartbeat_s
            except BatchAppError as error:
                self._error = error
                return
            finally:
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()

    def _commit(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            outcome = delivery.outcome
            self._log.append(
                outcome.number,
                outcome.status_code,
                TokenCounts(
                    outcome.prompt_tokens,
                    outcome.completion_tokens,
                    outcome.cached_tokens,
                    outcome.reasoning_tokens,
                ),
                self._line(delivery),
                delivery.copied,
            )
        self._log.commit()
        for delivery in deliveries:
            if delivery.outcome.status_code != 200:
                self._log_failure(delivery)

    def _line(self, delivery: Delivery) -> bytes:
        batch_id, custom_id, outcome = self._batch.id, delivery.custom_id, delivery.outcome
        number, body = outcome.number, outcome.body
        if outcome.error_code:
            return error_line(batch_id, number, custom_id, outcome.error_code, body.decode())
        return response_line(batch_id, number, custom_id, outcome.status_code, body)

    def _tell(self) -> None:
        progress = self._log.progress
        try:
            status = self._store.renew(
                self._batch,
                lease_s=self._settings.lease_s,
                progress=progress,
                goes_on=progress != self._told,
            )
        except StoreUnavailable as error:
            # The results are safe; only the telling waits. Should the lease run out meanwhile and
            # another worker take over, its higher epoch will stop this one.
            if not self._store_is_away:
                self._batch_log.write(f"Waiting for the database: {error.message}")
            self._store_is_away = True
            return
        crash_point("progress-told")
        if self._store_is_away:
            self._batch_log.write("The database answers again.")
            self._store_is_away = False
        self._told = progress
        if status is BatchStatus.CANCELLING:
            self.cancel_requested.set()
        elif status not in (BatchStatus.RUNNING, BatchStatus.FINALIZING):
            raise LeaseLost(f"Batch {self._batch.id} is {status.value} already.")

    def _log_failure(self, delivery: Delivery) -> None:
        self._num_failures_logged += 1
        if self._num_failures_logged > MAX_LOGGED_FAILURES:
            if self._num_failures_logged == MAX_LOGGED_FAILURES + 1:
                self._batch_log.write("More requests failed; the error file has them all.")
            return
        self._batch_log.write(
            f"Request {delivery.custom_id} failed: {failure_reason(delivery.outcome)}"
        )


def failure_reason(outcome: Outcome) -> str:
    """Status, type and field of a failure. The message is left out unless it only speaks of
    lengths: messages may repeat what the request said, and that never stands in a log."""
    if outcome.error_code:
        return outcome.error_code
    try:
        error = orjson.loads(outcome.body)["error"]
        kind, param, message = error.get("type"), error.get("param"), str(error.get("message"))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return f"status {outcome.status_code}"
    reason = f"status {outcome.status_code}, {kind}"
    if param:
        reason += f", {param}"
    if "context length" in message and "input tokens" in message:
        reason += f": {message[:300]}"
    return reason
