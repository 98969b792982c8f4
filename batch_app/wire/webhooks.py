"""Webhooks and their deliveries as JSON, in both dialects alike. All times are Unix seconds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from batch_app.webhooks import EVENT_TYPES, Webhook, WebhookDelivery

MAX_URL_CHARS = 2048
MAX_SECRET_CHARS = 100


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class WebhookCreate(_Body):
    """The body of `POST /v1/webhooks`. `events`: which to announce; by default all. `secret`: one
    of your own, `whsec_` and 24 to 64 bytes in base64; by default the server makes one."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=MAX_URL_CHARS)
    events: list[Literal[EVENT_TYPES]] | None = Field(None, min_length=1, max_length=16)  # type: ignore[valid-type]
    secret: str | None = Field(None, max_length=MAX_SECRET_CHARS)


class WebhookBody(_Body):
    """A webhook. `secret` is sent once, in the answer that made it, and null after that. With a
    `batch_id` it announces the end of that batch alone."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    batch_id: str | None
    created_at: int
    disabled_at: int | None
    disabled_reason: str | None
    secret: str | None


class WebhookListBody(_Body):
    object: Literal["list"] = "list"
    data: list[WebhookBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedWebhookBody(_Body):
    id: str
    object: Literal["webhook"] = "webhook"
    deleted: Literal[True] = True


class DeliveryBody(_Body):
    """An event and how its delivery stands. `id` is the event's, and the `webhook-id` of each
    attempt; `state` is `pending`, `delivered` or `failed` (given up)."""

    id: str
    object: Literal["webhook.delivery"] = "webhook.delivery"
    webhook_id: str
    batch_id: str
    type: str
    state: str
    created_at: int
    attempts: int
    last_attempt_at: int | None
    next_attempt_at: int | None
    delivered_at: int | None
    status_code: int | None
    error: str | None


class DeliveryListBody(_Body):
    object: Literal["list"] = "list"
    data: list[DeliveryBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


def webhook_body(webhook: Webhook, *, with_secret: bool = False) -> WebhookBody:
    return WebhookBody(
        id=webhook.id,
        url=webhook.url,
        events=list(webhook.events),
        batch_id=webhook.batch_id,
        created_at=int(webhook.created_at.timestamp()),
        disabled_at=_unix(webhook.disabled_at),
        disabled_reason=webhook.disabled_reason,
        secret=webhook.secret if with_secret else None,
    )


def webhook_list_body(webhooks: Sequence[Webhook], has_more: bool) -> WebhookListBody:
    return WebhookListBody(
        data=[webhook_body(webhook) for webhook in webhooks],
        first_id=webhooks[0].id if webhooks else None,
        last_id=webhooks[-1].id if webhooks else None,
        has_more=has_more,
    )


def delivery_body(delivery: WebhookDelivery) -> DeliveryBody:
    is_pending = delivery.state == "pending"
    return DeliveryBody(
        id=delivery.id,
        webhook_id=delivery.webhook_id,
        batch_id=delivery.batch_id,
        type=delivery.type,
        state=delivery.state.value,
        created_at=int(delivery.created_at.timestamp()),
        attempts=delivery.attempts,
        last_attempt_at=_unix(delivery.last_attempt_at),
        next_attempt_at=_unix(delivery.next_attempt_at) if is_pending else None,
        delivered_at=_unix(delivery.delivered_at),
        status_code=delivery.status_code,
        error=delivery.error,
    )


def delivery_list_body(page: Sequence[WebhookDelivery], has_more: bool) -> DeliveryListBody:
    return DeliveryListBody(
        data=[delivery_body(delivery) for delivery in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=has_more,
    )


def _unix(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
