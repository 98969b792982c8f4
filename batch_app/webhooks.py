"""Webhooks: where a batch's end is announced, and what such an announcement says. Pure.

The form is that of Standard Webhooks (https://www.standardwebhooks.com), the events are OpenAI's.
An event has one body, byte for byte the same at each attempt; each attempt is signed anew with its
own time.
"""

from __future__ import annotations

import base64
import binascii
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

import orjson
from standardwebhooks import Webhook as Signer

from batch_app.core import TERMINAL, BatchStatus

SECRET_PREFIX = "whsec_"  # noqa: S105 - how every secret begins
#: Bytes of a secret, as Standard Webhooks has them.
SECRET_BYTES = range(24, 65)
#: Each pause is so many times as long as the one before, up to the longest, with jitter.
BACKOFF_FACTOR = 3.0
MAX_BACKOFF_S = 12 * 3600.0
JITTER = 0.25

#: The batch that a test event speaks of; there is none with this id.
TEST_BATCH_ID = f"batch_{'0' * 24}"


def event_type(status: BatchStatus) -> str:
    """What the end of a batch in this state is called."""
    return f"batch.{status.value}"


EVENT_TYPES = tuple(sorted(event_type(status) for status in TERMINAL))


class DeliveryState(StrEnum):
    """`FAILED`: given up, after the last attempt or because its webhook is disabled."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Webhook:
    """A target of announcements. With `batch_id`, of that batch's end alone; else of the end of
    every batch of its `owner`. A disabled one gets nothing any more."""

    id: str
    url: str
    secret: str = field(repr=False)
    created_at: datetime
    owner: str | None = None
    batch_id: str | None = None
    events: tuple[str, ...] = EVENT_TYPES
    disabled_at: datetime | None = None
    disabled_reason: str | None = None


@dataclass(frozen=True, slots=True)
class WebhookDelivery:
    """One event on its way to one webhook. `id` is the event's, the same at each attempt.

    `epoch` counts what has happened to it; who would change it under an older one changes nothing.
    `status_code`: of the last answer. `error`: why the last attempt failed, in a few words.
    """

    id: str
    webhook_id: str
    batch_id: str
    type: str
    created_at: datetime
    state: DeliveryState = DeliveryState.PENDING
    attempts: int = 0
    next_attempt_at: datetime | None = None
    last_attempt_at: datetime | None = None
    delivered_at: datetime | None = None
    status_code: int | None = None
    error: str | None = None
    owner: str | None = None
    epoch: int = 0

    @property
    def is_test(self) -> bool:
        return self.batch_id == TEST_BATCH_ID


def new_webhook_id() -> str:
    return f"webhook_{secrets.token_hex(12)}"


def new_event_id() -> str:
    return f"evt_{secrets.token_hex(12)}"


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def is_secret(text: str) -> bool:
    """Whether this is `whsec_` and 24 to 64 bytes in base64."""
    try:
        raw = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return False
    return text.startswith(SECRET_PREFIX) and len(raw) in SECRET_BYTES


def event_body(delivery: WebhookDelivery) -> bytes:
    """The JSON that is sent: which batch has ended and how, and nothing of what is in it. A test
    event says that it is one."""
    body = {
        "id": delivery.id,
        "object": "event",
        "type": delivery.type,
        "created_at": int(delivery.created_at.timestamp()),
        "data": {"id": delivery.batch_id},
    }
    return orjson.dumps(body | {"test": True} if delivery.is_test else body)


def event_of_test(webhook: Webhook) -> str:
    """Of the events that a webhook is for, the one that it is tried with."""
    usual = event_type(BatchStatus.COMPLETED)
    return usual if usual in webhook.events else webhook.events[0]


def signed_headers(secret: str, event_id: str, body: bytes, now: datetime) -> dict[str, str]:
    """The headers of one attempt, which sign exactly this body. `now`: aware, the time of day."""
    moment = now.astimezone(UTC)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Signer(secret).sign(event_id, moment, body.decode()),
    }


def backoff_s(
    attempts: int, first_s: float, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """Seconds to wait after so many failed attempts."""
    pause_s = first_s * BACKOFF_FACTOR ** min(attempts - 1, 50)
    return min(pause_s, MAX_BACKOFF_S) * uniform(1 - JITTER, 1 + JITTER)
