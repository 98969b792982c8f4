"""What crashes leave in the data folder, and who removes it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batch_app import database
from batch_app.core import Batch, utc_now
from batch_app.database.sqlite import BUSY_TIMEOUT_S
from batch_app.files import IncomingFolder
from batch_app.housekeeping import Housekeeping
from batch_app.incoming import Incoming
from batch_app.orphans import remove_orphans
from integration.api_fixtures import leftovers
from support.sdk import CHAT, jsonl, line, lines
from support.site import Site, echo_line
from support.stories import Crash, World


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def make_old(path: Path, age_s: float = 7200.0) -> Path:
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_what_no_row_speaks_of_is_removed_and_nothing_else(site: Site) -> None:
    batch_id = site.submit([echo_line(0)], "sim")
    input_path = make_old(site.data.input_file(site.batch(batch_id).input_file_id))
    work_dir = make_old(site.data.work_dir(batch_id))
    gone = []
    for path in (
        site.data.input_file("file-" + "0" * 24),
        site.data.output_file("file-" + "1" * 24),
        site.data.batches / "output" / f"batch_{'2' * 24}.1.jsonl",
    ):
        path.write_bytes(b"x")
        gone.append(make_old(path))
    folder = site.data.work_dir("batch_" + "3" * 24)
    folder.mkdir()
    gone.append(make_old(folder))
    young = site.data.input_file("file-" + "4" * 24)
    young.write_bytes(b"x")

    assert remove_orphans(site.data, site.store) == len(gone)
    assert not any(path.exists() for path in gone)
    assert input_path.exists()
    assert work_dir.exists()
    assert young.exists()


def test_the_rest_of_an_ended_batch_is_removed(site: Site) -> None:
    batch_id = site.submit([echo_line(0)], "sim")
    work_dir = make_old(site.data.work_dir(batch_id))
    site.store.cancel_queued(batch_id, utc_now())
    assert remove_orphans(site.data, site.store) == 1
    assert not work_dir.exists()


def test_a_folder_in_use_is_not_swept_and_a_left_one_is(site: Site) -> None:
    with IncomingFolder(site.data) as in_use:
        left = site.data.incoming / "incoming_left"
        left.mkdir()
        (left / "input.jsonl").write_bytes(b"x")
        make_old(left)
        make_old(in_use)
        assert site.data.sweep_incoming() == 1
        assert in_use.exists()
        assert not left.exists()
    assert not in_use.exists()


# -- found by housekeeping -------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        yield world


def finished(world: World) -> dict[str, Any]:
    """A finished batch with lines in both files."""
    requests = [*lines(2, "tiny-context"), line("long", "tiny-context", "word " * 9)]
    form: dict[str, Any] = {"data": {"purpose": "batch"}}
    file = world.client.post("/v1/files", files={"file": ("in", jsonl(requests))}, **form).json()
    wish = {"input_file_id": file["id"], "endpoint": CHAT}
    batch_id = world.client.post("/v1/batches", json=wish).json()["id"]
    world.validate()
    world.work()
    batch: dict[str, Any] = world.client.get(f"/v1/batches/{batch_id}").json()
    assert batch["status"] == "completed"
    return batch


def dies(*_: object) -> None:
    raise Crash


def fails(*_: object) -> None:
    """For a request: the end of it is enough."""
    raise RuntimeError


@pytest.mark.parametrize("which", ["input_file_id", "output_file_id", "error_file_id"])
def test_a_crash_before_the_bytes_of_a_deleted_file_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    batch = finished(world)
    everything = set(leftovers(world.data))
    with monkeypatch.context() as patch:
        patch.setattr("batch_app.routes.openai_files.remove_bytes", fails)
        assert world.client.delete(f"/v1/files/{batch[which]}").status_code == 500
    assert world.client.get(f"/v1/files/{batch[which]}").status_code == 404
    assert set(leftovers(world.data)) == everything

    world.keep_house()
    gone = {path.name for path in everything - set(leftovers(world.data))}
    results = world.data.results_file(world.store.get_batch(batch["id"])).name
    of_output = {results} if which != "input_file_id" else set()
    assert gone == {f"{batch[which]}.jsonl", *of_output}


def test_a_crash_before_the_bytes_of_an_expired_file_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    form: dict[str, Any] = {"data": {"purpose": "batch", **life}}
    file = world.client.post("/v1/files", files={"file": ("in", b"{}\n")}, **form).json()
    world.pass_time(3601)
    with monkeypatch.context() as patch:
        patch.setattr("batch_app.housekeeping.remove_bytes", dies)
        world.keep_house()
    assert world.data.input_file(file["id"]).exists()
    world.keep_house()
    assert not world.data.input_file(file["id"]).exists()


def test_a_crash_before_the_parts_of_a_cancelled_upload_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.client.post("/v1/files", files={"file": ("in", b"")}, data={"purpose": "batch"})
    wish = {"filename": "u", "purpose": "batch", "bytes": 4, "mime_type": "text/plain"}
    ended, pending = (world.client.post("/v1/uploads", json=wish).json()["id"] for _ in range(2))
    for upload_id in (ended, pending):
        world.client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"abcd"})
    with monkeypatch.context() as patch:
        patch.setattr("batch_app.routes.openai_files.remove_upload", fails)
        assert world.client.post(f"/v1/uploads/{ended}/cancel").status_code == 500
    assert world.data.upload_dir(ended).exists()
    world.keep_house()
    assert not world.data.upload_dir(ended).exists()
    assert world.data.upload_dir(pending).exists()


def test_a_sweep_beside_a_slow_upload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep comes at the worst moment: the file is in its place, the store doesn't know."""
    finished(world)  # the store isn't empty
    finish, add_batch = Incoming.finish, world.store.add_batch
    swept: list[bool] = []

    def finish_late(self: Incoming[Any]) -> Any:
        make_old(self._path)  # its client took hours
        return finish(self)

    def add_after_a_sweep(*rest: Any, **values: Any) -> Batch:
        world.keep_house()
        swept.append(True)
        return add_batch(*rest, **values)

    monkeypatch.setattr(Incoming, "finish", finish_late)
    monkeypatch.setattr(world.store, "add_batch", add_after_a_sweep)
    form: dict[str, Any] = {"data": {"model": "sim"}, "files": {"file": ("in", jsonl(lines(3)))}}
    batch_id = world.client.post("/v1/batches", **form).json()["batch_id"]
    assert swept
    world.work()
    assert world.client.get(f"/v1/batches/{batch_id}").json()["progress"]["completed"] == 3


