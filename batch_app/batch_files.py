"""The files of a claimed batch, made ready for its run: input, index, and results so far."""

from __future__ import annotations

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch
from batch_app.errors import IndexUnreadable
from batch_app.files import DataDir
from batch_app.index import Index
from batch_app.intake import index_file
from batch_app.lease import HeldLease
from batch_app.registry import ModelRegistry
from batch_app.result_copies import fetch_results_log
from batch_app.shared_files import fetch_index, fetch_input, share_log
from batch_app.validation import intake_rules


def fetch_batch_files(data: DataDir, batch: Batch, lease: HeldLease) -> dict[str, int]:
    """Bring here what the object storage has of the batch. Returns what it has of the results log.

    Raises ObjectsUnavailable, StorageFull, LeaseLost.
    """
    if data.objects is None:
        return {}
    fetch_input(data, batch.input_file_id, lease.check)
    fetch_index(data, batch.id, lease.check)
    copied = fetch_results_log(data, batch.id, data.work_dir(batch.id), lease.check)
    share_log(data, batch.id)
    return copied


def load_index(
    data: DataDir,
    batch: Batch,
    settings: Settings,
    registry: ModelRegistry,
    batch_log: BatchLog,
) -> Index:
    """The index of the batch's input file, made anew where it is damaged.

    Raises BadLines where lines that were good can't run any more, and OSError.
    """
    folder = data.work_dir(batch.id)
    try:
        return Index.load(folder)
    except IndexUnreadable as error:
        batch_log.write(f"{error.message} Making it anew.")
    rules = intake_rules(batch, settings, registry)
    index_file(data.input_file(batch.input_file_id), folder, rules)
    return Index.load(folder)
