"""Webhooks and their outbox in the store.

An event is a row of `webhook_deliveries`, written in the transaction that ends its batch: it is
there if and only if the batch has ended. Whoever sends it holds its row meanwhile, and holds are
watched like the leases of batches (`lease_watch`): a jump of the clock neither has two servers send
at once nor keeps a pause from ending.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from batch_app.core import Batch
from batch_app.database import batches, lock, webhook_deliveries, webhooks
from batch_app.errors import LeaseLost, NotFound, TooMany
from batch_app.keys import EVERYBODY, Caller
from batch_app.store.lease_watch import Lease, LeaseWatch
from batch_app.store.transactions import Transactions
from batch_app.store.visibility import visible
from batch_app.webhooks import (
    TEST_BATCH_ID,
    DeliveryState,
    Webhook,
    WebhookDelivery,
    event_of_test,
    event_type,
    new_event_id,
)

#: Of one look at what waits to be sent.
MAX_LOOKED_AT = 5000
_PENDING = webhook_deliveries.c.state == DeliveryState.PENDING.value


class WebhookStore(Transactions):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.delivery_watch = LeaseWatch()

    def add_webhook(self, webhook: Webhook, *, max_webhooks: int = 0) -> None:
        """`max_webhooks`: of its owner, those of single batches not counted; 0 means no limit.

        Raises TooMany.
        """
        with self._write() as connection:
            if max_webhooks:
                lock(connection, f"webhooks of {webhook.owner}")
                query = (
                    select(func.count())
                    .select_from(webhooks)
                    .where(
                        webhooks.c.batch_id.is_(None),
                        webhooks.c.owner.is_not_distinct_from(webhook.owner),
                    )
                )
                if (connection.scalar(query) or 0) >= max_webhooks:
                    raise TooMany(
                        f"You have {max_webhooks} webhooks (max_webhooks). Delete one first.",
                        code="too_many_webhooks",
                        retry_after_s=60,
                        repeatable=False,
                    )
            insert_webhook(connection, webhook)

    def get_webhook(self, webhook_id: str, *, seen_by: Caller = EVERYBODY) -> Webhook:
        """Raises NotFound, also for one that is another's."""
        with self._read() as connection:
            return _get_webhook(connection, webhook_id, seen_by)

    def list_webhooks(
        self,
        *,
        limit: int,
        after: str | None = None,
        batch_id: str | None = None,
        seen_by: Caller = EVERYBODY,
    ) -> tuple[list[Webhook], bool]:
        """Newest first, and whether there are more. Raises NotFound for an unknown `after`."""
        query = visible(select(webhooks), webhooks, seen_by)
        if batch_id is not None:
            query = query.where(webhooks.c.batch_id == batch_id)
        query = query.order_by(webhooks.c.seq.desc()).limit(limit + 1)
        with self._read() as connection:
            if after is not None:
                place = visible(
                    select(webhooks.c.seq).where(webhooks.c.id == after), webhooks, seen_by
                )
                seq = connection.scalar(place)
                if seq is None:
                    raise NotFound(f"No such webhook: {after}", param="after")
                query = query.where(webhooks.c.seq < seq)
            rows = connection.execute(query).all()
        return [_to_webhook(row) for row in rows[:limit]], len(rows) > limit

    def webhook_of_batch(self, batch_id: str) -> Webhook | None:
        """The one that was given with the batch."""
        query = select(webhooks).where(webhooks.c.batch_id == batch_id).limit(1)
        with self._read() as connection:
            row = connection.execute(query).first()
        return None if row is None else _to_webhook(row)

    def delete_webhook(self, webhook_id: str, *, seen_by: Caller = EVERYBODY) -> Webhook:
        """With all its deliveries, those to come included. Raises NotFound."""
        with self._write() as connection:
            webhook = _get_webhook(connection, webhook_id, seen_by, for_update=True)
            connection.execute(
                delete(webhook_deliveries).where(webhook_deliveries.c.webhook_id == webhook_id)
            )
            connection.execute(delete(webhooks).where(webhooks.c.id == webhook_id))
        return webhook

    def list_deliveries(
        self,
        webhook_id: str,
        *,
        limit: int,
        after: str | None = None,
        state: DeliveryState | None = None,
        seen_by: Caller = EVERYBODY,
    ) -> tuple[list[WebhookDelivery], bool]:
        """Newest first, and whether there are more. Raises NotFound."""
        columns = webhook_deliveries.c
        query = select(webhook_deliveries).where(columns.webhook_id == webhook_id)
        if state is not None:
            query = query.where(columns.state == state.value)
        query = query.order_by(columns.seq.desc()).limit(limit + 1)
        with self._read() as connection:
            _get_webhook(connection, webhook_id, seen_by)
            if after is not None:
                place = select(columns.seq).where(columns.webhook_id == webhook_id)
                seq = connection.scalar(place.where(columns.id == after))
                if seq is None:
                    raise NotFound(f"No such delivery: {after}", param="after")
                query = query.where(columns.seq < seq)
            rows = connection.execute(query).all()
        return [_to_delivery(row) for row in rows[:limit]], len(rows) > limit

    def replay_delivery(
        self, webhook_id: str, delivery_id: str, now: datetime, *, seen_by: Caller = EVERYBODY
    ) -> WebhookDelivery:
        """Have an event sent once more, from its first attempt on; also to a webhook that was
        disabled, which isn't any more. One that is being sent stays as it is. Raises NotFound."""
        columns = webhook_deliveries.c
        with self._write() as connection:
            webhook = _get_webhook(connection, webhook_id, seen_by, for_update=True)
            query = (
                select(webhook_deliveries)
                .where(columns.id == delivery_id)
                .where(columns.webhook_id == webhook_id)
                .with_for_update()
            )
            row = connection.execute(query).first()
            if row is None:
                raise NotFound(f"No such delivery: {delivery_id}", param="delivery_id")
            _enable(connection, webhook)
            if row.lease_owner is None:
                connection.execute(
                    update(webhook_deliveries)
                    .where(columns.id == delivery_id)
                    .values(
                        state=DeliveryState.PENDING.value,
                        attempts=0,
                        next_attempt_at=now,
                        delivered_at=None,
                        hold_s=0.0,
                        epoch=columns.epoch + 1,
                    )
                )
            return _to_delivery(connection.execute(query).one())

    def test_webhook(
        self, webhook_id: str, now: datetime, *, seen_by: Caller = EVERYBODY
    ) -> WebhookDelivery:
        """Have a test event sent, in place of the one before, so that there is one at most. Also to
        a webhook that was disabled, which isn't any more. Raises NotFound."""
        columns = webhook_deliveries.c
        with self._write() as connection:
            webhook = _get_webhook(connection, webhook_id, seen_by, for_update=True)
            _enable(connection, webhook)
            connection.execute(
                delete(webhook_deliveries)
                .where(columns.webhook_id == webhook_id)
                .where(columns.batch_id == TEST_BATCH_ID)
            )
            event = _event(webhook, TEST_BATCH_ID, event_of_test(webhook), now)
            connection.execute(insert(webhook_deliveries), [event])
            query = select(webhook_deliveries).where(columns.id == event["id"])
            return _to_delivery(connection.execute(query).one())

    # -- the outbox ----------------------------------------------------------------------------

    def claim_delivery(
        self,
        holder: str,
        hold_s: float,
        now: datetime,
        *,
        busy_webhooks: Collection[str] = (),
        busy_owners: Collection[str | None] = (),
    ) -> tuple[Webhook, WebhookDelivery] | None:
        """Give the caller the oldest event that is due, to be sent within `hold_s` seconds. None:
        there is none, but of webhooks and owners that are busy."""
        columns = webhook_deliveries.c
        query = (
            select(
                columns.id,
                columns.webhook_id,
                columns.owner,
                columns.epoch,
                columns.hold_s,
                columns.lease_owner,
                columns.next_attempt_at,
            )
            .where(_PENDING)
            .order_by(columns.seq)
            .limit(MAX_LOOKED_AT)
        )
        with self._read() as connection:  # locks nothing: idle servers look often
            rows = connection.execute(query).all()
        held = [Lease(row.id, row.epoch, 0, row.hold_s) for row in rows]
        over = {lease.batch_id for lease in self.delivery_watch.run_out(held)}
        for row in rows:
            if row.webhook_id in busy_webhooks or row.owner in busy_owners:
                continue
            waits = row.lease_owner is None and row.next_attempt_at <= now
            if waits or row.id in over:
                claimed = self._claim_delivery(row.id, row.epoch, holder, hold_s, now)
                if claimed is not None:
                    return claimed
        return None

    def _claim_delivery(
        self, delivery_id: str, epoch: int, holder: str, hold_s: float, now: datetime
    ) -> tuple[Webhook, WebhookDelivery] | None:
        columns = webhook_deliveries.c
        with self._write() as connection:
            taken = connection.execute(
                update(webhook_deliveries)
                .where(columns.id == delivery_id)
                .where(columns.epoch == epoch)
                .where(_PENDING)
                .values(
                    lease_owner=holder,
                    hold_s=hold_s,
                    epoch=epoch + 1,
                    attempts=columns.attempts + 1,
                    last_attempt_at=now,
                )
            )
            if taken.rowcount == 0:
                return None  # another server was faster
            row = connection.execute(
                select(webhook_deliveries).where(columns.id == delivery_id)
            ).one()
            webhook = _get_webhook(connection, row.webhook_id, EVERYBODY)
        self.delivery_watch.saw(Lease(delivery_id, epoch + 1, 0, hold_s))
        return webhook, _to_delivery(row)

    def delivery_succeeded(
        self, delivery: WebhookDelivery, now: datetime, status_code: int
    ) -> None:
        """Raises LeaseLost where the delivery is another's by now, or gone."""
        with self._write() as connection:
            _settle(
                connection,
                delivery,
                state=DeliveryState.DELIVERED.value,
                delivered_at=now,
                status_code=status_code,
                error=None,
            )

    def delivery_failed(
        self,
        delivery: WebhookDelivery,
        now: datetime,
        *,
        error: str,
        status_code: int | None = None,
        again_in_s: float | None = None,
        disables: bool = False,
    ) -> None:
        """`again_in_s`: None gives it up. `disables`: and everything else for its webhook.

        Raises LeaseLost.
        """
        values: dict[str, Any] = {"status_code": status_code, "error": error}
        if again_in_s is None:
            values |= {"state": DeliveryState.FAILED.value}
        else:
            next_attempt_at = now + timedelta(seconds=again_in_s)
            values |= {"hold_s": again_in_s, "next_attempt_at": next_attempt_at}
        with self._write() as connection:
            if disables:  # in the order of `delete_webhook`, or they might wait for each other
                of_delivery = webhooks.c.id == delivery.webhook_id
                connection.execute(select(webhooks.c.id).where(of_delivery).with_for_update())
            _settle(connection, delivery, **values)
            if disables:
                connection.execute(
                    update(webhooks)
                    .where(webhooks.c.id == delivery.webhook_id)
                    .values(disabled_at=now, disabled_reason=error)
                )
                connection.execute(
                    update(webhook_deliveries)
                    .where(webhook_deliveries.c.webhook_id == delivery.webhook_id)
                    .where(_PENDING)
                    .values(
                        state=DeliveryState.FAILED.value,
                        error="The webhook is disabled.",
                        lease_owner=None,
                        epoch=webhook_deliveries.c.epoch + 1,
                    )
                )

    def forget_deliveries(self, before: datetime) -> int:
        """Forget what was settled before this time, and webhooks of single batches that have
        nothing to send any more. Returns how many deliveries."""
        columns = webhook_deliveries.c
        old = and_(~_PENDING, func.coalesce(columns.last_attempt_at, columns.created_at) < before)
        with self._read() as connection:
            if connection.execute(select(columns.id).where(old).limit(1)).first() is None:
                return 0
        with self._write() as connection:
            num = connection.execute(delete(webhook_deliveries).where(old)).rowcount
            ended = select(batches.c.id).where(
                or_(
                    batches.c.completed_at < before,
                    batches.c.failed_at < before,
                    batches.c.expired_at < before,
                    batches.c.cancelled_at < before,
                )
            )
            connection.execute(
                delete(webhooks)
                .where(webhooks.c.batch_id.in_(ended))
                .where(~exists().where(columns.webhook_id == webhooks.c.id))
            )
        return int(num)

    def count_deliveries(self) -> dict[DeliveryState, int]:
        """How many there are in each state."""
        columns = webhook_deliveries.c
        query = select(columns.state, func.count()).group_by(columns.state)
        counts = dict.fromkeys(DeliveryState, 0)
        with self._read() as connection:
            counts |= {DeliveryState(state): num for state, num in connection.execute(query)}
        return counts


