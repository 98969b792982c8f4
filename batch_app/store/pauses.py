"""Pauses: batches that go back to the queue until what they wait for has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, func, or_, select, update

from batch_app.core import PAUSES_OF_A_MODEL, TERMINAL, Batch, BatchStatus, Paused, PauseKind
from batch_app.database import batches
from batch_app.errors import LeaseLost
from batch_app.store.batches import change_state, get_batch
from batch_app.store.leases import fenced_update
from batch_app.store.rows import pause_values
from batch_app.store.transactions import Transactions

MAX_REASON_CHARS = 2000


@dataclass(frozen=True, slots=True)
class PauseCount:
    """How many batches are paused for a kind, and the reason of one of them."""

    kind: PauseKind
    num_batches: int
    reason: str


class PauseStore(Transactions):
    def pause(self, batch: Batch, paused: Paused, num_pauses: int) -> None:
        """Give a batch back to the queue, to be tried again as `paused` says. Raises LeaseLost.

        `num_pauses`: this one included. Others that wait for the same model are paused with it
        where they would meet the same. One that was to be cancelled meanwhile is only released.
        """
        values = pause_values(paused) | {"num_pauses": num_pauses}
        values["pause_reason"] = paused.reason[:MAX_REASON_CHARS]
        with self._write() as connection:
            current = get_batch(connection, batch.id, for_update=True)
            if current.epoch != batch.epoch or current.status in TERMINAL:
                raise LeaseLost(f"Batch {batch.id} belongs to another worker by now, or has ended.")
            is_cancelled = current.status is BatchStatus.CANCELLING
            if is_cancelled and batch.status is not BatchStatus.CANCELLING:
                fenced_update(connection, batch, {"lease_owner": None})
                return
            released = values | {"lease_owner": None}
            if current.status is BatchStatus.RUNNING:
                change_state(connection, current, BatchStatus.QUEUED, paused.since, **released)
            else:
                fenced_update(connection, batch, released)
            if paused.kind in PAUSES_OF_A_MODEL:
                others = and_(
                    batches.c.model == paused.model,
                    batches.c.status == BatchStatus.QUEUED.value,
                    batches.c.lease_owner.is_(None),
                    or_(batches.c.paused_at.is_(None), batches.c.pause_kind == paused.kind.value),
                )
                connection.execute(update(batches).where(others).values(**values))

    def count_paused(self) -> Sequence[PauseCount]:
        """The batches that are paused, by kind, the most frequent first."""
        query = (
            select(
                batches.c.pause_kind,
                func.count().label("number"),
                func.max(batches.c.pause_reason).label("reason"),
            )
            .where(batches.c.paused_at.is_not(None))
            .where(batches.c.status.not_in([status.value for status in TERMINAL]))
            .group_by(batches.c.pause_kind)
            .order_by(func.count().desc())
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
        return [PauseCount(PauseKind(row.pause_kind), row.number, row.reason) for row in rows]
