"""A back-up made while a batch runs, restored elsewhere, finishes that batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from batch_app.backup import MANIFEST, back_up, restore
from batch_app.core import BatchStatus
from batch_app.errors import ConfigError
from batch_app.files import DataDir
from batch_app.store import Store
from support.postgres import PostgresServer
from support.site import REPO, Site, assert_answers_echo, echo_line

SETTINGS = {"lease_s": 2.0, "heartbeat_s": 0.3, "poll_interval_s": 0.2, "commit_interval_s": 0.05}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "first").mkdir()
    site = Site(tmp_path / "first", **SETTINGS)
    yield site
    site.close()


def back_up_site(site: Site, target: Path) -> None:
    back_up(site.data, site.settings.resolved_database_url, target)


def test_a_running_batch_goes_on_from_its_back_up(site: Site, tmp_path: Path) -> None:
    done_id = site.submit((echo_line(n) for n in range(20)), "sim")
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(1200)), "held")
    site.start_worker()
    site.wait_until_done(done_id)
    before = site.wait_for_progress(batch_id, 100)
    target = tmp_path / "back-up"
    back_up_site(site, target)
    site.close()

    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    url = f"sqlite:///{elsewhere / 'data' / 'database' / 'batch_jobs.db'}"
    restore(target, DataDir(elsewhere / "data"), url)
    other = Site(elsewhere, **SETTINGS)
    try:
        assert_answers_echo(other.results(done_id), 20)
        assert other.batch(batch_id).status is BatchStatus.RUNNING
        other.start_worker()
        batch = other.wait_until_done(batch_id)
        assert batch.status is BatchStatus.COMPLETED
        assert_answers_echo(other.results(batch_id), 1200)
        going_on = next(line for line in other.log(batch_id).splitlines() if "Going on" in line)
        assert int(going_on.split("Going on: ")[1].split(" of ")[0].replace(",", "")) >= (
            before.progress.done
        )
    finally:
        other.close()


def test_the_command_line(site: Site, tmp_path: Path) -> None:
    site.submit((echo_line(n) for n in range(5)), "sim")
    for name, place, folder in (
        ("backup", tmp_path / "back-up", site.settings.data_dir),
        ("restore", tmp_path / "back-up", tmp_path / "second"),
        ("restore", tmp_path / "back-up", tmp_path / "second"),
    ):
        command = [sys.executable, "-m", "batch_app.cli", name, str(place)]
        command += ["--data-dir", str(folder)]
        said = subprocess.run(
            command, cwd=REPO, check=False, capture_output=True, text=True, timeout=120
        )
        if "✅" not in said.stderr:
            break
    assert (name, said.returncode) == ("restore", 1)
    assert "exists" in said.stderr
    assert (tmp_path / "second" / "batches" / "active").is_dir()


@pytest.fixture
def made(site: Site, tmp_path: Path) -> Path:
    site.submit((echo_line(n) for n in range(5)), "sim")
    back_up_site(site, tmp_path / "back-up")
    return tmp_path / "back-up"


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_the_manifest_lists_every_file(made: Path) -> None:
    manifest = orjson.loads((made / MANIFEST).read_bytes())
    listed = {entry["path"] for entry in manifest["files"]}
    assert listed | {MANIFEST} == {str(path.relative_to(made)) for path in files_of(made)}
    assert len(listed) >= 4  # the database, an input file, two of an index
    assert made.stat().st_mode & 0o077 == 0, "it is for nobody else to read"


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "outside"])
def test_a_damaged_back_up_is_refused_and_writes_nothing(
    made: Path, tmp_path: Path, harm: str
) -> None:
    victim = next(path for path in files_of(made / "batches" / "input"))
    content = victim.read_bytes()
    if harm == "flip":
        victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif harm == "cut":
        victim.write_bytes(content[:-1])
    elif harm == "remove":
        victim.unlink()
    elif harm == "manifest":
        (made / MANIFEST).write_bytes(b"{")
    else:
        # A good copy of a file, but not in the back-up: what is taken from there is written there.
        (made.parent / "outside").write_bytes(content)
        manifest = orjson.loads((made / MANIFEST).read_bytes())
        name = str(victim.relative_to(made))
        (entry,) = (entry for entry in manifest["files"] if entry["path"] == name)
        entry["path"] = "../outside"
        (made / MANIFEST).write_bytes(orjson.dumps(manifest))
    target = tmp_path / "second" / "data"
    with pytest.raises(ConfigError, match=r"damaged|not a back-up"):
        restore(made, DataDir(target), f"sqlite:///{target / 'database' / 'batch_jobs.db'}")
    assert not target.exists()


def test_nothing_is_written_over(site: Site, made: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        back_up_site(site, made)
    with pytest.raises(ConfigError, match="exists"):
        restore(made, site.data, site.settings.resolved_database_url)


def test_from_one_database_to_the_other_and_back(
    site: Site, postgres: PostgresServer, tmp_path: Path
) -> None:
    batch_id = site.submit((echo_line(n) for n in range(5)), "sim")
    site.store.set_workload(batch_id, [{"model": "sim"}], site.batch(batch_id).created_at)
    before = site.batch(batch_id)
    there, back = postgres.new_database(), f"sqlite:///{tmp_path / 'back' / 'batch_jobs.db'}"
    back_up_site(site, tmp_path / "one")
    restore(tmp_path / "one", DataDir(tmp_path / "there"), there)
    with pytest.raises(ConfigError, match="isn't empty"):
        restore(tmp_path / "one", DataDir(tmp_path / "elsewhere"), there)
    with pytest.raises(ConfigError, match="isn't empty"):
        restore(tmp_path / "one", DataDir(tmp_path / "there"), postgres.new_database())

    (tmp_path / "second").mkdir()
    other = Site(tmp_path / "second", database_url=there, **SETTINGS)
    try:
        assert other.batch(batch_id) == before
        newer = other.submit([echo_line(0)], "sim")  # its number is higher than the copied one's
        assert [batch.batch_id for batch in other.store.waiting()] == [batch_id, newer]
    finally:
        other.close()
    back_up(DataDir(tmp_path / "there"), there, tmp_path / "two")
    restore(tmp_path / "two", DataDir(tmp_path / "back"), back)
    store = Store(back)
    assert store.get_batch(batch_id) == before
    assert [batch.batch_id for batch in store.waiting()] == [batch_id, newer]
    store.close()


def test_tables_of_another_version_are_not_copied(postgres: PostgresServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tables of this version"):
        back_up(DataDir(tmp_path), postgres.new_database(), tmp_path / "back-up")
    assert not (tmp_path / "back-up").exists()


def test_the_queue_moves_to_postgresql_and_goes_on(
    site: Site, postgres: PostgresServer, tmp_path: Path
) -> None:
    """The files stay in place."""
    batch_id = site.submit((echo_line(n) for n in range(20)), "sim")
    there = postgres.new_database()
    command = [sys.executable, "-m", "batch_app.cli", "copy-database", there, "--json"]
    command += ["--data-dir", str(site.settings.data_dir)]
    for status in (0, 1):
        said = subprocess.run(
            command, cwd=REPO, check=False, capture_output=True, text=True, timeout=120
        )
        assert said.returncode == status, said.stderr
        if status == 0:
            answer = orjson.loads(said.stdout)
            assert answer["num_rows"] == 2  # a file and a batch
    assert "isn't empty" in said.stderr

    moved = Site(tmp_path / "first", database_url=there, **SETTINGS)
    try:
        moved.start_worker()
        assert moved.wait_until_done(batch_id).status is BatchStatus.COMPLETED
        assert_answers_echo(moved.results(batch_id), 20)
        assert site.batch(batch_id).status is BatchStatus.QUEUED  # the old one is as it was
    finally:
        moved.close()
