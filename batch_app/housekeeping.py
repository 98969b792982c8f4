"""Housekeeping: what has to happen in time although nobody asks for it.

In each API server, one round every second: batches that have to end (cancelled, or out of time) and
that no worker has in its hands get their files; files and uploads whose time has come are removed.
Now and then it sweeps up what crashes left. Every step may be cut off, done twice, or done by two
servers at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from batch_app.batch_log import BatchLog
from batch_app.cache import evict
from batch_app.closing import close_with_results_so_far
from batch_app.config import Settings
from batch_app.core import (
    Batch,
    BatchStatus,
    FilePurpose,
    PauseKind,
    StoredFile,
    UploadStatus,
    utc_now,
)
from batch_app.errors import Conflict, LeaseLost, NotFound, StorageFull, StoreUnavailable
from batch_app.failure_policy import Fail, Pause, decide, to_paused
from batch_app.faults import crash_point
from batch_app.files import DataDir
from batch_app.finalize import CANCELLED, EXPIRED
from batch_app.lease import HeldLease
from batch_app.object_sweep import remove_orphan_objects
from batch_app.orphans import remove_orphans
from batch_app.registry import ModelRegistry
from batch_app.retention import Retention
from batch_app.shared_files import remove_file, remove_upload, remove_work, share_log
from batch_app.store import Store

logger = logging.getLogger(__name__)

#: To write the files of a batch; renewed for as long as that takes.
LEASE_S = 300.0
#: How long a client may repeat a request under its Idempotency-Key.
KEYS_KEPT = timedelta(days=2)
SWEEP_EVERY = timedelta(minutes=10)
#: A listing of everything.
OBJECT_SWEEP_EVERY = timedelta(hours=1)


@dataclass
class Housekeeping:
    """One round is `run_once`; it raises whatever ended it."""

    settings: Settings
    data: DataDir
    store: Store
    registry: Callable[[], ModelRegistry]
    holder: str
    clock: Callable[[], datetime] = utc_now
    _next_sweep: datetime | None = field(default=None, init=False)
    _next_object_sweep: datetime | None = field(default=None, init=False)

    def run_once(self) -> bool:
        """Do what is due. Returns whether there may be more."""
        closed = self._close_one()
        removed = self._remove_expired_files()
        self._end_expired_uploads()
        self._sweep()
        return closed or removed

    def _close_one(self) -> bool:
        batch = self.store.claim_to_close(self.holder, LEASE_S, self.clock())
        if batch is None:
            return False
        to, unfinished = BatchStatus.EXPIRED, EXPIRED
        if batch.status is BatchStatus.CANCELLING:
            to, unfinished = BatchStatus.CANCELLED, CANCELLED
        try:
            with HeldLease(self.store, batch, lease_s=LEASE_S):
                closed = close_with_results_so_far(
                    batch,
                    unfinished,
                    data=self.data,
                    settings=self.settings,
                    registry=self.registry(),
                    now=self.clock(),
                )
        except LeaseLost:
            return True
        except Exception as error:
            with suppress(LeaseLost, StoreUnavailable, StorageFull):
                self._pause(batch, error)
            raise
        crash_point("closing-published")
        with suppress(LeaseLost, Conflict):
            self.store.transition(batch, to, self.clock(), **closed.for_store())
            BatchLog(self.data.log_file(batch.id), clock=self.clock).write(
                f"{to.value} {'without its worker' if batch.started_at else 'before it started'}: "
                f"{closed.progress.done} of {batch.total} requests are done"
            )
            share_log(self.data, batch.id)
            remove_work(self.data, batch.id)
        return True

    def _pause(self, batch: Batch, error: Exception) -> None:
        """It is closed later; others that have to end don't wait for it."""
        decision = decide(error, batch)
        if isinstance(decision, Fail):
            decision = Pause(PauseKind.INTERNAL, decision.message)
        paused, num_pauses = to_paused(
            decision,
            batch,
            self.clock(),
            first_s=self.settings.pause_first_s,
            longest_s=self.settings.pause_longest_s,
        )
        self.store.pause(batch, paused, num_pauses)

    def _remove_expired_files(self) -> bool:
        now, retention = self.clock(), Retention.of(self.settings)
        expired = self.store.expired_files(now, retention.outlived(now))
        for file in expired:
            # Deleted by somebody else just now, or needed by a batch just created.
            with suppress(NotFound, Conflict):
                self.store.delete_file(file.id, now)
                remove_bytes(self.data, self.store, file)
                logger.info(
                    "Removed %s (%s, %d bytes), made %s: expired %s.",
                    file.id,
                    file.purpose.value,
                    file.size_bytes,
                    file.created_at.isoformat(timespec="seconds"),
                    str(retention.applied_to(file).expires_at),
                )
        return bool(expired)

    def _end_expired_uploads(self) -> None:
        for upload in self.store.expired_uploads(self.clock()):
            if self.store.get_upload(upload.id, self.clock()).status is UploadStatus.EXPIRED:
                remove_upload(self.data, upload.id)

    def _sweep(self) -> None:
        now = self.clock()
        if self._next_sweep is not None and now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_EVERY  # also when this one fails
        self.store.forget_keys(now - KEYS_KEPT)
        if self.settings.retention_webhook_s:
            kept = timedelta(seconds=self.settings.retention_webhook_s)
            self.store.forget_deliveries(now - kept)
        kept_s = self.settings.retention_log_s
        ended_before = now - timedelta(seconds=kept_s) if kept_s else None
        num_removed = self.data.sweep_incoming() + remove_orphans(
            self.data, self.store, logs_ended_before=ended_before
        )
        if num_removed:
            logger.info("Removed %d files and folders that nothing needs any more.", num_removed)
        evict(self.data, self.settings.storage_cache_bytes)
        if self._next_object_sweep is None or now >= self._next_object_sweep:
            self._next_object_sweep = now + OBJECT_SWEEP_EVERY
            num_removed = remove_orphan_objects(
                self.data, self.store, logs_ended_before=ended_before
            )
            if num_removed:
                logger.info("Removed %d objects that nothing needs any more.", num_removed)


def remove_bytes(data: DataDir, store: Store, file: StoredFile) -> None:
    """Remove the bytes of a file that the store has marked as deleted.

    With a published file goes the file of all lines of its batch: it holds the same answers.
    """
    batch_id = None
    if file.purpose is FilePurpose.BATCH_OUTPUT:
        batch_id = store.batch_of_output(file.id)
    remove_file(data, file, None if batch_id is None else store.get_batch(batch_id))
