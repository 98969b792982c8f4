"""A defect of ours meets a batch: its owner still gets what is done, and the queue goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from batch_app import closing, foresight, runner
from batch_app.benchmarks import BenchmarkFolder, BenchmarkPrediction
from batch_app.core import Batch, BatchStatus, Paused, PauseKind, utc_now
from batch_app.errors import LeaseLost, StorageFull
from batch_app.failure_policy import MAX_UNKNOWN
from batch_app.worker import Worker
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import wait_for


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, commit_interval_s=0.02, heartbeat_s=0.1, pause_first_s=0.01)
    yield site
    site.close()


@pytest.fixture
def worker(site: Site) -> Iterator[Worker]:
    """A worker of this process that does only what it is told."""
    worker = Worker(site.settings, stop=threading.Event())
    yield worker
    worker._slot.unload()
    worker._store.close()


def work(worker: Worker) -> None:
    """Work on one batch, once, when its time has come."""
    worker._work_on(wait_for(worker._claim, what="a batch to work on"))


def work_to_the_end(site: Site, worker: Worker, batch_id: str) -> None:
    while not site.batch(batch_id).is_terminal:
        work(worker)


def defect_after(
    monkeypatch: pytest.MonkeyPatch, num_done: int, also: Callable[[Batch], object] = lambda _: None
) -> None:
    """The runner meets a defect once so many results are on disk, and gets no further."""
    deliver = runner._Run._deliver

    def broken(run: Any, deliveries: Any, num_in_flight: int) -> None:
        if run._log.progress.done >= num_done:
            also(run._batch)
            raise KeyError("a prompt, perhaps")
        deliver(run, deliveries, num_in_flight)

    monkeypatch.setattr(runner._Run, "_deliver", broken)


def published(site: Site, batch: Batch) -> tuple[list[Any], list[Any]]:
    found: list[list[Any]] = []
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id
        file = site.store.get_file(file_id)
        raw = site.data.output_file(file.id).read_bytes()
        assert len(raw) == file.size_bytes
        found.append([orjson.loads(line) for line in raw.splitlines()])
    return found[0], found[1]


def test_what_is_done_is_published(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = site.submit((echo_line(n) for n in range(400)), "slow")
    with monkeypatch.context() as patch:
        defect_after(patch, 30)
        work(worker)
        paused = site.batch(batch_id).paused
        assert paused is not None
        assert paused.kind is PauseKind.INTERNAL
        work_to_the_end(site, worker, batch_id)
    batch = site.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    message = batch.error_message or ""
    assert message.startswith("Internal error (KeyError, test_worker_defects.py:")
    assert f"vllm-batch retry {batch_id}" in message
    assert site.log(batch_id).count("Paused for") >= MAX_UNKNOWN
    output, errors = published(site, batch)
    assert 30 <= len(output) == batch.progress.completed < 400
    assert (batch.progress.failed, len(errors)) == (0, 400 - len(output))
    assert {error["error"]["code"] for error in errors} == {"batch_failed"}
    assert [line["custom_id"] for line in site.results(batch_id)] == [f"r{n}" for n in range(400)]
    assert "a prompt" not in site.log(batch_id)
    assert not site.data.work_dir(batch_id).exists()

    good = site.submit((echo_line(n) for n in range(3)), "sim")
    work(worker)
    assert site.batch(good).status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(good), 3)


def test_a_batch_that_was_to_be_cancelled_is(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = site.submit((echo_line(n) for n in range(400)), "slow")
    defect_after(monkeypatch, 30, also=lambda batch: site.store.request_cancel(batch.id, utc_now()))
    work(worker)
    work(worker)
    batch = site.batch(batch_id)
    assert (batch.status, batch.error_message) == (BatchStatus.CANCELLED, None)
    output, errors = published(site, batch)
    assert len(output) + len(errors) == 400
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}


def test_a_defect_in_publishing_ends_it_without_files(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError

    for module in (runner, closing):
        monkeypatch.setattr(module, "publish", broken)
    batch_id = site.submit((echo_line(n) for n in range(3)), "sim")
    work_to_the_end(site, worker, batch_id)
    batch = site.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.progress.completed == 3


def test_a_result_damaged_before_it_is_published_runs_again(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees the flipped byte, and nothing else runs again."""
    batch_id = site.submit((echo_line(n) for n in range(50)), "sim")
    publish = runner.publish

    def flipped_before(*given: Any) -> Any:
        (path,) = site.data.work_dir(batch_id).glob("results-*.log")
        path.write_bytes(path.read_bytes().replace(b"say number 7", b"say number 8", 1))
        return publish(*given)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "publish", flipped_before)
        work(worker)
    paused = site.batch(batch_id)
    assert paused.status is BatchStatus.FINALIZING
    assert "request 7 was damaged" in (paused.pause_reason or "")
    # Its window is over by now; but all had been answered in time.
    site.set_row("batches", batch_id, expires_at=paused.created_at)
    work(worker)
    batch = site.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (50, 0)
    assert_answers_echo(site.results(batch_id), 50)
    assert "Going on: 49 of 50 requests are done." in site.log(batch_id)


def test_no_room_for_the_files_is_no_end(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFull("No space left.")

    batch_id = site.submit((echo_line(n) for n in range(400)), "slow")
    with monkeypatch.context() as patch:
        patch.setattr(closing, "publish", full)
        defect_after(patch, 30)
        while "Failed: Internal error" not in site.log(batch_id):
            work(worker)
    batch = site.batch(batch_id)
    assert (batch.status, batch.lease_owner) == (BatchStatus.QUEUED, None)
    assert batch.pause_reason == "No space left."
    work(worker)
    assert site.batch(batch_id).status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 400)


def test_a_defect_after_the_end_changes_nothing(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError

    batch_id = site.submit((echo_line(n) for n in range(3)), "sim")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "benchmark_of", broken)
        work(worker)
    batch = site.batch(batch_id)
    assert (batch.status, batch.pause_reason) == (BatchStatus.COMPLETED, None)
    assert_answers_echo(site.results(batch_id), 3)
    assert "what comes after that failed" in caplog.text
    with pytest.raises(LeaseLost):
        site.store.renew(batch, lease_s=1.0)
    with pytest.raises(LeaseLost):
        site.store.pause(batch, Paused(PauseKind.DISK, "It can't be.", utc_now()), 1)
    assert site.batch(batch_id) == batch


def test_a_run_expected_to_take_no_time_is_measured(
    site: Site, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny batch may be expected to take 0.000 s."""
    nothing = BenchmarkPrediction(predicted_s=0.0, low_s=0.0, high_s=0.0)
    monkeypatch.setattr(foresight, "_prediction", lambda _: nothing)
    batch_id = site.submit((echo_line(n) for n in range(3)), "sim")
    work(worker)
    assert site.batch(batch_id).status is BatchStatus.COMPLETED
    (record,) = BenchmarkFolder(site.settings.benchmarks_dir).all()
    assert "not 0 to 0 s" in (record.set_aside or "")
