"""What is counted over all time, for those who watch the server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError

from batch_app.core import BatchStatus, FilePurpose, Progress
from batch_app.database import batches, files, model_loads
from batch_app.store.batches import LEASED, NOT_BEGUN
from batch_app.store.rows import PROGRESS_COLUMNS, to_progress
from batch_app.store.transactions import Transactions


@dataclass(frozen=True, slots=True)
class ModelLoads:
    """How often a model was loaded, how often that failed, and the seconds of those that didn't.

    `num_lost`: its engines that died or hung at work. The rest is in tokens, and times, of all its
    engines together.
    """

    num_loads: int = 0
    num_failed: int = 0
    load_s: float = 0.0
    num_lost: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """`num_batches` has every state; the others only models that have something to count.

    `waiting`: requests of unfinished batches that have no result. `oldest_waiting_since`: when the
    batch came that has waited longest for its first worker.
    """

    num_batches: Mapping[BatchStatus, int] = field(default_factory=dict)
    progress: Mapping[str, Progress] = field(default_factory=dict)
    waiting: Mapping[str, int] = field(default_factory=dict)
    loads: Mapping[str, ModelLoads] = field(default_factory=dict)
    oldest_waiting_since: datetime | None = None
    num_uploads: int = 0
    upload_bytes: int = 0


class TotalsStore(Transactions):
    def count_load(self, model: str, load_s: float | None) -> None:
        """Count that a worker loaded this model in so many seconds; None: that it could not."""
        if load_s is None:
            self.count_engine(model, num_failed=1)
        else:
            self.count_engine(model, num_loads=1, load_s=load_s)

    def count_engine(self, model: str, **more: float) -> None:
        """Add to counts of `ModelLoads`, by their names."""
        counts = model_loads.c
        changes = {name: counts[name] + value for name, value in more.items()}
        count = update(model_loads).where(counts.model == model).values(changes)
        with self._write() as connection:
            if connection.execute(count).rowcount:
                return
        with suppress(IntegrityError), self._write() as connection:  # another worker was faster
            connection.execute(insert(model_loads).values(model=model))
        with self._write() as connection:
            connection.execute(count)

    def totals(self) -> Totals:
        """All of it, in one look. Reads every batch's row."""
        columns = batches.c
        sums = [columns[name] for name in ("total", *PROGRESS_COLUMNS)]
        unfinished = {status.value for status in (*NOT_BEGUN, *LEASED)}
        num_batches = dict.fromkeys(BatchStatus, 0)
        progress: dict[str, Progress] = {}
        waiting: dict[str, int] = {}
        with self._read() as connection:
            for row in connection.execute(
                select(
                    columns.status,
                    columns.model,
                    func.count().label("num"),
                    *(func.coalesce(func.sum(column), 0).label(column.name) for column in sums),
                ).group_by(columns.status, columns.model)
            ):
                num_batches[BatchStatus(row.status)] += row.num
                found = to_progress(row._asdict())
                progress[row.model] = progress.get(row.model, Progress()) + found
                if row.status in unfinished:
                    rest = max(int(row.total) - found.done, 0)
                    waiting[row.model] = waiting.get(row.model, 0) + rest
            oldest = connection.execute(
                select(columns.created_at)
                .where(columns.status == BatchStatus.QUEUED.value)
                .order_by(columns.seq)
                .limit(1)
            ).scalar()
            uploads = connection.execute(
                select(func.count(), func.coalesce(func.sum(files.c.size_bytes), 0)).where(
                    files.c.purpose == FilePurpose.BATCH.value
                )
            ).one()
            loads = {
                row.model: ModelLoads(
                    row.num_loads,
                    row.num_failed,
                    row.load_s,
                    row.num_lost,
                    row.prefix_queries,
                    row.prefix_hits,
                    row.preemptions,
                )
                for row in connection.execute(select(model_loads))
            }
        return Totals(
            num_batches=num_batches,
            progress=progress,
            waiting=waiting,
            loads=loads,
            oldest_waiting_since=oldest,
            num_uploads=int(uploads[0]),
            upload_bytes=int(uploads[1]),
        )
