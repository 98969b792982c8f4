"""Batches in the store: creating, reading, and changing their state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, null, select, update
from sqlalchemy.engine import Connection

from batch_app.core import (
    TERMINAL,
    TRANSITIONS,
    Batch,
    BatchStatus,
    Idempotency,
    StoredFile,
)
from batch_app.database import (
    batches,
    files,
    idempotency_keys,
    lock,
    wake_workers,
    workers,
)
from batch_app.errors import Conflict, IdempotencyMismatch, LeaseLost, NotFound, TooMany
from batch_app.keys import EVERYBODY, Caller
from batch_app.store.files import insert_file, insert_files
from batch_app.store.rows import batch_values, pause_values, progress_values, to_batch
from batch_app.store.transactions import Transactions
from batch_app.store.visibility import visible
from batch_app.store.webhooks import announce, insert_webhook
from batch_app.webhooks import Webhook

#: States in which a batch belongs to a worker, or to the next one when its lease has run out.
LEASED = (BatchStatus.RUNNING, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
#: States before any worker's.
NOT_BEGUN = (BatchStatus.VALIDATING, BatchStatus.QUEUED)

_STAMPS: dict[BatchStatus, str] = {
    BatchStatus.QUEUED: "queued_at",
    BatchStatus.RUNNING: "started_at",
    BatchStatus.FINALIZING: "finalizing_at",
    BatchStatus.COMPLETED: "completed_at",
    BatchStatus.FAILED: "failed_at",
    BatchStatus.EXPIRED: "expired_at",
    BatchStatus.CANCELLING: "cancelling_at",
    BatchStatus.CANCELLED: "cancelled_at",
}


class BatchStore(Transactions):
    def add_batch(
        self,
        batch: Batch,
        input_file: StoredFile | None = None,
        idempotency: Idempotency | None = None,
        *,
        webhook: Webhook | None = None,
        seen_by: Caller = EVERYBODY,
        max_unfinished: int = 0,
    ) -> Batch:
        """Insert a batch, and with it its input file if that is new, and the webhook that is told
        of its end: all of them, or none.

        With a key that was used before for the same request, that request's batch is returned and
        nothing is inserted. `max_unfinished`: of the batch's owner; 0 means no limit.

        Raises:
            IdempotencyMismatch: the key was used before for another request.
            NotFound: the input file was deleted meanwhile, or is another's.
            TooMany: its owner has too many batches that have not finished.
        """
        with self._write() as connection:
            if idempotency is not None:
                lock(connection, f"idempotency keys of {seen_by.owner}")
                earlier = _earlier_batch(connection, seen_by, idempotency)
                if earlier is not None:
                    return get_batch(connection, earlier, seen_by)
            if max_unfinished:  # others of theirs wait until this one can be counted
                lock(connection, f"batches of {batch.owner}")
                _require_room(connection, batch.owner, max_unfinished)
            if input_file is not None:
                insert_file(connection, input_file)
            elif not _has_file(connection, batch.input_file_id, seen_by):
                raise NotFound(f"No such file: {batch.input_file_id}", param="input_file_id")
            connection.execute(insert(batches).values(batch_values(batch)))
            if webhook is not None:
                insert_webhook(connection, webhook)
            if idempotency is not None:
                connection.execute(
                    insert(idempotency_keys).values(
                        **asdict(idempotency),
                        owner=seen_by.owner or "",
                        batch_id=batch.id,
                        created_at=batch.created_at,
                    )
                )
            if batch.status is BatchStatus.QUEUED:
                wake_workers(connection)
        return batch

    def require_room(self, owner: str | None, max_unfinished: int) -> None:
        """Raises TooMany where `add_batch` would."""
        with self._read() as connection:
            _require_room(connection, owner, max_unfinished)

    def batch_of_key(
        self, idempotency: Idempotency, *, seen_by: Caller = EVERYBODY
    ) -> Batch | None:
        """The batch that the caller's key stands for, if used. Raises IdempotencyMismatch."""
        with self._read() as connection:
            earlier = _earlier_batch(connection, seen_by, idempotency)
            return get_batch(connection, earlier, seen_by) if earlier else None

    def forget_keys(self, before: datetime) -> int:
        """Forget idempotency keys that were used before this time. Returns how many."""
        old = idempotency_keys.c.created_at < before
        with self._read() as connection:
            # A look that locks nothing: there is seldom one.
            if (
                connection.execute(select(idempotency_keys.c.key).where(old).limit(1)).first()
                is None
            ):
                return 0
        with self._write() as connection:
            return int(connection.execute(idempotency_keys.delete().where(old)).rowcount)

    def get_batch(self, batch_id: str, *, seen_by: Caller = EVERYBODY) -> Batch:
        """Raises NotFound, also for one that is another's."""
        with self._read() as connection:
            return get_batch(connection, batch_id, seen_by)

    def list_batches(
        self,
        *,
        limit: int,
        after: str | None = None,
        statuses: Sequence[BatchStatus] | None = None,
        seen_by: Caller = EVERYBODY,
    ) -> tuple[list[Batch], bool]:
        """Batches, newest first, and whether there are more.

        `after` is the id of the last batch of the page before. Raises NotFound if it is unknown.
        """
        query = select(batches).order_by(batches.c.seq.desc()).limit(limit + 1)
        query = visible(query, batches, seen_by)
        if statuses is not None:
            query = query.where(batches.c.status.in_([status.value for status in statuses]))
        with self._read() as connection:
            if after is not None:
                place = select(batches.c.seq).where(batches.c.id == after)
                seq = connection.scalar(visible(place, batches, seen_by))
                if seq is None:
                    raise NotFound(f"No such batch: {after}", param="after")
                query = query.where(batches.c.seq < seq)
            rows = connection.execute(query).all()
        return [to_batch(row) for row in rows[:limit]], len(rows) > limit

    def which_batches(
        self, batch_ids: Collection[str], *, seen_by: Caller = EVERYBODY
    ) -> list[str]:
        """Those of these ids that there are, and that the caller may know of."""
        query = select(batches.c.id).where(batches.c.id.in_(batch_ids))
        with self._read() as connection:
            return list(connection.scalars(visible(query, batches, seen_by)))

    def count_batches(self) -> dict[BatchStatus, int]:
        """How many batches are in each state; states without any are left out."""
        with self._read() as connection:
            rows = connection.execute(
                select(batches.c.status, func.count()).group_by(batches.c.status)
            ).all()
        return {BatchStatus(status): count for status, count in rows}

    def unfinished(self, limit: int) -> list[Batch]:
        """The oldest batches that a worker has or could claim, oldest first, everybody's.

        Without their `workload`, which may be large.
        """
        active = [BatchStatus.QUEUED.value, *(status.value for status in LEASED)]
        some = [column for column in batches.c if column.name != "workload"]
        with self._read() as connection:
            rows = connection.execute(
                select(*some, null().label("workload"))
                .where(batches.c.status.in_(active))
                .order_by(batches.c.seq)
                .limit(limit)
            ).all()
        return [to_batch(dict(row._mapping)) for row in rows]

    def next_to_count(self) -> Batch | None:
        """The oldest batch whose prompts are still to be counted; None where there is none."""
        active = [BatchStatus.QUEUED.value, BatchStatus.RUNNING.value]
        with self._read() as connection:
            row = connection.execute(
                select(batches)
                .where(batches.c.status.in_(active))
                .where(batches.c.counted_at.is_(None))
                .order_by(batches.c.seq)
                .limit(1)
            ).first()
        return None if row is None else to_batch(row)

    def set_workload(self, batch_id: str, workload: Sequence[Any] | None, now: datetime) -> None:
        """Keep what a batch asks for, counted now; None leaves what is known of it."""
        values: dict[str, Any] = {"counted_at": now}
        if workload is not None:
            values["workload"] = workload
        with self._write() as connection:
            connection.execute(update(batches).where(batches.c.id == batch_id).values(**values))

    def ping(self) -> None:
        """Ask the database for a sign of life."""
        with self._read() as connection:
            connection.execute(select(workers.c.id).limit(1)).first()

    # -- changes of state ----------------------------------------------------------------------

    def cancel_queued(self, batch_id: str, now: datetime, *, seen_by: Caller = EVERYBODY) -> Batch:
        """Cancel a batch that no worker has begun, with nothing to publish. One that is paused may
        have results: it is `cancelling` until somebody has published them.

        Raises:
            NotFound: there is no such batch.
            Conflict: it isn't waiting any more.
        """
        with self._write() as connection:
            batch = get_batch(connection, batch_id, seen_by, for_update=True)
            if batch.status not in NOT_BEGUN:
                raise Conflict(
                    f"Batch {batch_id} is {batch.status.value}, no longer waiting.",
                    code="batch_not_pending",
                )
            batch = change_state(connection, batch, BatchStatus.CANCELLING, now)
            if batch.started_at is not None:
                return batch
            return change_state(connection, batch, BatchStatus.CANCELLED, now)

    def request_cancel(self, batch_id: str, now: datetime, *, seen_by: Caller = EVERYBODY) -> Batch:
        """Ask whoever has this batch to end it; it is `cancelling` until they have.

        Raises:
            NotFound: there is no such batch.
            Conflict: it has finished.
        """
        with self._write() as connection:
            batch = get_batch(connection, batch_id, seen_by, for_update=True)
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return batch  # doing it twice is harmless
            if batch.status in TERMINAL:
                raise Conflict(
                    f"Batch {batch_id} is {batch.status.value}: it can't be cancelled any more.",
                    code="batch_not_cancellable",
                )
            # Who checks its lines at the moment is not to be waited for.
            freed = {"epoch": batch.epoch + 1, "lease_owner": None}
            changes = freed if batch.status in NOT_BEGUN else {}
            return change_state(connection, batch, BatchStatus.CANCELLING, now, **changes)

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
            current = get_batch(connection, batch.id, for_update=True)
            if current.epoch != batch.epoch:
                raise LeaseLost(f"Batch {batch.id} belongs to another worker by now.")
            changed = change_state(connection, current, to, now, **values)
            insert_files(connection, new_files)
            return changed


