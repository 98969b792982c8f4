"""What is PostgreSQL's own: several that write at once, waking by NOTIFY, a server that goes away.

What holds for both databases is in `test_store.py`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from batch_app import database
from batch_app.core import (
    Batch,
    BatchStatus,
    Choice,
    Dialect,
    FilePurpose,
    Idempotency,
    Paused,
    PauseKind,
    Progress,
    StoredFile,
)
from batch_app.errors import ConfigError, Conflict, NotFound, StoreUnavailable, TooMany
from batch_app.files import new_id
from batch_app.store import Store, samples
from batch_app.webhooks import Webhook, new_secret
from support.postgres import PostgresServer
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import wait_for

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE_S = 30.0
SETTINGS: dict[str, Any] = {
    "lease_s": 5.0,
    "heartbeat_s": 0.3,
    "poll_interval_s": 0.5,
    "commit_interval_s": 0.05,
}


@pytest.fixture
def url(emptied: Callable[[], str]) -> str:
    return emptied()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def a_batch(**values: Any) -> Batch:
    return Batch(
        **{
            "id": new_id("batch"),
            "dialect": Dialect.NATIVE,
            "status": BatchStatus.QUEUED,
            "endpoint": "/v1/chat/completions",
            "model": "m",
            "input_file_id": new_id("file"),
            "created_at": NOW,
            "total": 100,
            **values,
        }
    )


def add(store: Store, batch: Batch | None = None, **options: Any) -> Batch:
    batch = batch or a_batch()
    file = StoredFile(batch.input_file_id, FilePurpose.BATCH, "a.jsonl", 10, NOW)
    return store.add_batch(batch, file, **options)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, when all begin together."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(60)
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


class Held:
    """A transaction of somebody else's that has a batch's row, until it is left."""

    def __init__(self, url: str, batch_id: str) -> None:
        self._url, self._batch_id = url, batch_id

    def __enter__(self) -> None:
        self._connection = psycopg.connect(self._url)
        query = "SELECT id FROM batches WHERE id = %s FOR UPDATE"
        assert self._connection.execute(query, (self._batch_id,)).fetchone()

    def __exit__(self, *error: object) -> None:
        self._connection.rollback()
        self._connection.close()


# -- connecting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "no url"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="database_url") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_usual_spelling_is_understood(store: Store, url: str, scheme: str) -> None:
    other = Store(url.replace("postgresql", scheme, 1))
    other.ping()
    other.close()


def test_a_missing_driver_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg.types.string", None)
    with pytest.raises(ConfigError, match=r"vllm-batch-server\[postgres\]"):
        Store(url)


def test_a_server_that_isn_t_there(tmp_path: Path) -> None:
    store = Store(f"postgresql://user:secret@/name?host={tmp_path}")
    with pytest.raises(StoreUnavailable) as unavailable:
        store.migrate()
    assert "secret" not in str(unavailable.value)
    assert "\n" not in str(unavailable.value)
    store.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h/d", "postgresql://u:***@h/d"),
        ("postgres://u@h/d?password=secret&sslmode=require", "postgresql://u@h/d?sslmode=require"),
        ("sqlite:////folder/a.db", "sqlite:////folder/a.db"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert database.shown(url) == shown


def test_a_standby_counts_as_away(store: Store, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        try:
            fresh = Store(url)
            with pytest.raises(StoreUnavailable, match="read-only"):
                add(fresh)
            assert fresh.count_batches() == {}
            fresh.close()
        finally:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


def test_the_migrations_make_the_tables_that_the_code_knows(new_database_url: str) -> None:
    engine = database.connect(new_database_url)
    database.migrate(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), database.metadata) == []
    engine.dispose()


def test_text_that_postgresql_can_t_hold(store: Store) -> None:
    batch = add(store, a_batch(error_message="a\0b", metadata={"k": "a\0b"}))
    found = store.get_batch(batch.id)
    assert found.error_message == "a\N{REPLACEMENT CHARACTER}b"
    assert found.metadata == {"k": "a\0b"}
    with pytest.raises(NotFound):
        store.get_batch("batch\0")


def test_a_long_series_loses_every_second_sample(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_SAMPLES", 8)
    add(store)
    batch = store.claim_next("w", LEASE_S, NOW)
    assert batch is not None
    for minute in range(40):
        at = NOW.replace(minute=minute)
        store.renew(batch, lease_s=LEASE_S, progress=Progress(minute, 0), at=at)
    times = [sample.at.minute for sample in store.samples(batch.id)]
    assert 4 <= len(times) <= 8
    assert times[0] == 0
    assert times == sorted(times)


# -- several at once -------------------------------------------------------------------------------


def test_a_batch_that_somebody_is_about_to_claim_is_passed_by(store: Store, url: str) -> None:
    first, second = add(store), add(store)
    with Held(url, first.id):
        claimed = store.claim_next("w", LEASE_S, NOW)
    assert claimed is not None
    assert claimed.id == second.id


def test_the_only_batch_is_waited_for(store: Store, url: str) -> None:
    """Who holds its row may only be writing something into it."""
    batch = add(store)
    with ThreadPoolExecutor(1) as pool:
        with Held(url, batch.id):
            asked = pool.submit(store.claim_next, "w", LEASE_S, NOW)
            wait_for(lambda: waiting_for_locks(url), what="it waits for the row")
        claimed = asked.result(60)
    assert claimed is not None
    assert claimed.id == batch.id


def waiting_for_locks(url: str) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with psycopg.connect(url) as connection:
        row = connection.execute(query).fetchone()
    return row is not None and row[0] > 0


def test_a_claim_does_not_wait_to_note_who_was_passed_over(store: Store, url: str) -> None:
    held, other, last = add(store), add(store), add(store)

    def pick(waiting: Any) -> Choice | None:
        ids = [one.batch_id for one in waiting]
        return Choice(ids[-1], tuple(ids[:-1])) if ids else None

    with Held(url, held.id):
        claimed = store.claim_next("w", LEASE_S, NOW, pick)
    assert claimed is not None
    assert claimed.id == last.id
    assert store.get_batch(other.id).passed_over_at == NOW
    assert store.get_batch(held.id).passed_over_at is None


def test_each_batch_is_claimed_once(store: Store) -> None:
    ids = [add(store).id for _ in range(20)]

    def claim_all(name: str) -> list[str]:
        claimed = []
        while (batch := store.claim_next(name, 300, NOW)) is not None:
            assert (batch.epoch, batch.lease_owner) == (1, name)
            claimed.append(batch.id)
        return claimed

    found = at_once(*(lambda name=name: claim_all(name) for name in "abcd"))
    assert Counter(batch_id for some in found for batch_id in some) == Counter(ids)


def test_one_idempotency_key_makes_one_batch(store: Store) -> None:
    for number in range(5):
        key = Idempotency(f"key-{number}", "same")
        made = at_once(*[lambda key=key: add(store, a_batch(), idempotency=key)] * 4)
        assert len({batch.id for batch in made}) == 1, made
    assert sum(store.count_batches().values()) == 5


def test_nobody_gets_more_batches_than_allowed(store: Store) -> None:
    made = at_once(*[lambda: add(store, a_batch(owner="ana"), max_unfinished=3)] * 8)
    assert Counter(type(outcome) for outcome in made) == {Batch: 3, TooMany: 5}


def a_webhook(**values: Any) -> Webhook:
    return Webhook(
        **{
            "id": new_id("webhook"),
            "url": "https://example.org/",
            "secret": new_secret(),
            "created_at": NOW,
            "events": ("batch.cancelled",),
            **values,
        }
    )


def test_nobody_gets_more_webhooks_than_allowed(store: Store) -> None:
    made = at_once(*[lambda: store.add_webhook(a_webhook(), max_webhooks=2)] * 6)
    assert Counter(type(outcome) for outcome in made) == {type(None): 2, TooMany: 4}


def test_a_file_is_deleted_or_used_but_not_both(store: Store) -> None:
    for _ in range(10):
        file = StoredFile(new_id("file"), FilePurpose.BATCH, "a.jsonl", 10, NOW)
        store.add_file(file)
        batch = a_batch(input_file_id=file.id)
        added, deleted = at_once(
            lambda batch=batch: store.add_batch(batch),
            lambda file=file: store.delete_file(file.id, NOW),
        )
        if isinstance(deleted, StoredFile):
            assert isinstance(added, NotFound), added
        else:
            assert isinstance(deleted, Conflict), deleted
            assert added == batch


def test_a_webhook_may_go_while_batches_end(store: Store) -> None:
    for _ in range(10):
        webhook, batches = a_webhook(), [add(store) for _ in range(3)]
        store.add_webhook(webhook)
        outcomes = at_once(
            lambda webhook=webhook: store.delete_webhook(webhook.id),
            *(lambda batch=batch: store.cancel_queued(batch.id, NOW) for batch in batches),
        )
        assert outcomes[0] == webhook
        assert [outcome.status for outcome in outcomes[1:]] == [BatchStatus.CANCELLED] * 3


# -- waking ----------------------------------------------------------------------------------------


def test_a_new_batch_wakes_who_listens(store: Store) -> None:
    listener, stop = store.queue_listener(), threading.Event()
    assert listener is not None
    assert listener.wait(60, stop)  # from now on it listens: what came before isn't known
    assert not listener.wait(0.2, stop)
    add(store, a_batch(status=BatchStatus.VALIDATING))
    assert not listener.wait(0.2, stop)

    checked = add(store, a_batch(status=BatchStatus.VALIDATING))
    store.transition(checked, BatchStatus.QUEUED, NOW)
    assert listener.wait(60, stop)
    add(store)
    assert listener.wait(60, stop)
    claimed = store.claim_next("w", LEASE_S, NOW)
    assert claimed is not None
    full = Paused(PauseKind.DISK, "It is full.", NOW, NOW)
    store.pause(claimed, full, 1)
    assert not listener.wait(0.2, stop)
    claimed = store.claim_next("w", LEASE_S, NOW)
    assert claimed is not None
    store.release(claimed)
    assert listener.wait(60, stop)
    stop.set()
    assert not listener.wait(60, stop)
    listener.close()


def test_who_listens_listens_again_when_the_connection_is_lost(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.postgresql, "RECONNECT_AFTER_S", 0.1)
    listener, stop = store.queue_listener(), threading.Event()
    assert listener is not None
    assert listener.wait(60, stop)
    with psycopg.connect(url) as connection:
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'"
            " AND pid <> pg_backend_pid()"
        ).fetchall()
    assert ended == [(True,)]
    assert listener.wait(60, stop)  # connected again, so that the queue is looked at
    add(store)
    assert listener.wait(60, stop)
    listener.close()


# -- whole processes -------------------------------------------------------------------------------


@pytest.fixture
def site(postgres: PostgresServer, tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, database_url=postgres.new_database_with_tables(), **SETTINGS)
    yield site
    site.close()


def test_two_servers_and_two_workers_on_one_database(site: Site, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    (tmp_path / "models.toml").write_text(
        (tmp_path / "models.toml").read_text()
        + '[[model]]\nname = "noted"\nsource = "sim"\nengine = "sim"\n'
        + f'[model.engine_args]\ndecode_step_s = 0.001\njournal = "{journal}"\n'
    )
    urls = [site.start_server(), site.start_server()]
    for _ in range(2):
        site.start_worker()
    lines = [echo_line(number) for number in range(40)]
    content = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    ids = []
    for number in range(6):
        answer = httpx.post(
            f"{urls[number % 2]}/v1/batches",
            files={"file": ("in.jsonl", content)},
            data={"model": "noted"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["batch_id"])
    for number, batch_id in enumerate(ids):
        batch = site.wait_until_done(batch_id, timeout_s=120)
        assert (batch.status, batch.epoch) == (BatchStatus.COMPLETED, 1)
        assert_answers_echo(site.results(batch_id), 40)
        other = httpx.get(f"{urls[(number + 1) % 2]}/v1/batches/{batch_id}", timeout=60)
        assert other.json()["status"] == "completed"
    assert len(journal.read_bytes().splitlines()) == 6 * 40  # nothing was computed twice


def test_a_batch_goes_on_when_the_database_comes_back(postgres: PostgresServer, site: Site) -> None:
    batch_id = site.submit((echo_line(n) for n in range(1500)), "slow")
    url = site.start_server()
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 50)
    postgres.stop(signal.SIGQUIT)
    try:
        wait_for(lambda: "Waiting for the database" in site.log(batch_id), timeout_s=60)
        answer = httpx.get(f"{url}/v1/batches/{batch_id}", timeout=60)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "store_unavailable"
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 503
        folder = site.data.work_dir(batch_id)

        def log_bytes() -> int:
            return sum(path.stat().st_size for path in folder.glob("results-*.log"))

        size = log_bytes()
        wait_for(lambda: log_bytes() > size + 5_000, what="results go on being committed")
    finally:
        postgres.start()
    batch = site.wait_until_done(batch_id, timeout_s=120)
    assert batch.status is BatchStatus.COMPLETED
    assert "The database answers again." in site.log(batch_id)
    assert_answers_echo(site.results(batch_id), 1500)
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
    assert worker.poll() is None