def insert_webhook(connection: Connection, webhook: Webhook) -> None:
    """Within the caller's transaction."""
    values = asdict(webhook) | {"events": ",".join(webhook.events)}
    connection.execute(insert(webhooks).values(values))


def announce(connection: Connection, batch: Batch, now: datetime) -> None:
    """Within the transaction that ends the batch: put its event into the outbox."""
    kind = event_type(batch.status)
    own = and_(webhooks.c.batch_id.is_(None), webhooks.c.owner.is_not_distinct_from(batch.owner))
    query = (
        select(webhooks)
        .where(or_(webhooks.c.batch_id == batch.id, own))
        .where(webhooks.c.disabled_at.is_(None))
        .order_by(webhooks.c.seq)
        .with_for_update(read=True, key_share=True)  # or it might be deleted meanwhile
    )
    rows = [
        _event(webhook, batch.id, kind, now)
        for webhook in map(_to_webhook, connection.execute(query))
        if kind in webhook.events
    ]
    if rows:
        connection.execute(insert(webhook_deliveries), rows)


def _event(webhook: Webhook, batch_id: str, kind: str, now: datetime) -> dict[str, Any]:
    """A row of the outbox, to be sent at once."""
    return {
        "id": new_event_id(),
        "webhook_id": webhook.id,
        "batch_id": batch_id,
        "type": kind,
        "created_at": now,
        "state": DeliveryState.PENDING.value,
        "next_attempt_at": now,
        "owner": webhook.owner,
    }


