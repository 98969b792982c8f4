"""The store: what is known of files, batches and workers. The only place with SQL.

Every method is one transaction. A state changes only along `core.TRANSITIONS`; whoever works on a
batch proves by its epoch that the batch is still its own, and an older epoch changes nothing
(`LeaseLost`). Rows come out as the frozen types of `core`.

All methods raise `StoreUnavailable` (retriable) when the database does not answer, and
`StorageFull` when its disk is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, and_, func, insert, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from batch_app import database
from batch_app.core import (
    TRANSITIONS,
    Batch,
    BatchStatus,
    Dialect,
    FilePurpose,
    LineError,
    Progress,
    StoredFile,
    TokenCounts,
)
from batch_app.database import WRITES, batches, files, workers
from batch_app.errors import Conflict, LeaseLost, NotFound, StorageFull, StoreUnavailable

#: States in which a batch belongs to a worker, or to the next one when its lease has run out.
LEASED = (BatchStatus.RUNNING, BatchStatus.FINALIZING, BatchStatus.CANCELLING)

_STAMPS: Mapping[BatchStatus, str] = {
    BatchStatus.QUEUED: "queued_at",
    BatchStatus.RUNNING: "started_at",
    BatchStatus.FINALIZING: "finalizing_at",
    BatchStatus.COMPLETED: "completed_at",
    BatchStatus.FAILED: "failed_at",
    BatchStatus.EXPIRED: "expired_at",
    BatchStatus.CANCELLING: "cancelling_at",
    BatchStatus.CANCELLED: "cancelled_at",
}


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker process as it last reported itself. `process_started_at` is Unix seconds."""

    id: str
    host: str
    pid: int
    process_started_at: float
    started_at: datetime
    heartbeat_at: datetime
    state: str
    model: str | None
    batch_id: str | None


