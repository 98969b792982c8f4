"""The pace of a batch in the store: noted with the lease, bounded, and its owner's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, Progress, StoredFile
from batch_app.core import TokenCounts as Tokens
from batch_app.keys import Caller
from batch_app.store import Store
from batch_app.store.samples import MAX_SAMPLES

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_S = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def batch(store: Store) -> Batch:
    """A batch of ana's, in a worker's hands."""
    batch = Batch(
        id="batch_1",
        dialect=Dialect.NATIVE,
        status=BatchStatus.QUEUED,
        endpoint="/v1/chat/completions",
        model="sim",
        input_file_id="file-1",
        created_at=NOW,
        total=1_000_000,
        owner="ana",
    )
    file = StoredFile("file-1", FilePurpose.BATCH, "in.jsonl", 1, NOW, owner="ana")
    store.add_batch(batch, file)
    claimed = store.claim_next("worker", LEASE_S, NOW)
    assert claimed is not None
    return claimed


def tell(store: Store, batch: Batch, second: float, done: int) -> None:
    store.renew(
        batch,
        lease_s=LEASE_S,
        progress=Progress(done, 1, Tokens(done, 2 * done)),
        at=NOW + timedelta(seconds=second),
    )


def test_what_a_worker_tells_is_noted(store: Store, batch: Batch) -> None:
    assert store.samples(batch.id) == []
    store.renew(batch, lease_s=LEASE_S, progress=Progress(5))
    assert store.samples(batch.id) == [], "without a time"
    tell(store, batch, 5, 100)
    tell(store, batch, 10, 200)
    (first, second) = store.samples(batch.id)
    assert (first.at, first.completed, first.failed) == (NOW + timedelta(seconds=5), 100, 1)
    assert (second.done, second.total_tokens) == (201, 600)


def test_a_clock_that_stands_still_or_goes_back_breaks_nothing(store: Store, batch: Batch) -> None:
    for second in (5, 5, 3, 6):
        tell(store, batch, second, 100 + second)
    assert [sample.completed for sample in store.samples(batch.id)] == [105, 106]


def test_a_long_batch_has_no_more_samples_than_a_short_one(store: Store, batch: Batch) -> None:
    num = 10 * MAX_SAMPLES
    for number in range(num):
        tell(store, batch, 5.0 * number, number)
    samples = store.samples(batch.id)
    assert MAX_SAMPLES // 3 <= len(samples) <= MAX_SAMPLES
    assert samples[0].completed == 0
    assert samples[-1].completed > 0.97 * num
    gaps = {(after.at - before.at).total_seconds() for before, after in itertools.pairwise(samples)}
    assert max(gaps) <= 4 * min(gaps), "evenly spread"


def test_another_s_series_is_empty(store: Store, batch: Batch) -> None:
    tell(store, batch, 5, 100)
    assert len(store.samples(batch.id, seen_by=Caller("ana", sees_all=False))) == 1
    assert store.samples(batch.id, seen_by=Caller("ben", sees_all=False)) == []
