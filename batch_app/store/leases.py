"""Who works on which batch: claims, leases, epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.engine import Connection

from batch_app.core import TERMINAL, Batch, BatchStatus, Choice, Progress, Waiting
from batch_app.database import batches, wake_workers
from batch_app.errors import LeaseLost
from batch_app.store.batches import LEASED, change_state, get_batch
from batch_app.store.lease_watch import Lease, LeaseWatch
from batch_app.store.rows import pause_values, progress_values, to_batch, to_paused
from batch_app.store.samples import note_sample
from batch_app.store.transactions import Transactions

#: The oldest that many are considered; a queue may be longer.
MAX_CONSIDERED = 1000

Pick = Callable[[Sequence[Waiting]], Choice | None]


def oldest(waiting: Sequence[Waiting]) -> Choice | None:
    """First in, first out."""
    return Choice(waiting[0].batch_id) if waiting else None


class LeaseStore(Transactions):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.lease_watch = LeaseWatch()

    def claim_next(
        self, worker_id: str, lease_s: float, now: datetime, pick: Pick = oldest
    ) -> Batch | None:
        """Give this worker one of the batches that wait or whose lease has run out.

        `pick` gets them oldest first and says which; None leaves them all. The batch's epoch rises,
        so that a former holder can change nothing any more. What was cancelled before any worker
        had it is left to `claim_to_close`: its lines may not even be checked.
        """
        wanted = _wanted()
        with self._read() as connection:  # a look that locks nothing: idle processes look often
            if pick(_waiting(connection, and_(wanted, self._is_free(connection)))) is None:
                return None
        with self._write() as connection:
            claimable = and_(wanted, self._is_free(connection))
            waiting = _waiting(connection, claimable)
            choice = first = pick(waiting)
            batch = None
            while choice is not None and batch is None:
                batch = self._claim(connection, choice.batch_id, claimable, worker_id, lease_s)
                if batch is None:  # somebody else has its row at the moment
                    waiting = [other for other in waiting if other.batch_id != choice.batch_id]
                    choice = pick(waiting)
            if batch is None and first is not None:
                # Perhaps only to write something into it: nobody is to wait for that until the
                # next look at the queue.
                choice = first
                batch = self._claim(
                    connection, first.batch_id, claimable, worker_id, lease_s, skip_locked=False
                )
            if batch is None or choice is None:
                return None
            _note_passed_over(connection, choice.passed_over, now)
            if batch.status is BatchStatus.QUEUED:
                return change_state(connection, batch, BatchStatus.RUNNING, now)
            return batch

    def next_model(self, pick: Pick = oldest) -> str | None:
        """The model of the batch that `claim_next` would give away now. Changes nothing.

        Batches of a worker that is believed gone are left out.
        """
        with self._read() as connection:
            waiting = _waiting(connection, and_(_wanted(), batches.c.lease_owner.is_(None)))
        choice = pick(waiting)
        if choice is None:
            return None
        return next(batch.model for batch in waiting if batch.batch_id == choice.batch_id)

    def waiting(self) -> list[Waiting]:
        """The batches that no worker has begun, oldest first, whoever they belong to."""
        with self._read() as connection:
            return _waiting(connection, batches.c.status == BatchStatus.QUEUED.value)

    def claim_to_validate(self, holder: str, lease_s: float, now: datetime) -> Batch | None:
        """Give the caller the oldest batch whose lines are to be checked, and now."""
        wanted = and_(batches.c.status == BatchStatus.VALIDATING.value, _is_due(now))
        return self._claim_oldest(wanted, holder, lease_s)

    def claim_to_close(self, holder: str, lease_s: float, now: datetime) -> Batch | None:
        """Give the caller a batch that has to end, cancelled or out of time, and is in nobody's
        hands: no worker has begun it, or the one that did is gone."""
        cancelled = and_(batches.c.status == BatchStatus.CANCELLING.value, _is_due(now))
        overdue = and_(
            batches.c.status.in_([BatchStatus.QUEUED.value, BatchStatus.RUNNING.value]),
            batches.c.expires_at < now,
            # Paused before that: it ends all the same. Paused since: it couldn't be closed.
            or_(batches.c.paused_at.is_(None), batches.c.paused_at < batches.c.expires_at)
            | _is_due(now),
        )
        return self._claim_oldest(or_(cancelled, overdue), holder, lease_s)

    def renew(
        self,
        batch: Batch,
        *,
        lease_s: float,
        progress: Progress | None = None,
        goes_on: bool = False,
        at: datetime | None = None,
        outlook: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> BatchStatus:
        """Keep the lease, and tell how far the batch is. Returns its status as it stands now.

        `goes_on`: whatever it was paused for before is over. With `at`, the progress is also noted
        as that time's, in the batch's series. `outlook`, `provenance`: as in `Batch`; None leaves
        them. Raises LeaseLost if the batch's epoch is no longer this one's, or it has ended.
        """
        values: dict[str, Any] = {"lease_s": lease_s, "heartbeats": batches.c.heartbeats + 1}
        if progress is not None:
            values |= progress_values(progress)
        if goes_on:
            values["num_pauses"] = 0
        if outlook is not None:
            values["outlook"] = outlook
        if provenance is not None:
            values["provenance"] = provenance
        with self._write() as connection:
            fenced_update(connection, batch, values)
            if at is not None and progress is not None:
                note_sample(connection, batch.id, at, progress)
            renewed = get_batch(connection, batch.id)
        self.lease_watch.saw(_lease(renewed))
        return renewed.status

    def release(self, batch: Batch) -> None:
        """Give the batch back unfinished, for the next worker to go on with. Raises LeaseLost."""
        with self._write() as connection:
            fenced_update(connection, batch, {"lease_owner": None})
            wake_workers(connection)

    def release_dead(self, worker_id: str) -> int:
        """Free the batches of a worker known to be dead, without waiting for their leases.

        Returns how many there were. The epoch rises with the next claim, as always.
        """
        with self._write() as connection:
            result = connection.execute(
                update(batches)
                .where(batches.c.lease_owner == worker_id)
                .where(batches.c.status.in_([status.value for status in LEASED]))
                .values(lease_owner=None)
            )
        return int(result.rowcount)

    def _claim_oldest(
        self, wanted: ColumnElement[bool], holder: str, lease_s: float
    ) -> Batch | None:
        if not self._is_any_free(wanted):
            return None
        with self._write() as connection:
            query = select(batches).where(and_(wanted, self._is_free(connection)))
            query = query.order_by(batches.c.seq).limit(1).with_for_update(skip_locked=True)
            row = connection.execute(query).first()
            return None if row is None else self._give(connection, to_batch(row), holder, lease_s)

    def _is_any_free(self, wanted: ColumnElement[bool]) -> bool:
        """A look that locks nothing: idle processes look often."""
        with self._read() as connection:
            claimable = and_(wanted, self._is_free(connection))
            return connection.scalar(select(batches.c.id).where(claimable).limit(1)) is not None

    def _is_free(self, connection: Connection) -> ColumnElement[bool]:
        """In nobody's hands, or in those of somebody who is believed gone."""
        over = self.lease_watch.run_out(_leases(connection))
        return or_(
            batches.c.lease_owner.is_(None),
            *(
                and_(
                    batches.c.id == lease.batch_id,
                    batches.c.epoch == lease.epoch,
                    batches.c.heartbeats == lease.heartbeats,
                )
                for lease in over
            ),
        )

    def _claim(
        self,
        connection: Connection,
        batch_id: str,
        condition: ColumnElement[bool],
        holder: str,
        lease_s: float,
        *,
        skip_locked: bool = True,
    ) -> Batch | None:
        """Lease this batch to the holder; None if somebody else was faster, or is about to be."""
        query = select(batches).where(batches.c.id == batch_id).where(condition)
        row = connection.execute(query.with_for_update(skip_locked=skip_locked)).first()
        return None if row is None else self._give(connection, to_batch(row), holder, lease_s)

    def _give(self, connection: Connection, batch: Batch, holder: str, lease_s: float) -> Batch:
        connection.execute(
            update(batches)
            .where(batches.c.id == batch.id)
            .values(
                epoch=batch.epoch + 1,
                lease_owner=holder,
                lease_s=lease_s,
                heartbeats=batches.c.heartbeats + 1,
                **pause_values(None),
            )
        )
        claimed = get_batch(connection, batch.id)
        self.lease_watch.saw(_lease(claimed))
        return claimed


