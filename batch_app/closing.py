"""Closing: what the store is told of a batch that ends, and the files of one that ends otherwise
than by running to its end: in its worker's stead, or after a defect of the worker.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batch_app.config import Settings
from batch_app.core import Batch, Progress
from batch_app.errors import BadLines, IndexUnreadable
from batch_app.files import DataDir
from batch_app.finalize import Published, Unfinished, publish
from batch_app.index import Index
from batch_app.intake import index_file
from batch_app.registry import ModelRegistry
from batch_app.result_copies import fetch_results_log
from batch_app.results import ResultsLog
from batch_app.shared_files import fetch_index, fetch_input
from batch_app.validation import intake_rules


@dataclass(frozen=True, slots=True)
class Closed:
    """What was published, and how far the batch had come."""

    published: Published
    progress: Progress

    def for_store(self) -> dict[str, Any]:
        """What `Store.transition` is told of it."""
        output, errors = self.published.output, self.published.errors
        return {
            "new_files": self.published.files,
            "output_file_id": output.id if output else None,
            "error_file_id": errors.id if errors else None,
            "progress": self.progress,
        }


def close_with_results_so_far(
    batch: Batch,
    unfinished: Unfinished,
    *,
    data: DataDir,
    settings: Settings,
    registry: ModelRegistry,
    now: datetime,
) -> Closed:
    """Publish a line for every request; nothing where the lines were never checked, or can't be
    read any more. The store is the caller's to tell, under the epoch that the batch has here.

    Raises StorageFull, ObjectsUnavailable, ResultsLogError, OSError.
    """
    index = _index(batch, data, settings, registry)
    if index is None:
        return Closed(Published(None, None), batch.progress)
    fetch_results_log(data, batch.id, data.work_dir(batch.id))
    log = ResultsLog(data.work_dir(batch.id), len(index), batch.epoch)
    try:
        return Closed(publish(data, batch, index, log, unfinished, now), log.progress)
    finally:
        log.close()


def _index(
    batch: Batch, data: DataDir, settings: Settings, registry: ModelRegistry
) -> Index | None:
    if batch.queued_at is None:
        return None
    folder = fetch_index(data, batch.id)
    with suppress(IndexUnreadable):
        return Index.load(folder)
    folder.mkdir(exist_ok=True)
    try:
        index_file(
            fetch_input(data, batch.input_file_id), folder, intake_rules(batch, settings, registry)
        )
    except (BadLines, FileNotFoundError):
        return None  # the bytes are damaged or gone: ending it is all that can be done
    return Index.load(folder)
