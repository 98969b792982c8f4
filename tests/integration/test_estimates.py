"""Estimates over HTTP: before a batch runs, without submitting, and while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batch_app.benchmarks import BenchmarkFolder, BenchmarkRecord
from batch_app.core import BatchStatus
from batch_app.estimates import Estimate
from batch_app.store import WorkerRow
from integration.api_fixtures import GUIDE_MODEL, Api, input_file, request_line
from support.site import Site, echo_line
from support.waiting import wait_for


def dry_run(api: Api, content: bytes, **fields: str) -> Any:
    answer = api.call("POST", "/v1/estimate", files={"file": ("x.jsonl", content)}, data=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def words(number: int, custom_id: str, **body: Any) -> bytes:
    said = {"messages": [{"role": "user", "content": "word " * number}], **body}
    return request_line(custom_id, body=said)


# -- without submitting ----------------------------------------------------------------------------


def test_a_dry_run_has_a_row_for_each_model(api: Api) -> None:
    found = dry_run(api, input_file(50))

    assert (found["num_requests"], found["num_errors"], found["count"]) == (50, 0, 2)
    gemma, sim = found["models"]
    assert (gemma["model"], sim["model"]) == (GUIDE_MODEL, "sim")
    assert gemma["max_model_len"] == 4096
    assert gemma["estimate"]["estimated_seconds"] > 26
    assert gemma["estimate"]["prompt_basis"] == "guess"
    assert "not on this machine" in gemma["reason"]
    assert sim["estimate"] is None  # nothing measured
    assert sim["reason"] is None
    api.assert_nothing_left()


def test_a_dry_run_names_the_lines_that_would_fail(api: Api) -> None:
    content = b"".join(
        [
            request_line("good"),
            words(5000, "too-long"),
            request_line("good"),
            b"not json\n",
            words(1, "too-much", max_tokens=5000),
            words(5000, "too-long-too"),
        ]
    )
    found = dry_run(api, content, model="gemma")

    assert found["num_errors"] == 2
    assert {error["line"]: error["code"] for error in found["errors"]} == {
        3: "duplicate_custom_id",
        4: "invalid_json_line",
    }
    (row,) = found["models"]
    assert row["num_too_long"] == 3
    assert row["lines"] == [2, 5, 6]
    api.assert_nothing_left()


def test_a_dry_run_of_an_uploaded_file(api: Api) -> None:
    form = {"file": ("x.jsonl", input_file(3))}
    file = api.call("POST", "/v1/files", files=form, data={"purpose": "batch"}).json()

    answer = api.call("POST", "/v1/estimate", json={"input_file_id": file["id"], "model": "sim"})

    assert answer.status_code == 200
    assert answer.json()["num_requests"] == 3
    assert [row["model"] for row in answer.json()["models"]] == ["sim"]
    assert api.data.input_file(file["id"]).exists()
    unknown = {"input_file_id": "file-" + "0" * 24}
    assert api.call("POST", "/v1/estimate", json=unknown).status_code == 404
    assert api.call("POST", "/v1/estimate", json={}).status_code == 400


def test_a_dry_run_refuses_what_it_cannot_look_at(api: Api) -> None:
    form = {"file": ("x.jsonl", input_file(1))}
    unknown = api.call("POST", "/v1/estimate", files=form, data={"model": "nobody"})
    assert unknown.status_code == 404
    assert api.call("POST", "/v1/estimate", data={"model": "sim"}).status_code in (400, 415)
    empty = dry_run(api, b"")
    assert (empty["num_requests"], empty["errors"][0]["code"]) == (0, "empty_file")
    assert empty["models"][0]["estimate"] is None


# -- what they rest on -----------------------------------------------------------------------------


def test_benchmarks_are_listed(api: Api) -> None:
    listed = api.get("/v1/benchmarks").json()
    assert (listed["count"], listed["has_more"]) == (1, False)
    assert listed["benchmarks"][0]["results"]["num_requests"] == 5000
    assert api.get("/v1/benchmarks?model=gemma").json()["count"] == 1
    assert api.get("/v1/benchmarks?model=sim").json()["count"] == 0
    assert api.get("/v1/benchmarks?model=nobody").status_code == 404


# -- a batch ---------------------------------------------------------------------------------------


def test_prompts_are_counted_soon_after_the_batch_is_made(api: Api) -> None:
    content = words(7, "a") + words(5, "b")
    batch_id = api.submit(content, model="sim").json()["batch_id"]
    assert api.batch(batch_id).workload  # something is known at once

    wait_for(lambda: api.batch(batch_id).counted_at is not None, what="its prompts are counted")

    (part,) = api.batch(batch_id).workload or ()
    assert part["basis"] == "counted"
    assert sum(group["prompt_tokens"] for group in part["workload"]["groups"]) == 12


def made_as_openais(api: Api, lines: bytes) -> str:
    """The id of a batch of the other dialect."""
    form = {"file": ("x.jsonl", lines)}
    file = api.call("POST", "/v1/files", files=form, data={"purpose": "batch"}).json()
    wish = {
        "input_file_id": file["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return str(api.call("POST", "/v1/batches", json=wish).json()["id"])


def test_a_batch_of_the_other_dialect_is_counted_too(api: Api) -> None:
    lines = [
        request_line(name, body={"model": "sim", "messages": [{"role": "user", "content": "a b"}]})
        for name in "xy"
    ]
    batch_id = made_as_openais(api, b"".join(lines))
    wait_for(lambda: api.batch(batch_id).counted_at is not None, what="its prompts are counted")
    assert (api.batch(batch_id).workload or ())[0]["basis"] == "counted"


def test_the_estimate_is_the_same_in_both_dialects(api: Api) -> None:
    hello = {"model": GUIDE_MODEL, "messages": [{"role": "user", "content": "Hello."}]}
    lines = b"".join(request_line(f"r{number}", body=hello) for number in range(20))
    theirs = made_as_openais(api, lines)
    wait_for(lambda: api.get(f"/v1/batches/{theirs}").json()["estimate"], what="it has an estimate")
    ours = api.submit(input_file(20)).json()["estimate"]
    estimate = api.get(f"/v1/batches/{theirs}").json()["estimate"]
    assert estimate.keys() == ours.keys()
    assert estimate["low_s"] < estimate["estimated_seconds"] < estimate["high_s"]
    assert estimate["prompt_tokens"] > 0
    assert estimate["expected_output_tokens"] > 0
    assert (estimate["queue_wait_s"], ours["queue_wait_s"] > 0) == (0, True)
    assert estimate["basis"] == ours["basis"] != []


def told(api: Api, batch_id: str, now: datetime) -> Estimate:
    """The estimate of a batch, at a moment that stands still."""
    own = api.services
    estimate = replace(own.estimating, clock=lambda: now).of(api.batch(batch_id))
    assert estimate is not None
    return estimate


def test_a_model_that_is_loaded_already_is_not_waited_for(api: Api) -> None:
    """Also where the worker last said that it is busy: it says so only now and then."""
    now = datetime.now(UTC)

    def report(model: str | None) -> None:
        row = WorkerRow("worker_1", "host", 1, 0.0, now, now, "working", model, first)
        api.store.report_worker(row)

    first = api.submitted(3)
    batch = api.store.claim_next("worker_1", 1000, now)
    assert batch is not None
    assert batch.id == first
    report(None)
    loading = told(api, first, now)
    report(GUIDE_MODEL)
    running = told(api, first, now)
    assert loading.duration_s - running.duration_s == pytest.approx(26, abs=1)

    second = api.submitted(3)
    behind = told(api, second, now)
    assert behind.queue_wait_s == pytest.approx(running.duration_s)
    assert behind.duration_s == pytest.approx(running.duration_s)
    api.store.transition(batch, BatchStatus.FAILED, now)
    assert told(api, second, now).duration_s == pytest.approx(running.duration_s)
    assert told(api, second, now).queue_wait_s == 0
    gone = now + timedelta(seconds=10 * api.services.settings.heartbeat_s)
    assert told(api, second, gone).duration_s == pytest.approx(loading.duration_s)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(
        tmp_path,
        heartbeat_s=0.2,
        poll_interval_s=0.1,
        commit_interval_s=0.05,
        drain_s=0.5,
        min_free_bytes=0,
    )
    yield site
    site.close()


def records(site: Site, model: str, number: int) -> tuple[BenchmarkRecord, ...]:
    """So many records of the model, newest first: they are written after a batch has ended."""
    folder = BenchmarkFolder(site.settings.benchmarks_dir)
    wait_for(lambda: len(folder.all(model)) == number, what=f"{number} records of {model}")
    return folder.all(model)


def test_while_it_runs_its_worker_says_what_is_left(site: Site) -> None:
    site.start_worker()
    first = site.submit((echo_line(n, max_tokens=8) for n in range(100)), "slow")
    assert site.wait_until_done(first).status is BatchStatus.COMPLETED
    batch_id = site.submit((echo_line(n, max_tokens=8) for n in range(1600)), "slow")
    seen: list[tuple[float, float]] = []

    def look() -> bool:
        batch = site.batch(batch_id)
        if batch.outlook and not batch.is_terminal:
            seen.append((batch.outlook["at"], batch.outlook["remaining_s"]))
            assert batch.outlook["low_s"] <= batch.outlook["remaining_s"] <= batch.outlook["high_s"]
        return batch.is_terminal

    wait_for(look, timeout_s=120, what=lambda: f"the batch ends\n{site.worker_output()}")

    # 1,600 answers of 3 tokens, 16 at a time, 20 ms a token: 6 s, or more on a busy machine. How
    # good such a forecast is, unit/test_live_forecast.py tells, whose clock is its own.
    moments = dict(seen)
    assert len(moments) >= 2
    assert max(moments.values()) > 1.5
    assert moments[max(moments)] < max(moments.values())
    record = records(site, "slow", 2)[0]
    assert record.prediction is not None
    assert record.results.line_bytes
    assert record.hardware.machine
    assert record.purpose == "batch"


def test_on_what_a_batch_ran_is_kept(site: Site) -> None:
    site.start_worker()
    batch_id = site.submit((echo_line(n) for n in range(5)), "sim")
    batch = site.wait_until_done(batch_id)
    assert batch.provenance is not None
    (run,) = batch.provenance["runs"]
    assert run["model"] == run["engine"] == "sim"
    assert run["device"] == "simulated"
    assert run["engine_version"]
    assert "seed" in run
    assert batch.provenance["server_version"]


def test_a_run_that_fails_is_marked(site: Site) -> None:
    site.start_worker()
    lines = [echo_line(n) for n in range(20)]
    for line in lines[::2]:
        line["body"]["messages"][0]["content"] = "more words than fit its context of five"
    assert site.wait_until_done(site.submit(lines, "tiny-context")).progress.failed == 10
    (record,) = records(site, "tiny-context", 1)
    assert record.set_aside == "failed: 10 of 20 requests"
    assert not record.is_representative
    json.dumps(record.model_dump(mode="json"))


@pytest.mark.parametrize("model", ["mortal"])
def test_a_run_in_which_the_engine_died_is_marked(site: Site, model: str) -> None:
    site.start_worker()
    batch_id = site.submit((echo_line(n) for n in range(500)), model)
    assert site.wait_until_done(batch_id).progress.completed == 500
    (record,) = records(site, model, 1)
    assert (record.set_aside or "").startswith("outlier: the engine died")
