"""The workers, as they last reported themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from sqlalchemy import insert, select, update

from batch_app.database import workers
from batch_app.store.transactions import Transactions

#: A worker that has missed so many signs of life is not counted as alive. For what is shown and
#: estimated only: its batch goes to another one when the lease runs out.
MISSED_HEARTBEATS = 3


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker process as it last reported itself. `process_started_at` is Unix seconds.

    `engine`: the reading of the engine that is loaded, by the names of `EngineReading`.
    """

    id: str
    host: str
    pid: int
    process_started_at: float
    started_at: datetime
    heartbeat_at: datetime
    state: str
    model: str | None
    batch_id: str | None
    engine: Mapping[str, float] | None = None

    def is_alive(self, now: datetime, heartbeat_s: float) -> bool:
        """`heartbeat_s`: seconds between a worker's signs of life."""
        return now - self.heartbeat_at <= timedelta(seconds=MISSED_HEARTBEATS * heartbeat_s)


class WorkerStore(Transactions):
    def report_worker(self, worker: WorkerRow) -> None:
        """Insert or refresh a worker's row."""
        with self._write() as connection:
            values = asdict(worker)
            result = connection.execute(
                update(workers).where(workers.c.id == worker.id).values(values)
            )
            if result.rowcount == 0:
                connection.execute(insert(workers).values(values))

    def list_workers(self) -> list[WorkerRow]:
        with self._read() as connection:
            rows = connection.execute(select(workers).order_by(workers.c.started_at)).all()
        return [WorkerRow(**row._mapping) for row in rows]

    def forget_worker(self, worker_id: str) -> None:
        with self._write() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker_id))