class Store:
    """One per process; safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = database.connect(url)

    def migrate(self) -> None:
        """Create the tables, or bring them up to date."""
        with _translated_errors():
            database.migrate(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, file: StoredFile) -> None:
        with self._write() as connection:
            _insert_file(connection, file)

    def get_file(self, file_id: str) -> StoredFile:
        """Raises NotFound."""
        with self._read() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id)).first()
        if row is None:
            raise NotFound(f"No such file: {file_id}", param="file_id")
        return _to_file(row)

    # -- batches -------------------------------------------------------------------------------

    def add_batch(self, batch: Batch, input_file: StoredFile | None = None) -> None:
        """Insert a batch, and with it its input file if that is new: both, or neither."""
        with self._write() as connection:
            if input_file is not None:
                _insert_file(connection, input_file)
            connection.execute(insert(batches).values(_batch_values(batch)))

    def get_batch(self, batch_id: str) -> Batch:
        """Raises NotFound."""
        with self._read() as connection:
            return _get_batch(connection, batch_id)

    def list_batches(
        self,
        *,
        limit: int,
        after: str | None = None,
        statuses: Sequence[BatchStatus] | None = None,
    ) -> tuple[list[Batch], bool]:
        """Batches, newest first, and whether there are more.

        `after` is the id of the last batch of the page before. Raises NotFound if it is unknown.
        """
        query = select(batches).order_by(batches.c.seq.desc()).limit(limit + 1)
        if statuses is not None:
            query = query.where(batches.c.status.in_([status.value for status in statuses]))
        with self._read() as connection:
            if after is not None:
                seq = connection.scalar(select(batches.c.seq).where(batches.c.id == after))
                if seq is None:
                    raise NotFound(f"No such batch: {after}", param="after")
                query = query.where(batches.c.seq < seq)
            rows = connection.execute(query).all()
        return [_to_batch(row) for row in rows[:limit]], len(rows) > limit

    def count_batches(self) -> dict[BatchStatus, int]:
        """How many batches are in each state; states without any are left out."""
        with self._read() as connection:
            rows = connection.execute(
                select(batches.c.status, func.count()).group_by(batches.c.status)
            ).all()
        return {BatchStatus(status): count for status, count in rows}

    def batches_ahead(self, batch: Batch) -> list[Batch]:
        """The unfinished batches that will run, or are running, before this queued one."""
        active = [BatchStatus.QUEUED, *LEASED]
        with self._read() as connection:
            seq = connection.scalar(select(batches.c.seq).where(batches.c.id == batch.id))
            rows = connection.execute(
                select(batches)
                .where(batches.c.status.in_([status.value for status in active]))
                .where(batches.c.seq < seq)
                .order_by(batches.c.seq)
            ).all()
        return [_to_batch(row) for row in rows]

    def work_ahead(self, batch: Batch) -> dict[str, int]:
        """Requests that are still to run before this batch's own, by model.

        Like `batches_ahead`, in one row a model, however long the queue is.
        """
        active = [BatchStatus.QUEUED, *LEASED]
        remaining = func.sum(batches.c.total - batches.c.completed - batches.c.failed)
        seq = select(batches.c.seq).where(batches.c.id == batch.id).scalar_subquery()
        with self._read() as connection:
            rows = connection.execute(
                select(batches.c.model, remaining)
                .where(batches.c.status.in_([status.value for status in active]))
                .where(batches.c.seq < seq)
                .group_by(batches.c.model)
            ).all()
        return {model: max(int(requests), 0) for model, requests in rows}

    def ping(self) -> None:
        """Ask the database for a sign of life."""
        with self._read() as connection:
            connection.execute(select(workers.c.id).limit(1)).first()

    def cancel_queued(self, batch_id: str, now: datetime) -> Batch:
        """Cancel a batch that no worker has begun.

        Raises:
            NotFound: there is no such batch.
            Conflict: it isn't waiting any more.
        """
        with self._write() as connection:
            batch = _get_batch(connection, batch_id, for_update=True)
            if batch.status not in (BatchStatus.QUEUED, BatchStatus.VALIDATING):
                raise Conflict(
                    f"Batch {batch_id} is {batch.status.value}, no longer waiting.",
                    code="batch_not_pending",
                )
            _transition(connection, batch, BatchStatus.CANCELLING, now)
            batch = _get_batch(connection, batch_id)
            return _transition(connection, batch, BatchStatus.CANCELLED, now)

    def request_cancel(self, batch_id: str, now: datetime) -> Batch:
        """Ask the worker that runs this batch to stop; a waiting batch is cancelled at once.

        Raises:
            NotFound: there is no such batch.
            Conflict: it has finished.
        """
        with self._write() as connection:
            batch = _get_batch(connection, batch_id, for_update=True)
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return batch  # doing it twice is harmless
            if batch.is_terminal:
                raise Conflict(
                    f"Batch {batch_id} is {batch.status.value}: it can't be cancelled any more.",
                    code="batch_not_cancellable",
                )
            waiting = batch.status in (BatchStatus.QUEUED, BatchStatus.VALIDATING)
            batch = _transition(connection, batch, BatchStatus.CANCELLING, now)
            if waiting:
                batch = _transition(connection, batch, BatchStatus.CANCELLED, now)
            return batch

    # -- leases --------------------------------------------------------------------------------

    def claim_next(self, worker_id: str, lease_s: float, now: datetime) -> Batch | None:
        """Give this worker the oldest batch that waits or whose lease has run out.

        Raises the batch's epoch, so that a former holder can change nothing any more.
        """
        claimable = or_(
            batches.c.status == BatchStatus.QUEUED.value,
            and_(
                batches.c.status.in_([status.value for status in LEASED]),
                or_(batches.c.lease_expires_at.is_(None), batches.c.lease_expires_at < now),
            ),
        )
        query = select(batches).where(claimable).order_by(batches.c.seq).limit(1)
        with self._read() as connection:
            # A look that locks nothing: an idle worker polls often.
            if connection.execute(query).first() is None:
                return None
        with self._write() as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            batch = _to_batch(row)
            lease = {
                "epoch": batch.epoch + 1,
                "lease_owner": worker_id,
                "lease_expires_at": now + timedelta(seconds=lease_s),
            }
            if batch.status is BatchStatus.QUEUED:
                return _transition(connection, batch, BatchStatus.RUNNING, now, **lease)
            connection.execute(update(batches).where(batches.c.id == batch.id).values(lease))
            return _get_batch(connection, batch.id)

    def renew(
        self,
        batch: Batch,
        *,
        lease_s: float,
        now: datetime,
        progress: Progress | None = None,
    ) -> BatchStatus:
        """Keep the lease, and tell how far the batch is. Returns its status as it stands now.

        Raises LeaseLost if the batch's epoch is no longer this one's.
        """
        values: dict[str, Any] = {"lease_expires_at": now + timedelta(seconds=lease_s)}
        if progress is not None:
            values |= _progress_values(progress)
        with self._write() as connection:
            _fenced_update(connection, batch, values)
            return _get_batch(connection, batch.id).status

    def release(self, batch: Batch) -> None:
        """Give the batch back unfinished, for the next worker to go on with. Raises LeaseLost."""
        with self._write() as connection:
            _fenced_update(connection, batch, {"lease_owner": None, "lease_expires_at": None})

    def release_dead(self, worker_id: str) -> int:
        """Free the batches of a worker known to be dead, without waiting for their leases.

        Returns how many there were. The epoch rises with the next claim, as always.
        """
        with self._write() as connection:
            result = connection.execute(
                update(batches)
                .where(batches.c.lease_owner == worker_id)
                .where(batches.c.status.in_([status.value for status in LEASED]))
                .values(lease_owner=None, lease_expires_at=None)
            )
        return int(result.rowcount)

    def transition(
        self,
        batch: Batch,
        to: BatchStatus,
        now: datetime,
        *,
        new_files: Sequence[StoredFile] = (),
        **values: Any,
    ) -> Batch:
        """Move a batch that the caller holds to another state, with files that come with it.

        Raises:
            LeaseLost: the epoch is no longer the caller's.
            Conflict: the table of transitions forbids it from the state it is in by now.
        """
        with self._write() as connection:
            current = _get_batch(connection, batch.id, for_update=True)
            if current.epoch != batch.epoch:
                raise LeaseLost(f"Batch {batch.id} belongs to another worker by now.")
            for file in new_files:
                _insert_file(connection, file)
            return _transition(connection, current, to, now, **values)

    # -- workers -------------------------------------------------------------------------------

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

    # -- transactions --------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _translated_errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with (
            _translated_errors(),
            self._engine.connect().execution_options(**{WRITES: True}) as connection,
            connection.begin(),
        ):
            yield connection


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        cause = str(error.orig)
        if "disk is full" in cause or "No space left" in cause:
            raise StorageFull(f"The database's disk is full ({cause}).") from error
        raise StoreUnavailable(f"The database does not answer: {cause}") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise StoreUnavailable(f"The database's connection broke: {error.orig}") from error
        raise
    except SQLAlchemyError as error:
        if "QueuePool limit" in str(error):
            raise StoreUnavailable("All connections to the database are busy.") from error
        raise


def _insert_file(connection: Connection, file: StoredFile) -> None:
    values = asdict(file) | {"purpose": file.purpose.value}
    connection.execute(insert(files).values(values))


def _get_batch(connection: Connection, batch_id: str, *, for_update: bool = False) -> Batch:
    query = select(batches).where(batches.c.id == batch_id)
    if for_update:
        query = query.with_for_update()
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"No such batch: {batch_id}", param="batch_id")
    return _to_batch(row)


def _fenced_update(connection: Connection, batch: Batch, values: Mapping[str, Any]) -> None:
    result = connection.execute(
        update(batches)
        .where(batches.c.id == batch.id)
        .where(batches.c.epoch == batch.epoch)
        .values(**values)
    )
    if result.rowcount == 0:
        raise LeaseLost(f"Batch {batch.id} belongs to another worker by now.")


def _transition(
    connection: Connection, batch: Batch, to: BatchStatus, now: datetime, **values: Any
) -> Batch:
    if to not in TRANSITIONS[batch.status]:
        raise Conflict(
            f"Batch {batch.id} can't go from {batch.status.value} to {to.value}.",
            code="invalid_transition",
        )
    changes: dict[str, Any] = {"status": to.value, _STAMPS[to]: now, **values}
    if not TRANSITIONS[to]:
        changes |= {"lease_owner": None, "lease_expires_at": None}
    progress = changes.pop("progress", None)
    if progress is not None:
        changes |= _progress_values(progress)
    errors = changes.pop("errors", None)
    if errors is not None:
        changes["errors"] = [asdict(error) for error in errors]
    connection.execute(update(batches).where(batches.c.id == batch.id).values(**changes))
    return _get_batch(connection, batch.id)


def _progress_values(progress: Progress) -> dict[str, int]:
    return {
        "completed": progress.completed,
        "failed": progress.failed,
        **asdict(progress.tokens),
    }


def _batch_values(batch: Batch) -> dict[str, Any]:
    values = asdict(batch)
    values |= _progress_values(batch.progress)
    del values["progress"]
    values["dialect"] = batch.dialect.value
    values["status"] = batch.status.value
    values["errors"] = [asdict(error) for error in batch.errors] or None
    return values


def _to_batch(row: Row[Any]) -> Batch:
    values = dict(row._mapping)
    del values["seq"]
    values["progress"] = Progress(
        completed=values.pop("completed"),
        failed=values.pop("failed"),
        tokens=TokenCounts(
            prompt_tokens=values.pop("prompt_tokens"),
            completion_tokens=values.pop("completion_tokens"),
            cached_tokens=values.pop("cached_tokens"),
            reasoning_tokens=values.pop("reasoning_tokens"),
        ),
    )
    values["dialect"] = Dialect(values["dialect"])
    values["status"] = BatchStatus(values["status"])
    values["errors"] = tuple(LineError(**error) for error in values["errors"] or ())
    return Batch(**values)


def _to_file(row: Row[Any]) -> StoredFile:
    values = dict(row._mapping)
    del values["seq"]
    values["purpose"] = FilePurpose(values["purpose"])
    return StoredFile(**values)
