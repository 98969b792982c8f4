"""The store on real databases: transitions, claims, leases, fencing, several processes."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from batch_app.core import (
    TERMINAL,
    TRANSITIONS,
    Batch,
    BatchStatus,
    Choice,
    Dialect,
    FilePurpose,
    LineError,
    Paused,
    PauseKind,
    Progress,
    StoredFile,
    TokenCounts,
)
from batch_app.database import has_safe_wal
from batch_app.errors import Conflict, LeaseLost, NotFound, StoreUnavailable
from batch_app.store import Store

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE_S = 30.0


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


class Seconds:
    """A monotonic clock to turn by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def store(url: str, seconds: Seconds) -> Iterator[Store]:
    store = Store(url)
    store.lease_watch.monotonic = seconds
    store.migrate()
    yield store
    store.close()


def batch_id(number: int) -> str:
    return f"batch_{number:024x}"


def add(
    store: Store,
    number: int,
    status: BatchStatus = BatchStatus.QUEUED,
    *,
    model: str = "m",
    expires_at: datetime | None = None,
) -> Batch:
    file = StoredFile(f"file-{number:024x}", FilePurpose.BATCH, "a.jsonl", 10, NOW)
    batch = Batch(
        id=batch_id(number),
        dialect=Dialect.NATIVE,
        status=status,
        endpoint="/v1/chat/completions",
        model=model,
        input_file_id=file.id,
        created_at=NOW,
        expires_at=expires_at,
        total=100,
    )
    store.add_batch(batch, file)
    return batch


def test_round_trip(store: Store) -> None:
    file = StoredFile("file-1", FilePurpose.BATCH, "ä.jsonl", 10, NOW, NOW + timedelta(days=1))
    batch = Batch(
        id=batch_id(1),
        dialect=Dialect.OPENAI,
        status=BatchStatus.QUEUED,
        endpoint="/v1/embeddings",
        model="m",
        input_file_id="file-1",
        created_at=NOW.astimezone(),
        total=7,
        progress=Progress(1, 2, TokenCounts(3, 4, 5, 6)),
        metadata={"k": "v"},
        errors=(LineError("c", "m", 3, "p"),),
        provenance={"engine": "1"},
        expires_at=NOW,
    )
    store.add_batch(batch, file)

    assert store.get_batch(batch.id) == batch
    assert store.get_file("file-1") == file
    assert store.get_batch(batch.id).created_at.tzinfo is not None


def test_batch_and_file_are_added_together_or_not_at_all(store: Store) -> None:
    batch = add(store, 1)
    with pytest.raises(IntegrityError):
        store.add_batch(batch, StoredFile("file-new", FilePurpose.BATCH, "b", 1, NOW))
    with pytest.raises(NotFound):
        store.get_file("file-new")


@pytest.mark.parametrize("origin", BatchStatus)
@pytest.mark.parametrize("to", BatchStatus)
def test_only_the_table_s_transitions_happen(
    store: Store, origin: BatchStatus, to: BatchStatus
) -> None:
    batch = add(store, 1, origin)

    if to in TRANSITIONS[origin]:
        changed = store.transition(batch, to, NOW + timedelta(seconds=1))
        assert changed.status is to
        assert store.get_batch(batch.id) == changed
    else:
        with pytest.raises(Conflict):
            store.transition(batch, to, NOW)
        assert store.get_batch(batch.id) == batch


def test_every_state_can_end_and_no_ended_one_goes_on() -> None:
    for origin in BatchStatus:
        reached, todo = {origin}, [origin]
        while todo:
            for following in TRANSITIONS[todo.pop()] - reached:
                reached.add(following)
                todo.append(following)
        assert reached & TERMINAL
        assert origin not in TERMINAL or reached == {origin}


def test_times_of_a_batch_s_life(store: Store) -> None:
    add(store, 1)
    claimed = store.claim_next("w", LEASE_S, NOW + timedelta(seconds=1))
    assert claimed is not None
    assert claimed.status is BatchStatus.RUNNING
    assert claimed.started_at == NOW + timedelta(seconds=1)
    assert claimed.lease_owner == "w"
    finalizing = store.transition(claimed, BatchStatus.FINALIZING, NOW + timedelta(seconds=2))
    output = StoredFile("file-o", FilePurpose.BATCH_OUTPUT, "o", 1, NOW)
    done = store.transition(
        finalizing,
        BatchStatus.COMPLETED,
        NOW + timedelta(seconds=3),
        new_files=[output],
        output_file_id="file-o",
        progress=Progress(100, 0, TokenCounts(5, 5)),
        throughput_tokens_per_s=3.5,
    )
    assert done.completed_at == NOW + timedelta(seconds=3)
    assert done.lease_owner is None
    assert done.progress.tokens.total_tokens == 10
    assert store.get_file("file-o") == output
    assert store.count_batches() == {BatchStatus.COMPLETED: 1}