def get_batch(
    connection: Connection,
    batch_id: str,
    seen_by: Caller = EVERYBODY,
    *,
    for_update: bool = False,
) -> Batch:
    """Within the caller's transaction. Raises NotFound."""
    query = visible(select(batches).where(batches.c.id == batch_id), batches, seen_by)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        raise NotFound(f"No such batch: {batch_id}", param="batch_id")
    return to_batch(row)


def change_state(
    connection: Connection, batch: Batch, to: BatchStatus, now: datetime, **values: Any
) -> Batch:
    """Within the caller's transaction. `values` may have `progress` and `errors` as core has them.
    An end is announced to webhooks.

    Raises Conflict where the table of transitions forbids it.
    """
    if to not in TRANSITIONS[batch.status]:
        raise Conflict(
            f"Batch {batch.id} can't go from {batch.status.value} to {to.value}.",
            code="invalid_transition",
        )
    changes: dict[str, Any] = {"status": to.value, **pause_values(None), **values}
    if getattr(batch, _STAMPS[to]) is None:  # one that was paused comes to some states again
        changes[_STAMPS[to]] = now
    if to in TERMINAL:
        changes["lease_owner"] = None
    progress = changes.pop("progress", None)
    if progress is not None:
        changes |= progress_values(progress)
    errors = changes.pop("errors", None)
    if errors is not None:
        changes["errors"] = [asdict(error) for error in errors]
    connection.execute(update(batches).where(batches.c.id == batch.id).values(**changes))
    changed = get_batch(connection, batch.id)
    if to is BatchStatus.QUEUED and changed.paused is None:
        wake_workers(connection)
    if to in TERMINAL:
        announce(connection, changed, now)
    return changed


