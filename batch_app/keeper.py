"""The keeper of a claimed batch: commits its results in groups and keeps its lease.

In threads of its own, so that neither a slow disk nor a busy database ever holds the engine up, nor
one the other: while the database is locked, results go on being committed; while the disk is slow,
the lease is kept. Progress is told to the store only after the results it counts are on disk.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Progress, TokenCounts, is_success, utc_now
from batch_app.engine.base import Outcome
from batch_app.errors import LeaseLost, StoreUnavailable
from batch_app.faults import crash_point
from batch_app.results import ResultsLog
from batch_app.store import Store
from batch_app.wire.lines import error_line, response_line

#: What a type or a field of an error looks like. Anything else might be a part of a prompt.
_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,100}")
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
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._clock = clock
        #: What the next telling tells: what is left, and what the batch ran on.
        self.outlook: Mapping[str, Any] | None = None
        self.provenance: Mapping[str, Any] | None = None
        self._told_provenance: Mapping[str, Any] | None = None
        self._store = store
        self._batch = batch
        self._log = log
        self._batch_log = batch_log
        self._settings = settings
        self._lock = threading.Condition()
        self._backlog: list[Delivery] = []
        self._busy = False
        self._num_flushing = 0
        self._stopping = False
        self._error: Exception | None = None
        self._told = log.progress
        self._store_is_away = False
        self._num_failures_logged = 0
        #: Set when somebody asked for the batch to be cancelled.
        self.cancel_requested = threading.Event()
        self._all_committed = False  # and nothing more will be
        self._committer = threading.Thread(target=self._commit_all, name="committer", daemon=True)
        self._teller = threading.Thread(target=self._tell_all, name="teller", daemon=True)

    def start(self) -> None:
        self._committer.start()
        self._teller.start()

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Hand over finished requests. Waits when the disk is far behind. Raises as `check`."""
        with self._lock:
            self._backlog.extend(deliveries)
            self._lock.notify_all()
            while len(self._backlog) > MAX_BACKLOG and self._error is None:
                self._lock.wait()
        self.check()

    def check(self) -> None:
        """Raise what has gone wrong in the keeper's threads, if anything has.

        Raises:
            LeaseLost: another worker owns the batch; nothing more must be written.
            StorageFull, ResultsLogError: results can't be committed.
        """
        if self._error is not None:
            raise self._error

    def flush(self) -> Progress:
        """Wait until everything delivered is committed, and told if the database answers.

        Raises as `check`.
        """
        with self._lock:
            self._num_flushing += 1
            while self._is_behind() and self._error is None:
                self._lock.notify_all()
                self._lock.wait(self._settings.commit_interval_s)
            self._num_flushing -= 1
        self.check()
        return self._log.progress

    def stop(self) -> None:
        """End the threads. What was delivered and not flushed may be lost, to be run again."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._committer.join()
        with self._lock:
            self._all_committed = True
            self._lock.notify_all()
        self._teller.join()

    def _is_behind(self) -> bool:
        if self._backlog or self._busy:
            return True
        return self._told != self._log.progress and not self._store_is_away

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    # -- the keeper's threads ------------------------------------------------------------------

    def _commit_all(self) -> None:
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
            except Exception as error:  # noqa: BLE001 - `check` raises it where the batch runs
                self._fail(error)
                return
            finally:
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()

    def _tell_all(self) -> None:
        next_beat = next_tell = 0.0
        while True:
            with self._lock:
                while not self._all_committed and self._error is None:
                    due = next_beat
                    if self._told != self._log.progress and not self._store_is_away:
                        due = 0.0 if self._num_flushing else min(next_beat, next_tell)
                    wait_s = due - time.monotonic()
                    if wait_s <= 0:
                        break
                    self._lock.wait(wait_s)
                if self._error is not None:
                    return
                if self._all_committed and (self._told == self._log.progress):
                    return
                last = self._all_committed
            try:
                self._tell()
            except Exception as error:  # noqa: BLE001 - the same
                self._fail(error)
                return
            with self._lock:
                self._lock.notify_all()
            if last:
                return
            next_beat = time.monotonic() + self._settings.heartbeat_s
            next_tell = time.monotonic() + self._settings.progress_interval_s

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
                outcome.finish_reason,
            )
        self._log.commit()
        for delivery in deliveries:
            if not is_success(delivery.outcome.status_code):
                self._log_failure(delivery)

    def _line(self, delivery: Delivery) -> bytes:
        batch_id, custom_id, outcome = self._batch.id, delivery.custom_id, delivery.outcome
        number, body = outcome.number, outcome.body
        if outcome.error_code:
            return error_line(batch_id, number, custom_id, outcome.error_code, body.decode())
        return response_line(batch_id, number, custom_id, outcome.status_code, body)

    def _tell(self) -> None:
        progress, provenance = self._log.progress, self.provenance
        try:
            status = self._store.renew(
                self._batch,
                lease_s=self._settings.lease_s,
                progress=progress,
                goes_on=progress != self._told,
                at=self._clock(),
                outlook=self.outlook,
                provenance=None if provenance is self._told_provenance else provenance,
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
        self._told, self._told_provenance = progress, provenance
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
    reason = f"status {outcome.status_code}"
    for name in (kind, param):
        if isinstance(name, str) and _NAME.fullmatch(name):
            reason += f", {name}"
    if "context length" in message and "input tokens" in message:
        reason += f": {message[:300]}"
    return reason
