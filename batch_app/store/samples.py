"""The pace of batches: how far each was at some times. A bounded number of rows for each batch."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, insert, select
from sqlalchemy.engine import Connection

from batch_app.core import Progress, Sample
from batch_app.database import batch_samples, batches
from batch_app.keys import EVERYBODY, Caller
from batch_app.store.transactions import Transactions
from batch_app.store.visibility import visible

#: Most samples of a batch. At this number every second one goes.
MAX_SAMPLES = 240


class SampleStore(Transactions):
    def samples(self, batch_id: str, *, seen_by: Caller = EVERYBODY) -> list[Sample]:
        """A batch's series, oldest first; empty for one that is another's."""
        query = (
            select(
                batch_samples.c.at,
                batch_samples.c.completed,
                batch_samples.c.failed,
                batch_samples.c.total_tokens,
            )
            .join(batches, batches.c.id == batch_samples.c.batch_id)
            .where(batch_samples.c.batch_id == batch_id)
            .order_by(batch_samples.c.at)
        )
        with self._read() as connection:
            rows = connection.execute(visible(query, batches, seen_by)).all()
        return [Sample(**row._mapping) for row in rows]


def note_sample(connection: Connection, batch_id: str, at: datetime, progress: Progress) -> None:
    """Within the caller's transaction: add a sample, unless one stands too near before it.

    Once the series is half full, a new one has to keep the distance that the others have; when it
    is full, every second one goes, and the distance doubles. So a batch of minutes and one of days
    have equally many.
    """
    of_batch = batch_samples.c.batch_id == batch_id
    num, first, last = connection.execute(
        select(func.count(), func.min(batch_samples.c.at), func.max(batch_samples.c.at)).where(
            of_batch
        )
    ).one()
    if num:
        if at <= last:
            return  # a clock that stands still, or went back
        if num > MAX_SAMPLES // 2 and at - last < 0.75 * (last - first) / (num - 1):
            return
    if num >= MAX_SAMPLES:
        times = connection.scalars(
            select(batch_samples.c.at).where(of_batch).order_by(batch_samples.c.at)
        ).all()
        connection.execute(
            batch_samples.delete().where(of_batch).where(batch_samples.c.at.in_(times[1::2]))
        )
    connection.execute(
        insert(batch_samples).values(
            batch_id=batch_id,
            at=at,
            completed=progress.completed,
            failed=progress.failed,
            total_tokens=progress.tokens.total_tokens,
        )
    )