def test_claims_are_first_in_first_out(store: Store) -> None:
    for number in (3, 1, 2):
        add(store, number)
    claimed = [store.claim_next("w", LEASE_S, NOW) for _ in range(4)]
    assert [batch.id if batch else None for batch in claimed] == [
        batch_id(3),
        batch_id(1),
        batch_id(2),
        None,
    ]


def test_the_next_model_is_that_of_the_next_claim_and_asking_changes_nothing(
    store: Store,
) -> None:
    assert store.next_model() is None
    add(store, 1, BatchStatus.VALIDATING, model="a")
    for number, model in [(2, "b"), (3, "c")]:
        add(store, number, model=model)
    for expected in ("b", "c"):
        assert store.next_model() == store.next_model() == expected
        assert store.next_model(lambda waiting: Choice(waiting[-1].batch_id)) == "c"
        claimed = store.claim_next("w", LEASE_S, NOW)
        assert claimed is not None
        assert (claimed.model, claimed.epoch) == (expected, 1)
    assert store.next_model() is None
    assert store.next_model(lambda _: None) is None


def test_a_batch_whose_lease_ran_out_is_rescued_under_a_higher_epoch(
    store: Store, seconds: Seconds
) -> None:
    add(store, 1)
    first = store.claim_next("one", LEASE_S, NOW)
    assert first is not None
    seconds.now += 29
    assert store.claim_next("two", LEASE_S, NOW) is None

    seconds.now += 2
    second = store.claim_next("two", LEASE_S, NOW)

    assert second is not None
    assert (second.id, second.epoch) == (first.id, first.epoch + 1)
    assert second.started_at == first.started_at
    late = NOW + timedelta(seconds=32)
    with pytest.raises(LeaseLost):
        store.renew(first, lease_s=LEASE_S, progress=Progress(99, 0))
    with pytest.raises(LeaseLost):
        store.release(first)
    with pytest.raises(LeaseLost):
        store.transition(
            first,
            BatchStatus.FINALIZING,
            late,
            new_files=[StoredFile("file-stale", FilePurpose.BATCH_OUTPUT, "o", 1, NOW)],
        )
    assert store.get_batch(first.id) == second
    with pytest.raises(NotFound):
        store.get_file("file-stale")


def test_heartbeats_keep_a_lease(store: Store, seconds: Seconds) -> None:
    add(store, 1)
    batch = store.claim_next("one", LEASE_S, NOW)
    assert batch is not None
    for beat in range(1, 20):
        seconds.now += 1
        status = store.renew(batch, lease_s=LEASE_S, progress=Progress(beat, 0))
        assert status is BatchStatus.RUNNING
        seconds.now += 29
        assert store.claim_next("two", LEASE_S, NOW) is None
    assert store.get_batch(batch.id).progress.completed == 19


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_by_a_day_takes_no_batch_away(
    url: str, store: Store, seconds: Seconds, days: int
) -> None:
    """Each observer, old and new, has to see the heartbeats stand still by its own seconds."""
    add(store, 1)
    batch = store.claim_next("one", LEASE_S, NOW)
    assert batch is not None
    store.renew(batch, lease_s=LEASE_S)
    jumped = NOW + timedelta(days=days)
    new = Store(url)
    new.lease_watch.monotonic = seconds
    for observer in (store, new):
        assert observer.claim_next("two", LEASE_S, jumped) is None
    seconds.now += 31
    rescued = new.claim_next("two", LEASE_S, jumped)
    assert rescued is not None
    assert (rescued.epoch, rescued.lease_owner) == (2, "two")
    assert store.claim_next("three", LEASE_S, jumped) is None
    new.close()


def claimed(store: Store, number: int = 1) -> Batch:
    batch = store.claim_next("one", LEASE_S, NOW, pick=lambda _: Choice(batch_id(number)))
    assert batch is not None
    return batch


FULL = Paused(PauseKind.DISK, "No room.", NOW, NOW + timedelta(seconds=60))


