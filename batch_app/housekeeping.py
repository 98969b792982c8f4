"""Housekeeping: what has to happen in time although nobody asks for it.

In each API server, one round every second: batches that have to end (cancelled, or out of time) and
that no worker has in its hands get their files; files and uploads whose time has come are removed.
Every step may be cut off, done twice, or done by two servers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import (
    Batch,
    BatchStatus,
    FilePurpose,
    Progress,
    StoredFile,
    UploadStatus,
    utc_now,
)
from batch_app.errors import BadLines, Conflict, IndexUnreadable, LeaseLost, NotFound
from batch_app.files import DataDir, remove_tree
from batch_app.finalize import CANCELLED, EXPIRED, Published, Unfinished, publish
from batch_app.index import Index
from batch_app.intake import index_file
from batch_app.registry import ModelRegistry
from batch_app.results import ResultsLog
from batch_app.store import Store
from batch_app.validation import intake_rules

#: To write the files of a batch; with more time than this, another server would do it as well.
LEASE_S = 300.0
#: How long a client may repeat a request under its Idempotency-Key.
KEYS_KEPT = timedelta(days=2)


@dataclass(frozen=True)
class Housekeeping:
    """One round is `run_once`; it raises StoreUnavailable, StorageFull or OSError."""

    settings: Settings
    data: DataDir
    store: Store
    registry: ModelRegistry
    holder: str
    clock: Callable[[], datetime] = utc_now

    def run_once(self) -> bool:
        """Do what is due. Returns whether there may be more."""
        closed = self._close_one()
        removed = self._remove_expired_files()
        self._end_expired_uploads()
        self.store.forget_keys(self.clock() - KEYS_KEPT)
        return closed or removed

    def _close_one(self) -> bool:
        batch = self.store.claim_to_close(self.holder, LEASE_S, self.clock())
        if batch is None:
            return False
        to, unfinished = BatchStatus.EXPIRED, EXPIRED
        if batch.status is BatchStatus.CANCELLING:
            to, unfinished = BatchStatus.CANCELLED, CANCELLED
        published, progress = self._publish(batch, unfinished)
        with suppress(LeaseLost, Conflict):
            self.store.transition(
                batch,
                to,
                self.clock(),
                new_files=published.files,
                output_file_id=published.output.id if published.output else None,
                error_file_id=published.errors.id if published.errors else None,
                progress=progress,
            )
            BatchLog(self.data.log_file(batch.id), clock=self.clock).write(
                f"{to.value} {'without its worker' if batch.started_at else 'before it started'}: "
                f"{progress.done} of {batch.total} requests are done"
            )
            remove_tree(self.data.work_dir(batch.id))
        return True

    def _publish(self, batch: Batch, unfinished: Unfinished) -> tuple[Published, Progress]:
        """A line for every request; nothing where the lines were never checked."""
        index = self._index(batch)
        if index is None:
            return Published(None, None), batch.progress
        log = ResultsLog(self.data.work_dir(batch.id), len(index), batch.epoch)
        try:
            published = publish(self.data, batch, index, log, unfinished, self.clock())
            return published, log.progress
        finally:
            log.close()

    def _index(self, batch: Batch) -> Index | None:
        if batch.queued_at is None:
            return None
        folder = self.data.work_dir(batch.id)
        with suppress(IndexUnreadable):
            return Index.load(folder)
        folder.mkdir(exist_ok=True)
        try:
            rules = intake_rules(batch, self.settings, self.registry)
            index_file(self.data.input_file(batch.input_file_id), folder, rules)
        except (BadLines, FileNotFoundError):
            return None  # the bytes are damaged or gone: ending it is all that can be done
        return Index.load(folder)

    def _remove_expired_files(self) -> bool:
        expired = self.store.expired_files(self.clock())
        for file in expired:
            # Deleted by somebody else just now, or needed by a batch just created.
            with suppress(NotFound, Conflict):
                self.store.delete_file(file.id, self.clock())
                remove_bytes(self.data, self.store, file)
        return bool(expired)

    def _end_expired_uploads(self) -> None:
        for upload in self.store.expired_uploads(self.clock()):
            if self.store.get_upload(upload.id, self.clock()).status is UploadStatus.EXPIRED:
                remove_tree(self.data.upload_dir(upload.id))


def remove_bytes(data: DataDir, store: Store, file: StoredFile) -> None:
    """Remove the bytes of a file that the store has marked as deleted.

    With a published file goes the file of all lines of its batch: it holds the same answers.
    """
    if file.purpose is FilePurpose.BATCH:
        data.input_file(file.id).unlink(missing_ok=True)
        return
    data.output_file(file.id).unlink(missing_ok=True)
    batch_id = store.batch_of_output(file.id)
    if batch_id is not None:
        data.results_file(store.get_batch(batch_id)).unlink(missing_ok=True)
