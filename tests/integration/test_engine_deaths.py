"""What the engine dies of, and what becomes of the requests that were in flight."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_app.core import BatchStatus, utc_now
from batch_app.failure_policy import MAX_UNKNOWN
from support.site import Site, echo_line
from support.waiting import wait_for


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(
        tmp_path,
        lease_s=2.0,
        heartbeat_s=0.3,
        poll_interval_s=0.2,
        commit_interval_s=0.05,
        engine_backoff_s=0.01,
        max_engine_restarts=2,
        pause_first_s=0.01,
    )
    yield site
    site.close()


def poison(number: int) -> dict[str, Any]:
    line = echo_line(number)
    line["body"]["messages"][0]["content"] = f"arsenic number {number}"
    return line


def lines(num: int, poisons: set[int]) -> list[dict[str, Any]]:
    return [poison(n) if n in poisons else echo_line(n) for n in range(num)]


def assert_all_but_the_poisons_answered(
    results: list[dict[str, Any]], num: int, poisons: set[int]
) -> None:
    assert [line["custom_id"] for line in results] == [f"r{n}" for n in range(num)]
    for number, line in enumerate(results):
        if number in poisons:
            assert line["response"] is None
            assert line["error"]["code"] == "request_quarantined"
        else:
            message = line["response"]["body"]["choices"][0]["message"]
            assert message["content"] == f"say number {number}"


def test_poisonous_requests_are_found_and_the_others_finish(site: Site) -> None:
    poisons = {3, 90, 91}
    batch_id = site.submit(lines(150, poisons), "delicate")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (147, 3)
    assert_all_but_the_poisons_answered(site.results(batch_id), 150, poisons)
    log = site.log(batch_id)
    assert log.count("is quarantined") == 3
    assert log.count("Starting the engine again") <= 3 * (32).bit_length() + 3 * 4
    assert "arsenic" not in log


def test_a_search_goes_on_after_its_worker_was_killed(site: Site) -> None:
    batch_id = site.submit(lines(60, {5}), "delicate")
    worker = site.start_worker()
    wait_for(lambda: "apart from the others" in site.log(batch_id), what="the search begins")
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(timeout=120)
    before = site.log(batch_id).count("Starting the engine again")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_all_but_the_poisons_answered(site.results(batch_id), 60, {5})
    # What was in flight at the first death didn't have to be found out again.
    claimed_again = site.log(batch_id).rsplit("Claimed by worker", 1)[1]
    first_try = next(line for line in claimed_again.splitlines() if "in flight" in line)
    assert "apart from the others" in first_try
    assert before >= 1


@pytest.mark.long
def test_an_engine_that_dies_of_everything_fails_the_batch(site: Site) -> None:
    batch_id = site.submit(lines(40, set(range(40))), "delicate")
    good = site.submit(lines(5, set()), "delicate")
    site.start_worker()
    assert site.wait_until_done(good).status is BatchStatus.COMPLETED, "it overtakes"
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert f"vllm-batch retry {batch_id}" in (batch.error_message or "")
    assert "without an answer in between (max_engine_restarts)" in (batch.error_message or "")
    codes = [line["error"]["code"] for line in site.results(batch_id)]
    assert codes == ["batch_failed"] * 40
    assert site.log(batch_id).count("Paused for") == MAX_UNKNOWN
    claims = MAX_UNKNOWN + 1
    most = claims * (2 + (32).bit_length() + 2)
    assert site.log(batch_id).count("Starting the engine again") <= most


def test_a_batch_of_one_poisonous_request_completes(site: Site) -> None:
    batch_id = site.submit(lines(1, {0}), "delicate")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_all_but_the_poisons_answered(site.results(batch_id), 1, {0})


def test_results_so_far_are_kept_while_the_engine_stays_dead(site: Site) -> None:
    batch_id = site.submit(lines(200, set(range(100, 200))), "delicate")
    site.start_worker()
    wait_for(lambda: "(engine): The engine ended" in site.log(batch_id), what="it pauses")
    site.store.request_cancel(batch_id, utc_now())
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    results = site.results(batch_id)
    assert len(results) == 200
    answered = [line for line in results if line["response"]]
    assert len(answered) == batch.progress.completed >= 60
    assert batch.output_file_id
    assert batch.error_file_id


def test_out_of_memory_makes_the_engine_smaller(site: Site) -> None:
    batch_id = site.submit(lines(100, set()), "small-memory")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_all_but_the_poisons_answered(site.results(batch_id), 100, set())
    log = site.log(batch_id)
    assert "From now on it gets 8 requests" in log
    assert "From now on it gets 4 requests" in log
    again = site.submit(lines(100, set()), "small-memory")
    assert site.wait_until_done(again).status is BatchStatus.COMPLETED
    assert "out of memory." not in site.log(again)
    assert "is quarantined" not in log
