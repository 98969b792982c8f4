"""Equal requests are computed once, whatever happens to the worker meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_app.benchmarks import BenchmarkFolder
from batch_app.copies import Copies
from batch_app.core import BatchStatus
from batch_app.engine.base import Outcome
from batch_app.index import DTYPE, Index
from batch_app.inputs import InputFile
from support.site import Site, assert_answers_echo, echo_line, engine_pid
from support.waiting import wait_for


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, lease_s=3.0, heartbeat_s=0.3, poll_interval_s=0.5)
    yield site
    site.close()


def alike(number: int, what: int, **body: Any) -> dict[str, Any]:
    """A request that asks `what`, under an id of its own."""
    return echo_line(what, temperature=0, **body) | {"custom_id": f"r{number}"}


def bodies(site: Site, batch_id: str) -> dict[str, dict[str, Any]]:
    results = site.results(batch_id)
    return {line["custom_id"]: line["response"]["body"] for line in results}


def num_computed(site: Site, model: str) -> int:
    record = wait_for(
        lambda: BenchmarkFolder(site.settings.benchmarks_dir).latest(model), what="a benchmark"
    )
    assert record is not None
    return record.results.num_requests


def test_equal_requests_are_computed_once(site: Site) -> None:
    batch_id = site.submit((alike(n, n % 50) for n in range(1000)), "sim")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.deduplicated) == (1000, 950)
    assert [line["custom_id"] for line in site.results(batch_id)] == [f"r{n}" for n in range(1000)]
    for n, body in enumerate(bodies(site, batch_id).values()):
        assert body["choices"][0]["message"]["content"] == f"say number {n % 50}"
    assert batch.progress.tokens.prompt_tokens == 3000  # as the lines' own usage says
    assert num_computed(site, "sim") == 50
    log = site.log(batch_id)
    assert "950 of the requests for sim repeat" in log
    assert "950 deduplicated" in log


def test_sampled_requests_are_each_computed(site: Site) -> None:
    batch_id = site.submit((echo_line(1) | {"custom_id": f"r{n}"} for n in range(100)), "sim")
    site.start_worker()
    assert site.wait_until_done(batch_id).progress.deduplicated == 0
    assert num_computed(site, "sim") == 100


def test_the_server_can_do_without(tmp_path: Path) -> None:
    site = Site(tmp_path, deduplicate=False)
    try:
        batch_id = site.submit((alike(n, 1) for n in range(100)), "sim")
        site.start_worker()
        assert site.wait_until_done(batch_id).progress.deduplicated == 0
        assert num_computed(site, "sim") == 100
    finally:
        site.close()


def test_a_request_s_own_mistake_is_answered_under_every_id(site: Site) -> None:
    lines = [alike(n, 1) for n in range(20)]
    for line in lines[5:15]:
        line["body"]["messages"][0]["content"] = "word " * 20
    batch_id = site.submit(lines, "tiny-context")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert (batch.progress.completed, batch.progress.failed) == (10, 10)
    assert batch.progress.deduplicated == 18
    failed = [line for line in site.results(batch_id) if line["response"]["status_code"] == 400]
    assert [line["custom_id"] for line in failed] == [f"r{n}" for n in range(5, 15)]


def test_a_killed_worker_s_answers_serve_the_equals_that_are_left(site: Site) -> None:
    """Equals far behind their first; the worker dies between the two."""
    lines = [alike(n, n % 400) for n in range(800)]
    site.hold.touch()
    batch_id = site.submit(lines, "held")
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 100)
    engine = engine_pid(worker.pid)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert engine
    site.hold.unlink()
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.progress.completed == 800
    assert batch.progress.deduplicated >= 400  # more where a leader's commit was cut from its copy
    answers = bodies(site, batch_id)
    assert len(answers) == 800
    for n in range(800):
        assert answers[f"r{n}"]["choices"][0]["message"]["content"] == f"say number {n % 400}"


def test_an_engine_s_death_leaves_no_equal_behind(site: Site) -> None:
    batch_id = site.submit([alike(n, n % 500) for n in range(1000)], "mortal")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.deduplicated) == (1000, 500)
    answers = bodies(site, batch_id)
    for n in range(1000):
        assert answers[f"r{n}"]["choices"][0]["message"]["content"] == f"say number {n % 500}"


def test_equal_hashes_are_not_enough(site: Site) -> None:
    """Whatever the index says: a body that differs is computed on its own."""
    batch_id = site.submit([echo_line(n, temperature=0) for n in range(100)], "sim")
    index = site.data.work_dir(batch_id) / "index.bin"
    records = np.fromfile(index, DTYPE)
    records["content"] = 7
    records.tofile(index)
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert (batch.progress.completed, batch.progress.deduplicated) == (100, 0)
    assert_answers_echo(site.results(batch_id), 100)


def test_the_same_body_for_another_endpoint_asks_something_else(site: Site) -> None:
    urls = ("/v1/embeddings", "/v1/embeddings", "/v1/responses")
    lines = [{"custom_id": url[4:], "url": url, "body": {"input": "x"}} for url in urls]
    lines[1]["custom_id"] = "again"
    batch_id = site.submit(lines, "sim")
    index = Index.load(site.data.work_dir(batch_id))
    with InputFile(site.data.input_file(site.batch(batch_id).input_file_id), index) as inputs:
        copies = Copies(index, inputs)
        (deliveries,) = copies.of(Outcome(0, 200, b"{}"), [1, 2])
    assert [delivery.custom_id for delivery in deliveries] == ["again"]
    assert copies.refused == [2]


@pytest.mark.long
def test_what_kills_the_engine_is_not_tried_again_for_its_equals(site: Site) -> None:
    lines = [alike(n, n) for n in range(60)]
    for place in (10, 40):
        lines[place]["body"]["messages"][0]["content"] = "some arsenic"
    batch_id = site.submit(lines, "delicate")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (58, 2)
    unanswered = [line for line in site.results(batch_id) if line["response"] is None]
    assert [line["custom_id"] for line in unanswered] == ["r10", "r40"]
    assert {line["error"]["code"] for line in unanswered} == {"request_quarantined"}
    assert site.log(batch_id).count("is quarantined") == 1