def test_a_store_that_knows_nothing_sweeps_nothing(world: World) -> None:
    """The database was lost, or is another one: what lies here may be somebody's results."""
    path = world.data.output_file("file-" + "0" * 24)
    path.write_bytes(b"x")
    make_old(path)
    world.keep_house()
    assert path.exists()
    world.client.post("/v1/files", files={"file": ("in", b"")}, data={"purpose": "batch"})
    world.keep_house()
    assert not path.exists()


def test_the_sweep_comes_now_and_then(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps: list[datetime] = []

    def note(before: datetime) -> int:
        sweeps.append(world.now)
        return 0

    monkeypatch.setattr(world.store, "forget_keys", note)
    own = world.services
    work = Housekeeping(
        own.settings, own.data, own.store, lambda: own.registry, "server", own.clock
    )
    begin = world.now
    for _ in range(60):
        work.run_once()
        world.pass_time(20)
    assert sweeps == [begin, begin + timedelta(minutes=10)]


def test_keys_are_forgotten_after_two_days(world: World) -> None:
    file = {"files": {"file": ("in", b"")}, "data": {"purpose": "batch"}}
    wish = {
        "input_file_id": world.client.post("/v1/files", **file).json()["id"],
        "endpoint": CHAT,
    }

    def create() -> str:
        headers = {"Idempotency-Key": "k"}
        return str(world.client.post("/v1/batches", json=wish, headers=headers).json()["id"])

    first = create()
    world.pass_time(2 * 86400)
    world.keep_house()
    assert create() == first
    world.pass_time(1)
    world.keep_house()
    assert create() != first


def test_looking_for_old_keys_waits_for_no_writer(world: World) -> None:
    engine = database.connect(world.settings.resolved_database_url)
    writing = engine.connect().execution_options(**{database.WRITES: True})
    with writing as connection, connection.begin():
        started = time.monotonic()
        assert world.store.forget_keys(world.now) == 0
        assert time.monotonic() - started < BUSY_TIMEOUT_S / 2
    engine.dispose()
