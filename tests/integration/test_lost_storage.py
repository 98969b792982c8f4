"""The database file or the data folder goes away under running processes: nothing is accepted that
would be lost, and whoever asks is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from batch_app import database
from batch_app.core import BatchStatus
from batch_app.errors import ConfigError, StoreLost
from batch_app.store import Store
from support.sdk import jsonl
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import PATIENCE_S, wait_for


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(
        tmp_path,
        lease_s=3.0,
        heartbeat_s=0.2,
        poll_interval_s=0.2,
        commit_interval_s=0.05,
        min_free_bytes=0,
        pause_first_s=0.1,
        pause_longest_s=0.4,
    )
    yield site
    site.close()


def database_path(site: Site) -> Path:
    path = database.sqlite_path(site.settings.resolved_database_url)
    assert path is not None
    return path


def submissions(url: str) -> list[Callable[[], httpx.Response]]:
    """Every kind of write."""
    content = jsonl(echo_line(n) for n in range(2))
    files = {"file": ("in.jsonl", content)}
    purpose = {"purpose": "batch"}
    upload = {**purpose, "filename": "a", "bytes": 3, "mime_type": "text/plain"}
    webhook = {"url": "https://example.com/hook"}

    def post(path: str, **given: object) -> Callable[[], httpx.Response]:
        return lambda: httpx.post(f"{url}{path}", timeout=PATIENCE_S, **given)  # type: ignore[arg-type]

    return [
        post("/v1/batches", files=files, data={"model": "sim"}),
        post("/v1/batches", json={"input_file_id": "file-0", "endpoint": "/v1/completions"}),
        post("/v1/files", files=files, data=purpose),
        post("/v1/uploads", json=upload),
        post("/v1/webhooks", json=webhook),
        post("/v1/batches/batch_000000000000000000000000/cancel"),
        lambda: httpx.delete(f"{url}/v1/files/file-000000000000000000000000", timeout=PATIENCE_S),
    ]


def assert_refused(url: str, code: str, said: str) -> None:
    for submit in submissions(url):
        answer = submit()
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert (error["code"], said in error["message"]) == (code, True), error


def check(url: str, name: str) -> tuple[int, str]:
    answer = httpx.get(f"{url}/readyz", timeout=PATIENCE_S)
    return answer.status_code, answer.json()["checks"][name]


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_database_file_that_is_gone_takes_no_submission_with_it(site: Site, how: str) -> None:
    url = site.start_server()
    path, kept = database_path(site), site.settings.data_dir / "kept.db"
    assert check(url, "database") == (200, "ok")
    path.rename(kept)
    if how == "replaced":
        shutil.copy(kept, path)
    code, said = check(url, "database")
    assert code == 503
    assert f"The database file was {how} while this process ran" in said
    assert_refused(url, "store_lost", f"was {how}")
    assert httpx.get(f"{url}/health", timeout=PATIENCE_S).json()["status"] == "unavailable"
    assert httpx.get(f"{url}/livez", timeout=PATIENCE_S).status_code == 200
    if how == "removed":
        assert not path.exists(), "nobody made an empty one in its place"
    kept.replace(path)
    assert check(url, "database") == (200, "ok")
    assert submissions(url)[0]().status_code == 200


def test_a_worker_whose_database_goes_loses_no_result(site: Site) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(400)), "held")
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 100)
    path, kept = database_path(site), site.settings.data_dir / "kept.db"
    path.rename(kept)
    site.hold.unlink()
    wait_for(
        lambda: "The database file was removed" in site.worker_output() + site.log(batch_id),
        what=site.worker_output,
    )
    assert not path.exists()
    kept.rename(path)
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 400)
    assert worker.poll() is None


def test_a_data_folder_that_is_gone_is_missed(tmp_path: Path) -> None:
    site = Site(tmp_path, database_url=f"sqlite:///{tmp_path}/elsewhere.db", min_free_bytes=0)
    try:
        site.hold.touch()
        batch_id = site.submit((echo_line(n) for n in range(300)), "held")
        url = site.start_server()
        worker = site.start_worker()
        site.wait_for_progress(batch_id, 100)
        folder, kept = site.settings.data_dir, tmp_path / "kept"
        folder.rename(kept)
        folder.mkdir()
        code, said = check(url, "disk")
        assert code == 503
        assert "The data folder was replaced" in said
        assert_refused(url, "storage_lost", "was replaced")
        site.hold.unlink()
        wait_for(
            lambda: (site.batch(batch_id).pause_reason or "").startswith("The data folder"),
            what=site.worker_output,
        )
        assert list(folder.rglob("*.jsonl")) == [], "nothing is written to the new one"
        shutil.rmtree(folder)
        kept.rename(folder)
        assert check(url, "disk") == (200, "ok")
        assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
        assert_answers_echo(site.results(batch_id), 300)
        assert worker.poll() is None
    finally:
        site.close()


def change(url: str, statement: str) -> None:
    engine = database.connect(url)
    with database.writing(engine) as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_tables_that_another_version_changed_are_noticed_at_work(site: Site) -> None:
    url = site.start_server()
    change(site.settings.resolved_database_url, "UPDATE alembic_version SET version_num = '9999'")
    code, said = check(url, "database")
    assert code == 503
    assert "of version 9999" in said
    assert "Restart" in said


@pytest.mark.parametrize("version", ["0001", "newest"])
def test_tables_that_lack_a_column_are_told_at_the_start(
    new_database_url: str, version: str
) -> None:
    store = Store(new_database_url)
    store.migrate()
    _, newest = store.revisions()
    change(new_database_url, "ALTER TABLE batches DROP COLUMN outlook")
    if version == "0001":
        for name in ("paused_at", "paused_by", "retry_at", "pause_kind", "pause_model"):
            change(new_database_url, f"ALTER TABLE batches DROP COLUMN {name}")
        reasons = ("stop", "length", "tool_calls", "content_filter", "other")
        for name in ("pause_entry", "num_pauses", *(f"finish_{reason}" for reason in reasons)):
            change(new_database_url, f"ALTER TABLE batches DROP COLUMN {name}")
        change(new_database_url, "UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(ConfigError, match=r"batches has no outlook.*--data-dir"):
        store.migrate()
    assert store.revisions()[0] == (version if version == "0001" else newest), "nothing was changed"
    with pytest.raises(StoreLost, match="other tables than this version"):
        store.list_batches(limit=1)
    store.close()
