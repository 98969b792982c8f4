"""What the command line says of a paused batch."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from batch_app import client
from batch_app.cli.batches import _row
from batch_app.cli.figures import pause_text
from batch_app.cli.remote import facts
from batch_app.client.states import batch_of
from batch_app.core import Batch, Paused, PauseKind
from batch_app.wire.native import batch_body
from support.batches import a_batch

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
AWAY = Paused(PauseKind.HUB, "It is away.", NOW, NOW + timedelta(seconds=90), model="m", entry="")


def seen(batch: Batch) -> client.Batch:
    """As the client sees it."""
    return batch_of(batch_body(batch).model_dump())


def test_status_says_why_and_when_it_is_tried_again() -> None:
    batch = seen(a_batch(paused=AWAY))
    assert batch.status == "pending"
    assert pause_text(batch, NOW) == "It is away. (waits for: hub; next try in 1 min 30 s)"
    assert pause_text(batch, NOW + timedelta(hours=1)).endswith("next try now)")
    rejected = seen(a_batch(paused=replace(AWAY, retry_at=None)))
    assert pause_text(rejected, NOW) == "It is away. (waits for: hub)"
    assert dict(facts(batch))["paused"].startswith("It is away. (waits for: hub")
    assert pause_text(seen(a_batch())) == ""
    assert "paused" not in dict(facts(seen(a_batch())))


def test_a_list_names_the_kind() -> None:
    assert _row(seen(a_batch(paused=AWAY)))[1] == "pending, paused (hub)"
    assert _row(seen(a_batch()))[1] == "pending"
