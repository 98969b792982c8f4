"""Retry: a new batch of those requests of a finished one that did not succeed."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, FilePurpose, Idempotency, StoredFile
from batch_app.errors import Conflict, NotFound
from batch_app.files import (
    DataDir,
    IncomingFolder,
    move_durably,
    new_id,
    no_room_is_storage_full,
    remove_tree,
    sync_dir,
    wake_workers,
)
from batch_app.intake import IntakeSummary, index_file
from batch_app.json_lines import escape_line_separators
from batch_app.keys import EVERYBODY, Caller
from batch_app.registry import ModelRegistry
from batch_app.shared_files import (
    fetch_input,
    fetch_results_file,
    share_index,
    share_input,
    share_log,
)
from batch_app.store import Store
from batch_app.validation import intake_rules, window_end
from batch_app.webhooks import Webhook, new_webhook_id
from batch_app.wire.lines import has_failed

T = TypeVar("T")


def retry_batch(
    store: Store,
    data: DataDir,
    settings: Settings,
    registry: ModelRegistry,
    batch: Batch,
    now: datetime,
    idempotency: Idempotency | None = None,
    *,
    seen_by: Caller = EVERYBODY,
) -> Batch:
    """Queue the failed and the unanswered requests of a finished batch once more: all of them where
    it ended without results.

    Returns the new batch, which belongs to the old one's owner, or the one that the caller's key
    stands for already.

    Raises:
        Conflict: it has not finished, or none of its requests failed.
        BadLines: it failed for its lines, and they still can't run.
        NotFound: its files were deleted.
        StorageFull: there is no room; nothing remains.
        ObjectsUnavailable: nothing remains.
        TooMany: its owner has too many batches that have not finished.
    """
    store.require_room(batch.owner, settings.max_unfinished_batches)
    if not batch.is_terminal:
        raise Conflict(f"Batch {batch.id} has not finished.", code="batch_not_finished")
    if not can_be_retried(batch):
        raise Conflict(
            f"No request of {batch.id} failed: there is nothing to retry.", code="nothing_to_retry"
        )
    deleted = [file_id for file_id, live in _live(store, batch).items() if not live]
    input_path = _there(fetch_input, data, batch.input_file_id)
    if input_path is None or batch.input_file_id in deleted:
        raise NotFound(f"The input file of {batch.id} was deleted.", param="batch_id")
    results_path = None
    if batch.error_file_id is not None:
        results_path = _there(fetch_results_file, data, batch)
    if deleted or (results_path is None and batch.error_file_id is not None):
        raise NotFound(f"The results of {batch.id} were deleted.", param="batch_id")
    leftovers = []
    try:
        with no_room_is_storage_full("preparing the retry"), IncomingFolder(data) as folder:
            source = folder / "input.jsonl"
            with source.open("wb") as file:
                try:
                    if results_path is None:
                        file.writelines(_all_lines(input_path))
                    else:
                        file.writelines(failed_lines(input_path, results_path))
                except FileNotFoundError:  # just now
                    raise NotFound(f"Files of {batch.id} were deleted.", param="batch_id") from None
            summary = index_file(source, folder, intake_rules(batch, settings, registry))
            input_file = StoredFile(
                id=new_id("file"),
                purpose=FilePurpose.BATCH,
                filename=f"{batch.id}_retry.jsonl",
                size_bytes=source.stat().st_size,
                created_at=now,
                owner=batch.owner,
            )
            again = _fresh(batch, input_file, summary, now)
            leftovers = [data.input_file(input_file.id), data.work_dir(again.id)]
            move_durably(source, data.input_file(input_file.id))
            sync_dir(folder)
            move_durably(folder, data.work_dir(again.id))
        share_input(data, input_file.id)
        share_index(data, again.id)
        created = store.add_batch(
            again,
            input_file,
            idempotency,
            webhook=_same_webhook(store.webhook_of_batch(batch.id), again),
            seen_by=seen_by,
            max_unfinished=settings.max_unfinished_batches,
        )
        if created.id != again.id:
            return created  # the same request, at the same time
        leftovers = []
    finally:
        for path in leftovers:
            remove_tree(path)
    BatchLog(data.log_file(again.id)).write(
        f"submitted: {summary.num_requests} requests "
        + ("that failed in" if results_path is not None else "of")
        + f" {batch.id}"
    )
    share_log(data, again.id)
    with suppress(OSError):
        wake_workers(data)
    return again


def can_be_retried(batch: Batch) -> bool:
    """Whether a request of this finished batch failed, or the batch ended without any result."""
    ended_without = batch.output_file_id is None and batch.status is not BatchStatus.COMPLETED
    return batch.is_terminal and (batch.error_file_id is not None or ended_without)


def _live(store: Store, batch: Batch) -> dict[str, bool]:
    """Of this batch's files: whether they have not been deleted. Another machine may still hold
    copies of one that was."""
    names = (batch.input_file_id, batch.output_file_id, batch.error_file_id)
    return store.which_files_live([name for name in names if name])


def _there(fetch: Callable[[DataDir, T], Path], data: DataDir, what: T) -> Path | None:
    with suppress(FileNotFoundError):
        path = fetch(data, what)
        return path if path.exists() else None
    return None


def _fresh(batch: Batch, input_file: StoredFile, summary: IntakeSummary, now: datetime) -> Batch:
    """The same wish as the old batch's, with nothing of what became of that."""
    return Batch(
        id=new_id("batch"),
        dialect=batch.dialect,
        status=BatchStatus.QUEUED,
        endpoint=batch.endpoint,
        model=batch.model or summary.models[0],  # one that failed its check has none
        input_file_id=input_file.id,
        created_at=now,
        queued_at=now,
        total=summary.num_requests,
        completion_window=batch.completion_window,
        expires_at=window_end(now, batch.completion_window) if batch.expires_at else None,
        metadata=batch.metadata,
        owner=batch.owner,
        priority=batch.priority,
        deduplicate=batch.deduplicate,
        retry_of=batch.id,
        output_expires_after_s=batch.output_expires_after_s,
    )


def _same_webhook(webhook: Webhook | None, again: Batch) -> Webhook | None:
    """The old batch's, for the new one: whoever waited for that waits for this."""
    if webhook is None or webhook.disabled_at is not None:
        return None
    return replace(webhook, id=new_webhook_id(), batch_id=again.id, created_at=again.created_at)


def _all_lines(input_path: Path) -> Iterator[bytes]:
    """The input's lines without blank ones and without a byte order mark."""
    with input_path.open("rb") as inputs:
        start = len(codecs.BOM_UTF8)
        inputs.seek(start if inputs.read(start) == codecs.BOM_UTF8 else 0)
        for line in inputs:
            if not line.isspace():
                yield escape_line_separators(line.rstrip(b"\r\n")) + b"\n"


def failed_lines(input_path: Path, results_path: Path) -> Iterator[bytes]:
    """The input's lines whose requests failed. Both files are in the same order; only the input
    may have blank lines, and a byte order mark."""
    with results_path.open("rb") as results:
        for request, raw in zip(_all_lines(input_path), results, strict=True):
            if has_failed(raw):
                yield request
