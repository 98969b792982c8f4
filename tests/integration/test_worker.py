"""The worker as a process: what it does with a batch, whatever happens to it meanwhile."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from batch_app.benchmarks import BenchmarkFolder
from batch_app.core import BatchStatus, PauseKind, utc_now
from batch_app.database import sqlite_driver
from support.site import ENDLESS, Site, assert_answers_echo, echo_line, engine_pid
from support.waiting import wait_for


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    settings = {"heartbeat_s": 0.3, "poll_interval_s": 0.5} | getattr(request, "param", {})
    site = Site(tmp_path, **settings)
    yield site
    site.close()


def with_settings(**settings: float) -> pytest.MarkDecorator:
    """A site of its own kind. Short leases only where one has to run out: a busy machine's worker
    may be silent for a while."""
    return pytest.mark.parametrize("site", [settings], indirect=True, ids=[""])


def test_a_batch_runs_to_its_end(site: Site) -> None:
    batch_id = site.submit((echo_line(n) for n in range(1000)), "sim")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (1000, 0)
    assert batch.progress.tokens.prompt_tokens == 3000
    assert batch.started_at
    assert batch.completed_at
    assert_answers_echo(site.results(batch_id), 1000)
    assert batch.output_file_id
    assert site.data.output_file(batch.output_file_id).read_bytes() == (
        site.data.results_file(batch).read_bytes()
    )
    wait_for(lambda: not site.data.work_dir(batch_id).exists(), what="the work folder is gone")
    log = site.log(batch_id)
    for said in ("Claimed", "loaded in", "Completed: 1,000 succeeded, 0 failed"):
        assert said in log
    assert "say number" not in log


def test_a_finished_batch_leaves_a_benchmark(site: Site) -> None:
    batch_id = site.submit((echo_line(n) for n in range(200)), "slow")
    site.start_worker()
    site.wait_until_done(batch_id)
    folder = BenchmarkFolder(site.settings.benchmarks_dir)
    record = wait_for(lambda: folder.latest("slow"), what="a benchmark")
    assert record is not None
    assert record.results.success_count == 200
    assert record.results.completion_tokens == 600
    # 16 at a time, three steps of 20 ms each: no faster than 267 a second.
    assert 0 < record.results.throughput_requests_per_s < 267


def test_batches_run_first_in_first_out(site: Site) -> None:
    ids = [site.submit((echo_line(n) for n in range(20)), "sim") for _ in range(4)]
    site.start_worker()
    done = [site.wait_until_done(batch_id) for batch_id in ids]
    finished = [batch.completed_at for batch in done if batch.completed_at]
    assert len(finished) == len(ids)
    assert finished == sorted(finished)


def test_failed_requests_stand_alone_and_in_their_place(site: Site) -> None:
    lines = [echo_line(n) for n in range(30)]
    too_long = "word " * 20
    lines[7]["body"]["messages"][0]["content"] = too_long
    batch_id = site.submit(lines, "tiny-context")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (29, 1)
    results = site.results(batch_id)
    assert [line["custom_id"] for line in results] == [f"r{n}" for n in range(30)]
    assert results[7]["response"]["status_code"] == 400
    assert "context length" in results[7]["response"]["body"]["error"]["message"]
    assert batch.output_file_id
    assert batch.error_file_id
    errors = site.data.output_file(batch.error_file_id).read_bytes().splitlines()
    assert [orjson.loads(line)["custom_id"] for line in errors] == ["r7"]
    output = site.data.output_file(batch.output_file_id).read_bytes().splitlines()
    assert len(output) == 29
    log = site.log(batch_id)
    assert "Request r7 failed: status 400, BadRequestError" in log
    assert "word word" not in log


def test_a_model_that_does_not_load_waits_for_its_entry_and_nobody_else_does(site: Site) -> None:
    bad = site.submit([echo_line(0)], "unloadable")
    good = site.submit([echo_line(0)], "sim")
    site.start_worker()
    assert site.wait_until_done(good).status is BatchStatus.COMPLETED
    paused = site.batch(bad).paused
    assert paused is not None
    assert (paused.kind, paused.reason) == (PauseKind.REGISTRY, "No such weights.")
    assert paused.retry_at is None
    text = site.settings.models.read_text()
    site.settings.models.write_text(text.replace('fail_load = "No such weights."', ""))
    assert site.wait_until_done(bad).status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(bad), 1)
    assert site.log(bad).count("Loading unloadable") == 2


@pytest.mark.parametrize("num_kills", [1, 3])
def test_a_killed_engine_costs_nothing_but_time(site: Site, num_kills: int) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(1500)), "held")
    worker = site.start_worker()
    last = 0
    for kill in range(num_kills):
        site.wait_for_progress(batch_id, 100 * (kill + 1))  # each of them gives 100 answers
        pid = engine_pid(worker.pid)
        assert pid != last
        os.kill(pid, signal.SIGKILL)
        last = pid
        wait_for(lambda kill=kill: site.log(batch_id).count("Starting the engine again") > kill)
    site.hold.unlink()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 1500)


def test_an_engine_that_keeps_dying_is_started_again_as_long_as_it_gets_further(
    site: Site,
) -> None:
    batch_id = site.submit((echo_line(n) for n in range(1000)), "mortal")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 1000)
    assert site.log(batch_id).count("killed by SIGKILL") >= 3


@with_settings(engine_hang_s=3.0)
def test_a_hanging_engine_is_killed_and_started_again(site: Site) -> None:
    batch_id = site.submit((echo_line(n) for n in range(60)), "hanging")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 60)
    assert "the engine was killed" in site.log(batch_id)
    engine_log = (site.data.engine_log).read_text()
    assert "in collect" in engine_log  # the stacks of the hanging process


@with_settings(lease_s=3.0)
def test_a_killed_worker_is_rescued_and_nothing_runs_twice(site: Site) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(1500)), "held")
    worker = site.start_worker()
    before = site.wait_for_progress(batch_id, 100)
    engine = engine_pid(worker.pid)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(timeout=120)
    wait_for(lambda: not _is_running(engine), what="the engine ends with its worker")
    assert site.batch(batch_id).status is BatchStatus.RUNNING

    site.hold.unlink()
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.epoch > before.epoch
    assert_answers_echo(site.results(batch_id), 1500)
    # Its log tells that what was done is done: no more than a commit's worth is computed again.
    assert "Going on: " in site.log(batch_id)


def test_a_stopped_worker_gives_its_batch_back(site: Site) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(1500)), "held")
    worker = site.start_worker()
    before = site.wait_for_progress(batch_id, 100).progress.done
    worker.send_signal(signal.SIGINT)
    wait_for(lambda: "Stopping" in site.worker_output())
    site.hold.unlink()
    assert worker.wait(timeout=120) == 0
    batch = site.batch(batch_id)
    assert batch.status is BatchStatus.RUNNING
    assert batch.lease_owner is None
    assert before < batch.progress.done < 1500, "what was in flight was finished, and no more"
    assert "given back" in site.log(batch_id)
    assert site.store.list_workers() == []

    site.start_worker()
    assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 1500)


@with_settings(drain_s=600.0)
def test_a_second_signal_ends_the_worker_at_once(site: Site) -> None:
    batch_id = site.submit((echo_line(n) for n in range(ENDLESS)), "endless")
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 1)
    os.kill(engine_pid(worker.pid), signal.SIGSTOP)  # so that nothing can drain
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: "Stopping" in site.worker_output())
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=120) != 0
    assert site.batch(batch_id).progress.done >= 1


def test_cancelling_keeps_the_results_so_far(site: Site) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(5000)), "held")
    site.start_worker()
    site.wait_for_progress(batch_id, 100)
    site.store.request_cancel(batch_id, utc_now())
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert batch.progress.completed >= 100
    lines = site.results(batch_id)
    assert [line["custom_id"] for line in lines] == [f"r{n}" for n in range(5000)]
    answered = [line for line in lines if line["response"]]
    assert len(answered) == batch.progress.completed
    assert {line["error"]["code"] for line in lines if line["error"]} == {"batch_cancelled"}


@with_settings(lease_s=3.0)
def test_a_worker_that_slept_past_its_lease_changes_nothing(site: Site) -> None:
    site.hold.touch()
    batch_id = site.submit((echo_line(n) for n in range(1500)), "held")
    sleeper = site.start_worker()
    before = site.wait_for_progress(batch_id, 100).progress.done
    stop_outside_a_transaction(site, sleeper.pid)
    other = site.start_worker()
    wait_for(lambda: site.batch(batch_id).epoch > 1, what="the other worker takes over")
    site.wait_for_progress(batch_id, before + 100)
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_for(lambda: "lost this batch" in site.log(batch_id), what="the sleeper notices")
    site.hold.unlink()
    site.wait_until_done(batch_id)
    assert_answers_echo(site.results(batch_id), 1500)
    assert sleeper.poll() is None
    assert other.poll() is None


def test_two_workers_share_the_queue_and_never_a_batch(site: Site) -> None:
    site.hold.touch()
    ids = [site.submit((echo_line(n) for n in range(300)), "held") for _ in range(4)]
    for _ in range(2):
        site.start_worker()
    for batch_id in ids[:2]:
        site.wait_for_progress(batch_id, 100)
    site.hold.unlink()
    for batch_id in ids:
        batch = site.wait_until_done(batch_id)
        assert batch.status is BatchStatus.COMPLETED
        assert batch.epoch == 1
        assert_answers_echo(site.results(batch_id), 300)
    claims = [re.findall(r"Claimed by worker (\w+)", site.log(batch_id)) for batch_id in ids]
    assert [len(workers) for workers in claims] == [1] * 4
    assert len({worker for workers in claims for worker in workers}) == 2


def test_the_service_manager_hears_of_a_worker(site: Site, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(120)
        worker = site.start_worker(
            NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="120000000"
        )
        heard = [manager.recv(100) for _ in range(4)]
        assert heard.count(b"READY=1") == 1
        assert heard.count(b"WATCHDOG=1") == 3
        worker.terminate()
        while (message := manager.recv(100)) != b"STOPPING=1":
            assert message == b"WATCHDOG=1"
        assert worker.wait(timeout=120) == 0


def test_a_lost_index_is_made_anew(site: Site) -> None:
    batch_id = site.submit((echo_line(n) for n in range(50)), "sim")
    (site.data.work_dir(batch_id) / "index.bin").write_bytes(b"short")
    site.start_worker()
    assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
    assert_answers_echo(site.results(batch_id), 50)


def stop_outside_a_transaction(site: Site, pid: int) -> None:
    """SIGSTOP a worker while it doesn't hold SQLite's write lock, which nobody could take away."""
    path = site.settings.resolved_database_url.removeprefix("sqlite:///")

    def stopped() -> bool:
        os.kill(pid, signal.SIGSTOP)
        connection = sqlite_driver().connect(path, timeout=0.2, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite_driver().OperationalError:
            os.kill(pid, signal.SIGCONT)
            return False
        finally:
            connection.close()
        return True

    wait_for(stopped, what="the worker stands still without the lock")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