def test_a_paused_batch_goes_back_to_the_queue_with_what_it_has(store: Store) -> None:
    add(store, 1)
    batch = claimed(store)
    store.renew(batch, lease_s=LEASE_S, progress=Progress(completed=1))
    store.pause(batch, FULL, 1)
    paused = store.get_batch(batch.id)
    assert (paused.status, paused.lease_owner, paused.paused) == (BatchStatus.QUEUED, None, FULL)
    assert (paused.pause_reason, paused.progress.done) == ("No room.", 1)
    assert paused.started_at == batch.started_at
    assert [(one.batch_id, one.paused, one.begun) for one in store.waiting()] == [
        (batch.id, FULL, False)
    ]
    with pytest.raises(LeaseLost):
        store.pause(replace(batch, epoch=7), FULL, 1)

    again = store.claim_next("one", LEASE_S, NOW + timedelta(seconds=60))
    assert again is not None
    assert (again.paused, again.pause_kind, again.num_pauses) == (None, PauseKind.DISK, 1)
    assert (again.status, again.started_at) == (BatchStatus.RUNNING, batch.started_at)
    store.renew(again, lease_s=LEASE_S, goes_on=True)
    assert store.get_batch(batch.id).num_pauses == 0


def test_a_pause_of_a_model_is_that_of_all_that_wait_for_it(store: Store) -> None:
    for number, model in enumerate(["m", "m", "another", "m"], start=1):
        add(store, number, model=model)
    held = claimed(store, 4)
    store.pause(claimed(store, 1), FULL, 1)
    assert [one.paused for one in store.waiting()] == [FULL, None, None], "room may be there for it"
    away = replace(FULL, kind=PauseKind.HUB, model="m", entry="e")
    store.pause(claimed(store, 2), away, 3)
    assert [one.paused for one in store.waiting()] == [FULL, away, None]
    store.pause(claimed(store, 1), away, 1)
    assert [one.paused for one in store.waiting()] == [away, away, None]
    assert store.get_batch(held.id).paused is None
    counts = [(one.kind, one.num_batches, one.reason) for one in store.count_paused()]
    assert counts == [(PauseKind.HUB, 2, "No room.")]


def test_one_that_is_cancelled_meanwhile_is_released_at_once(store: Store) -> None:
    add(store, 1)
    batch = claimed(store)
    store.request_cancel(batch.id, NOW)
    store.pause(batch, FULL, 1)
    cancelling = store.get_batch(batch.id)
    assert (cancelling.status, cancelling.paused) == (BatchStatus.CANCELLING, None)
    closing = store.claim_to_close("server", LEASE_S, NOW)
    assert closing is not None
    store.pause(closing, FULL, 1)
    assert store.claim_to_close("server", LEASE_S, NOW) is None, "the disk is full"
    assert store.claim_to_close("server", LEASE_S, NOW + timedelta(seconds=60)) is not None


def test_a_paused_batch_can_be_cancelled_and_expires(store: Store) -> None:
    for number in (1, 2):
        add(store, number, expires_at=NOW + timedelta(seconds=1))
        store.pause(claimed(store, number), FULL, 1)
    cancelled = store.cancel_queued(batch_id(1), NOW)
    assert cancelled.status is BatchStatus.CANCELLING, "it may have results"
    closing = store.claim_to_close("server", LEASE_S, NOW)
    assert closing is not None
    assert closing.id == batch_id(1)
    assert store.claim_to_close("server", LEASE_S, NOW) is None
    overdue = store.claim_to_close("server", LEASE_S, NOW + timedelta(seconds=2))
    assert overdue is not None
    assert overdue.id == batch_id(2)


def test_release_and_release_of_the_dead(store: Store) -> None:
    for number in (1, 2):
        add(store, number)
    first, second = (store.claim_next("one", LEASE_S, NOW) for _ in range(2))
    assert first is not None
    assert second is not None
    store.release(first)
    again = store.claim_next("two", LEASE_S, NOW)
    assert again is not None
    assert again.id == first.id
    assert store.release_dead("one") == 1
    assert store.release_dead("one") == 0
    rescued = store.claim_next("three", LEASE_S, NOW)
    assert rescued is not None
    assert rescued.id == second.id


def test_a_request_to_cancel_reaches_the_worker(store: Store) -> None:
    add(store, 1)
    batch = store.claim_next("one", LEASE_S, NOW)
    assert batch is not None
    store.request_cancel(batch.id, NOW)
    assert store.request_cancel(batch.id, NOW).status is BatchStatus.CANCELLING
    with pytest.raises(Conflict):
        store.cancel_queued(batch.id, NOW)

    assert store.renew(batch, lease_s=LEASE_S) is BatchStatus.CANCELLING
    store.transition(batch, BatchStatus.CANCELLED, NOW)
    assert store.request_cancel(batch.id, NOW).status is BatchStatus.CANCELLED


def test_cancelled_before_it_began_is_never_claimed_to_run(store: Store) -> None:
    add(store, 1)
    assert store.cancel_queued(batch_id(1), NOW).status is BatchStatus.CANCELLED
    assert store.claim_next("w", LEASE_S, NOW) is None
    with pytest.raises(NotFound):
        store.cancel_queued(batch_id(9), NOW)
    with pytest.raises(NotFound):
        store.request_cancel(batch_id(9), NOW)


