"""Appraisal: finds out, in the background, what the batches in the queue ask for.

One thread in each API server counts the prompts of one batch after the other, oldest first. Two
servers that count the same batch do it in vain, not wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from batch_app.config import Settings
from batch_app.core import Batch, utc_now
from batch_app.errors import IndexUnreadable, ModelNotFound
from batch_app.files import DataDir
from batch_app.index import Index
from batch_app.outlook import Outlook
from batch_app.registry import ModelRegistry
from batch_app.shared_files import fetch_index, fetch_input
from batch_app.store import Store
from batch_app.workloads import Planning, counted_workloads, quick_workloads, to_json

#: A server that would have to fetch a batch's input for it counts its prompts only after this.
LEFT_TO_OTHERS = timedelta(seconds=30)


def planning_of(outlook: Outlook, settings: Settings, batch: Batch) -> Planning:
    return outlook.planning(
        by_prefix=settings.order == "prefix",
        deduplicate=settings.deduplicate and batch.deduplicate,
    )


@dataclass(frozen=True)
class Appraisal:
    """Raises StoreUnavailable, ObjectsUnavailable, StorageFull."""

    settings: Settings
    data: DataDir
    store: Store
    registry: Callable[[], ModelRegistry]
    outlook: Outlook
    clock: Callable[[], datetime] = utc_now

    def quick(self, batch: Batch) -> list[dict[str, object]] | None:
        """What its lines' lengths say, at once; None where there is no index."""
        try:
            index = Index.load(self.data.work_dir(batch.id))
        except IndexUnreadable:
            return None
        planning = planning_of(self.outlook, self.settings, batch)
        return to_json(quick_workloads(index, planning, self.outlook.bytes_per_token))

    def run_once(self) -> bool:
        """Count one batch, if one waits for it. Returns whether one did."""
        batch = self.store.next_to_count()
        if batch is None or self._is_for_another(batch):
            return False
        self.store.set_workload(batch.id, self._counted(batch), self.clock())
        return True

    def _is_for_another(self, batch: Batch) -> bool:
        """Whether another server has the input on its disk, and is likely to be at it."""
        if self.data.objects is None or self.data.input_file(batch.input_file_id).exists():
            return False
        return batch.queued_at is not None and self.clock() - batch.queued_at < LEFT_TO_OTHERS

    def _counted(self, batch: Batch) -> list[dict[str, object]] | None:
        """None where there is nothing left to count: it ended, or its files are gone."""
        try:
            index = Index.load(fetch_index(self.data, batch.id))
            found = counted_workloads(
                index,
                fetch_input(self.data, batch.input_file_id),
                self.registry(),
                planning_of(self.outlook, self.settings, batch),
                self.outlook.bytes_per_token,
            )
        except (IndexUnreadable, ModelNotFound):
            return None
        return to_json(found)
