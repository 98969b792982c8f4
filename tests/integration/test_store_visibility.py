"""Each question that the API asks the store is filtered by itself, whatever was asked before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch_app.core import (
    Batch,
    BatchStatus,
    FilePurpose,
    Idempotency,
    Progress,
    Sample,
    StoredFile,
    Upload,
    UploadPart,
    UploadStatus,
)
from batch_app.errors import NotFound, TooMany
from batch_app.files import new_id
from batch_app.keys import EVERYBODY, Caller
from batch_app.store import Store
from batch_app.store.samples import note_sample
from batch_app.webhooks import Webhook, new_secret
from support.batches import a_batch

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ANA, BOB = Caller("ana", sees_all=False), Caller("bob", sees_all=False)
ADMIN = Caller("admin", sees_all=True)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url)
    store.migrate()
    yield store
    store.close()


def a_file(owner: str = "ana") -> StoredFile:
    return StoredFile(new_id("file"), FilePurpose.BATCH, "a.jsonl", 10, NOW, owner=owner)


def batch_of(file_id: str, owner: str = "ana") -> Batch:
    return a_batch(input_file_id=file_id, created_at=NOW, queued_at=NOW, owner=owner)


class Ana:
    """What Ana has: a file of its own, one with a batch, and an upload with a part."""

    def __init__(self, store: Store) -> None:
        self.file, self.input = a_file(), a_file()
        store.add_file(self.file)
        self.batch = store.add_batch(batch_of(self.input.id), self.input)
        self.upload = Upload(
            new_id("upload"),
            "u",
            FilePurpose.BATCH,
            4,
            "text/plain",
            UploadStatus.PENDING,
            NOW,
            NOW + timedelta(hours=1),
            owner="ana",
        )
        store.add_upload(self.upload)
        store.add_part(UploadPart(new_id("part"), self.upload.id, 4, NOW))
        self.webhook = Webhook(
            new_id("webhook"), "https://example.org/", new_secret(), NOW, owner="ana"
        )
        store.add_webhook(self.webhook)
        ended = store.add_batch(batch_of(self.input.id))
        store.cancel_queued(ended.id, NOW)
        (self.delivery,) = store.list_deliveries(self.webhook.id, limit=1)[0]


def ask_of_key(store: Store, ana: Ana, who: Caller) -> Batch | None:
    """A batch that an admin retried for Ana under an idempotency key; who asks uses the same."""
    idempotency = Idempotency("run-7", "said")
    batch = batch_of(ana.file.id)
    store.add_batch(batch, idempotency=idempotency, seen_by=ADMIN if who.sees_all else ANA)
    return store.batch_of_key(idempotency, seen_by=who)


def ask_for_the_pace(store: Store, ana: Ana, who: Caller) -> list[Sample]:
    with store._write() as connection:
        note_sample(connection, ana.batch.id, NOW, Progress(1))
    return store.samples(ana.batch.id, seen_by=who)


Question = Callable[[Store, Ana, Caller], Any]
QUESTIONS: dict[str, Question] = {
    "get_batch": lambda store, ana, who: store.get_batch(ana.batch.id, seen_by=who),
    "list_batches": lambda store, ana, who: store.list_batches(limit=9, seen_by=who)[0],
    "cancel_queued": lambda store, ana, who: store.cancel_queued(ana.batch.id, NOW, seen_by=who),
    "request_cancel": lambda store, ana, who: store.request_cancel(ana.batch.id, NOW, seen_by=who),
    "add_batch": lambda store, ana, who: store.add_batch(batch_of(ana.file.id), seen_by=who),
    "batch_of_key": ask_of_key,
    "get_file": lambda store, ana, who: store.get_file(ana.file.id, seen_by=who),
    "list_files": lambda store, ana, who: store.list_files(limit=9, seen_by=who)[0],
    "file_names": lambda store, ana, who: store.file_names([ana.file.id], seen_by=who),
    "which_batches": lambda store, ana, who: store.which_batches([ana.batch.id], seen_by=who),
    "samples": ask_for_the_pace,
    "delete_file": lambda store, ana, who: store.delete_file(ana.file.id, NOW, seen_by=who),
    "get_upload": lambda store, ana, who: store.get_upload(ana.upload.id, NOW, seen_by=who),
    "get_parts": lambda store, ana, who: store.get_parts(ana.upload.id, seen_by=who),
    "complete_upload": lambda store, ana, who: store.complete_upload(
        ana.upload.id, a_file(), seen_by=who
    ),
    "get_webhook": lambda store, ana, who: store.get_webhook(ana.webhook.id, seen_by=who),
    "list_webhooks": lambda store, ana, who: store.list_webhooks(limit=9, seen_by=who)[0],
    "delete_webhook": lambda store, ana, who: store.delete_webhook(ana.webhook.id, seen_by=who),
    "list_deliveries": lambda store, ana, who: store.list_deliveries(
        ana.webhook.id, limit=9, seen_by=who
    )[0],
    "replay_delivery": lambda store, ana, who: store.replay_delivery(
        ana.webhook.id, ana.delivery.id, NOW, seen_by=who
    ),
    "test_webhook": lambda store, ana, who: store.test_webhook(ana.webhook.id, NOW, seen_by=who),
    "cancel_upload": lambda store, ana, who: store.cancel_upload(ana.upload.id, seen_by=who),
}


def test_no_filtered_question_is_missing_here() -> None:
    filtered = {
        name
        for name, method in inspect.getmembers(Store, inspect.isfunction)
        if "seen_by" in inspect.signature(method).parameters
    }
    assert filtered == set(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_somebody_else_gets_nothing(store: Store, question: str) -> None:
    ana = Ana(store)
    with suppress(NotFound):
        assert not QUESTIONS[question](store, ana, BOB)
    assert store.get_batch(ana.batch.id).status is BatchStatus.QUEUED
    assert store.get_file(ana.file.id)
    assert store.get_upload(ana.upload.id, NOW).status is UploadStatus.PENDING
    assert store.list_deliveries(ana.webhook.id, limit=9)[0] == [ana.delivery]


@pytest.mark.parametrize("who", [ANA, ADMIN], ids=["ana", "admin"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_owner_and_the_admin_get_it(store: Store, question: str, who: Caller) -> None:
    assert QUESTIONS[question](store, Ana(store), who)


def test_the_program_itself_sees_all(store: Store) -> None:
    ana = Ana(store)
    assert store.get_batch(ana.batch.id) == store.get_batch(ana.batch.id, seen_by=EVERYBODY)


def test_unfinished_batches_are_counted_by_owner(store: Store) -> None:
    ana = Ana(store)
    with pytest.raises(TooMany):
        store.add_batch(batch_of(ana.file.id), seen_by=ANA, max_unfinished=1)
    bobs = a_file("bob")
    store.add_batch(batch_of(bobs.id, "bob"), bobs, seen_by=BOB, max_unfinished=1)
    store.cancel_queued(ana.batch.id, NOW)
    store.add_batch(batch_of(ana.file.id), seen_by=ANA, max_unfinished=1)
    with pytest.raises(TooMany):
        store.require_room("ana", 1)
    store.require_room("ana", 0)