def test_list(store: Store) -> None:
    for number in range(5):
        add(store, number)
    store.cancel_queued(batch_id(2), NOW)
    page, more = store.list_batches(limit=2)
    assert ([batch.id for batch in page], more) == ([batch_id(4), batch_id(3)], True)
    page, more = store.list_batches(limit=3, after=page[-1].id)
    assert ([batch.id for batch in page], more) == ([batch_id(n) for n in (2, 1, 0)], False)
    page, _ = store.list_batches(limit=9, statuses=[BatchStatus.CANCELLED])
    assert [batch.id for batch in page] == [batch_id(2)]
    with pytest.raises(NotFound):
        store.list_batches(limit=1, after=batch_id(77))


def test_unfinished_batches(store: Store) -> None:
    for number, model in enumerate("aabc"):
        add(store, number, model=model)
    store.set_workload(batch_id(2), [{"model": "b"}], NOW)
    running = store.claim_next("w", LEASE_S, NOW)
    assert running is not None
    store.renew(running, lease_s=LEASE_S, progress=Progress(30, 10), outlook={"at": 1.0})
    store.cancel_queued(batch_id(1), NOW)

    found = store.unfinished(limit=10)

    assert [batch.id for batch in found] == [batch_id(0), batch_id(2), batch_id(3)]
    assert found[0].outlook == {"at": 1.0}
    assert found[0].progress.done == 40
    assert [batch.workload for batch in found] == [None] * 3  # left out: it may be large
    assert len(store.unfinished(limit=2)) == 2


def test_the_oldest_uncounted_batch_is_counted_next(store: Store) -> None:
    assert store.next_to_count() is None
    for number in range(3):
        add(store, number)
    store.set_workload(batch_id(0), [{"model": "a"}], NOW)

    assert store.next_to_count() == store.get_batch(batch_id(1))
    assert store.get_batch(batch_id(0)).workload == [{"model": "a"}]
    assert store.get_batch(batch_id(0)).counted_at == NOW
    store.set_workload(batch_id(0), None, NOW)
    assert store.get_batch(batch_id(0)).workload == [{"model": "a"}]  # None leaves it
    store.cancel_queued(batch_id(1), NOW)
    store.set_workload(batch_id(2), None, NOW)
    assert store.next_to_count() is None


def test_naive_times_are_refused(store: Store) -> None:
    add(store, 1)
    with pytest.raises(Exception, match="aware"):
        store.claim_next("w", LEASE_S, datetime(2026, 1, 1))  # noqa: DTZ001


def test_migrate_twice_changes_nothing(store: Store, url: str) -> None:
    add(store, 1)
    store.migrate()
    other = Store(url)
    other.migrate()
    assert other.get_batch(batch_id(1)).id == batch_id(1)
    other.close()


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    folder = tmp_path / "folder.db"
    folder.mkdir()
    store = Store(f"sqlite:///{folder}")
    with pytest.raises(StoreUnavailable):
        store.ping()
    store.close()


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_safe_versions_of_sqlite(version: tuple[int, int, int], safe: bool) -> None:
    assert has_safe_wal(version) is safe


def test_durability_settings(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'batch_jobs.db'}"
    store = Store(url)
    store.migrate()
    store.close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    assert mode in ("wal", "delete", "truncate")


# -- several processes -----------------------------------------------------------------------------

NUM_BATCHES = 40


def _claim_all(url: str, name: str, barrier: object, results: object) -> None:
    store = Store(url)
    store.migrate()  # all at once: one makes the tables, the others find them
    barrier.wait(120)  # type: ignore[attr-defined]
    mine = []
    while True:
        batch = store.claim_next(name, 300, NOW)
        if batch is None:
            break
        store.renew(batch, lease_s=300, progress=Progress(1, 0))
        store.transition(batch, BatchStatus.FINALIZING, NOW)
        mine.append(batch.id)
    store.close()
    results.put((name, mine))  # type: ignore[attr-defined]


def test_processes_share_the_queue_without_overlap(new_database_url: str) -> None:
    url = new_database_url
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_claim_all, args=(url, name, barrier, results)) for name in "ab"
    ]
    for process in processes:
        process.start()
    store = Store(url)
    store.migrate()
    for number in range(NUM_BATCHES):
        add(store, number)
    barrier.wait(120)
    claimed = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    store.close()

    assert sorted(claimed["a"] + claimed["b"]) == [batch_id(n) for n in range(NUM_BATCHES)]
    for ids in claimed.values():
        assert ids == sorted(ids)  # each got its own in the queue's order