def _require_room(connection: Connection, owner: str | None, max_unfinished: int) -> None:
    if max_unfinished == 0:
        return
    unfinished = [status.value for status in BatchStatus if status not in TERMINAL]
    query = (
        select(func.count())
        .select_from(batches)
        .where(batches.c.status.in_(unfinished))
        .where(batches.c.owner == owner)
    )
    if (connection.scalar(query) or 0) >= max_unfinished:
        # Not repeatable: a batch takes longer than any client waits, and each time all is sent.
        raise TooMany(
            f"You have {max_unfinished} batches that have not finished "
            "(max_unfinished_batches). Wait for one to end, or cancel one.",
            code="too_many_batches",
            retry_after_s=60,
            repeatable=False,
        )


def _earlier_batch(connection: Connection, seen_by: Caller, idempotency: Idempotency) -> str | None:
    row = connection.execute(
        select(idempotency_keys.c.fingerprint, idempotency_keys.c.batch_id)
        .where(idempotency_keys.c.owner == (seen_by.owner or ""))
        .where(idempotency_keys.c.key == idempotency.key)
    ).first()
    if row is None:
        return None
    if row.fingerprint != idempotency.fingerprint:
        raise IdempotencyMismatch(
            "This Idempotency-Key was used before, for another request. Take a new key."
        )
    batch_id: str = row.batch_id
    return batch_id


def _has_file(connection: Connection, file_id: str, seen_by: Caller) -> bool:
    """And it stays until the caller's transaction ends."""
    query = select(files.c.id).where(files.c.id == file_id).where(files.c.deleted_at.is_(None))
    query = visible(query, files, seen_by).with_for_update(read=True)
    return connection.scalar(query) is not None
