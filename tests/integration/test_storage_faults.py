"""A disk full or read-only, a database locked: the batch waits, says why, and goes on."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch_app.core import BatchStatus
from batch_app.database import sqlite_driver
from support.site import Site, assert_answers_echo, echo_line, kill_tree
from support.waiting import wait_for

NUM_REQUESTS = 1500
SETTINGS: dict[str, Any] = {
    "lease_s": 3.0,
    "heartbeat_s": 0.3,
    "poll_interval_s": 0.2,
    "commit_interval_s": 0.05,
    "min_free_bytes": 0,
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, **SETTINGS)
    yield site
    site.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def site_on_small_disk(small_disk: Path) -> Iterator[Site]:
    site = Site(small_disk, **SETTINGS)
    yield site
    site.close()


def paused_for(url: str, batch_id: str, what: str) -> Callable[[], bool]:
    """Whether both dialects say that the batch is paused for this reason."""

    def look() -> bool:
        reasons = []
        for dialect in ("native", "openai"):
            answer = httpx.get(f"{url}/v1/batches/{batch_id}?format={dialect}", timeout=120)
            assert answer.status_code == 200
            reasons.append(answer.json()["pause_reason"] or "")
        return all(what in reason for reason in reasons)

    return look


def fill(folder: Path) -> Path:
    """Take all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def test_a_full_disk_pauses_the_batch_until_there_is_room(
    site_on_small_disk: Site, small_disk: Path
) -> None:
    site = site_on_small_disk
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(NUM_REQUESTS)), "held")
    url = site.start_server()
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 100)
    ballast = fill(small_disk)
    site.hold.unlink()
    wait_for(paused_for(url, batch_id, "No space left"), what=lambda: site.log(batch_id))
    assert site.batch(batch_id).status in (BatchStatus.QUEUED, BatchStatus.RUNNING)
    ballast.unlink()
    batch = site.wait_until_done(batch_id, timeout_s=120)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.pause_reason is None
    assert_answers_echo(site.results(batch_id), NUM_REQUESTS)
    assert worker.poll() is None


def test_a_locked_database_is_waited_for(site: Site) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(NUM_REQUESTS)), "held")
    url = site.start_server()
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 100)
    path = site.settings.resolved_database_url.removeprefix("sqlite:///")
    connection = sqlite_driver().connect(path, timeout=60, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        before = site.batch(batch_id).progress.done
        # It goes on computing, and what it computes is kept, while nobody can be told.
        folder = site.data.work_dir(batch_id)

        def log_bytes() -> int:
            return sum(path.stat().st_size for path in folder.glob("results-*.log"))

        size = log_bytes()
        site.hold.unlink()
        wait_for(lambda: log_bytes() > size + 20_000, what="results go on being committed")
        answer = httpx.get(f"{url}/v1/batches/{batch_id}", timeout=120)
        assert answer.status_code == 200
        assert answer.json()["progress"]["completed"] == before
    finally:
        connection.execute("ROLLBACK")
        connection.close()
    batch = site.wait_until_done(batch_id, timeout_s=120)
    assert batch.status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), NUM_REQUESTS)
    assert worker.poll() is None


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [("write", errno.ENOSPC, "No space left"), ("fsync", errno.EROFS, "Read-only file system")],
)
def test_a_worker_that_can_t_write_says_why(site: Site, call: str, number: int, said: str) -> None:
    batch_id = site.submit((echo_line(n) for n in range(600)), "slow")
    url = site.start_server()
    failing = {"call": call, "at": 5, "for_good": True, "errno": number}
    worker = site.start_worker(FAIL=json.dumps(failing))
    wait_for(paused_for(url, batch_id, said), what=lambda: f"paused\n{site.log(batch_id)}")
    assert worker.poll() is None
    done = site.batch(batch_id).progress.done
    kill_tree(worker.pid)
    worker.wait(120)
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.progress.done >= done
    assert_answers_echo(site.results(batch_id), 600)
