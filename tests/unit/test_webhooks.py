"""What is announced, how it is signed, and how long the pauses are."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks import Webhook as Verifier

from batch_app.webhooks import (
    EVENT_TYPES,
    MAX_BACKOFF_S,
    TEST_BATCH_ID,
    Webhook,
    WebhookDelivery,
    backoff_s,
    event_body,
    event_of_test,
    is_secret,
    new_event_id,
    new_secret,
    signed_headers,
)

CREATED = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def delivery(kind: str = "batch.completed") -> WebhookDelivery:
    return WebhookDelivery(new_event_id(), "webhook_1", "batch_1", kind, CREATED)


def test_the_four_events() -> None:
    assert set(EVENT_TYPES) == {
        "batch.completed",
        "batch.failed",
        "batch.expired",
        "batch.cancelled",
    }


def test_the_body_says_which_batch_and_nothing_of_it() -> None:
    one = delivery()
    assert json.loads(event_body(one)) == {
        "id": one.id,
        "object": "event",
        "type": "batch.completed",
        "created_at": 1767323045,
        "data": {"id": "batch_1"},
    }
    assert event_body(one) == event_body(one)


@pytest.mark.parametrize("kind", EVENT_TYPES)
def test_a_test_event_says_that_it_is_one_and_is_unwrapped(kind: str) -> None:
    webhook = Webhook("webhook_1", "https://example.org/", new_secret(), CREATED, events=(kind,))
    assert event_of_test(webhook) == kind
    one = replace(delivery(kind), batch_id=TEST_BATCH_ID)
    body = event_body(one)
    assert json.loads(body)["test"] is True
    headers = signed_headers(webhook.secret, one.id, body, datetime.now(UTC))
    event = OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=webhook.secret)
    assert (event.type, event.data.id) == (kind, TEST_BATCH_ID)


@pytest.mark.parametrize("kind", EVENT_TYPES)
def test_both_libraries_accept_the_signature(kind: str) -> None:
    one, secret = delivery(kind), new_secret()
    body = event_body(one)
    # A clock that tells local time means the same moment.
    now = datetime.now(timezone(timedelta(hours=-7)))
    headers = signed_headers(secret, one.id, body, now)
    assert Verifier(secret).verify(body, headers)["type"] == kind
    client = OpenAI(api_key="none", webhook_secret=secret)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == (kind, "batch_1")
    for changed in (body.replace(b"batch_1", b"batch_2"), body + b" "):
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(changed, headers)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=new_secret())


def test_secrets() -> None:
    assert is_secret(new_secret())
    assert new_secret() != new_secret()
    good = "whsec_" + "A" * 32  # 24 bytes
    assert is_secret(good)
    for bad in (
        good[6:],
        "whsec_" + "A" * 28,  # 21 bytes
        "whsec_" + "A" * 88,  # 66 bytes
        "whsec_" + "A" * 33,
        "whsec_" + "é" * 32,
        "whsec_" + "A" * 31 + "!",
        "whsec_",
        "",
    ):
        assert not is_secret(bad), bad


def test_a_secret_is_not_in_what_is_printed() -> None:
    webhook = Webhook("webhook_1", "https://example.org/", "whsec_hidden", CREATED)
    assert "hidden" not in repr(webhook)


def test_pauses_grow_to_a_bound_and_spread() -> None:
    plain = [backoff_s(number, 5.0, lambda low, high: 1.0) for number in range(1, 16)]
    assert plain[:4] == [5.0, 15.0, 45.0, 135.0]
    assert plain[-1] == MAX_BACKOFF_S
    assert 2 * 86400 < sum(plain) < 5 * 86400, "over days, not weeks"
    assert backoff_s(10**9, 5.0, lambda low, high: 1.0) == MAX_BACKOFF_S
    several = {backoff_s(2, 5.0) for _ in range(50)}
    assert len(several) > 40
    assert all(15 * 0.75 <= pause <= 15 * 1.25 for pause in several)