def _leases(connection: Connection) -> list[Lease]:
    """All that are held."""
    unfinished = [status.value for status in (BatchStatus.VALIDATING, *LEASED)]
    rows = connection.execute(
        select(batches.c.id, batches.c.epoch, batches.c.heartbeats, batches.c.lease_s)
        .where(batches.c.status.in_([*unfinished, BatchStatus.QUEUED.value]))
        .where(batches.c.lease_owner.is_not(None))
    )
    return [Lease(row.id, row.epoch, row.heartbeats, row.lease_s or 0.0) for row in rows]


def _lease(batch: Batch) -> Lease:
    return Lease(batch.id, batch.epoch, batch.heartbeats, batch.lease_s or 0.0)


def _wanted() -> ColumnElement[bool]:
    """What a worker may run."""
    begun = and_(
        batches.c.status.in_([status.value for status in LEASED]),
        batches.c.started_at.is_not(None),
    )
    return or_(batches.c.status == BatchStatus.QUEUED.value, begun)


def _is_due(now: datetime) -> ColumnElement[bool]:
    """Not paused, or for long enough."""
    return or_(batches.c.retry_at.is_(None), batches.c.retry_at <= now)


def _waiting(connection: Connection, condition: ColumnElement[bool]) -> list[Waiting]:
    paused = [batches.c[name] for name in ("pause_kind", *pause_values(None))]
    rows = connection.execute(
        select(
            batches.c.id,
            batches.c.model,
            batches.c.total,
            batches.c.seq,
            batches.c.priority,
            batches.c.passed_over_at,
            batches.c.status,
            *paused,
        )
        .where(condition)
        # However many are paused, they hide nobody.
        .order_by(batches.c.paused_at.is_not(None), batches.c.seq)
        .limit(MAX_CONSIDERED)
    ).all()
    found = [
        Waiting(
            batch_id=row.id,
            model=row.model,
            num_requests=row.total,
            place=row.seq,
            priority=row.priority,
            passed_over_at=row.passed_over_at,
            begun=row.status != BatchStatus.QUEUED.value,
            paused=to_paused(dict(row._mapping)),
        )
        for row in rows
    ]
    return sorted(found, key=lambda one: one.place)


def _note_passed_over(connection: Connection, batch_ids: Sequence[str], now: datetime) -> None:
    """Rows that somebody else has at the moment are left out: their turn has come, or comes."""
    rows = (
        select(batches.c.seq)
        .where(batches.c.id.in_(batch_ids))
        .where(batches.c.passed_over_at.is_(None))
        .with_for_update(skip_locked=True)
    )
    connection.execute(update(batches).where(batches.c.seq.in_(rows)).values(passed_over_at=now))


def fenced_update(connection: Connection, batch: Batch, values: dict[str, Any]) -> None:
    result = connection.execute(
        update(batches)
        .where(batches.c.id == batch.id)
        .where(batches.c.epoch == batch.epoch)
        .where(batches.c.status.not_in([status.value for status in TERMINAL]))
        .values(**values)
    )
    if result.rowcount == 0:
        raise LeaseLost(f"Batch {batch.id} belongs to another worker by now, or has ended.")