def _enable(connection: Connection, webhook: Webhook) -> None:
    if webhook.disabled_at is not None:
        connection.execute(
            update(webhooks)
            .where(webhooks.c.id == webhook.id)
            .values(disabled_at=None, disabled_reason=None)
        )


def _settle(connection: Connection, delivery: WebhookDelivery, **values: Any) -> None:
    columns = webhook_deliveries.c
    changed = connection.execute(
        update(webhook_deliveries)
        .where(columns.id == delivery.id)
        .where(columns.epoch == delivery.epoch)
        .values(lease_owner=None, epoch=delivery.epoch + 1, **values)
    )
    if changed.rowcount == 0:
        raise LeaseLost(f"The delivery {delivery.id} is another server's by now, or gone.")


def _get_webhook(
    connection: Connection, webhook_id: str, seen_by: Caller, *, for_update: bool = False
) -> Webhook:
    query = visible(select(webhooks).where(webhooks.c.id == webhook_id), webhooks, seen_by)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        raise NotFound(f"No such webhook: {webhook_id}", param="webhook_id")
    return _to_webhook(row)


def _to_webhook(row: Row[Any]) -> Webhook:
    values = dict(row._mapping)
    del values["seq"]
    values["events"] = tuple(values["events"].split(","))
    return Webhook(**values)


def _to_delivery(row: Row[Any]) -> WebhookDelivery:
    values = dict(row._mapping)
    for name in ("seq", "hold_s", "lease_owner"):
        del values[name]
    values["state"] = DeliveryState(values["state"])
    return WebhookDelivery(**values)
