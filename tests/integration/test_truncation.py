"""Answers that were cut off at `max_tokens` are counted, once, and told wherever a batch is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from openai import OpenAI

from batch_app.core import BatchStatus, FinishReasonCounts
from support.shell import Shell
from support.site import Site, echo_line


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, poll_interval_s=0.2, min_free_bytes=0, progress_log_s=0.05)
    yield site
    site.close()


def cut_off(number: int) -> dict[str, Any]:
    """The answer to it has three words."""
    return echo_line(number, max_tokens=2)


def test_everything_says_that_all_answers_were_cut_off(site: Site, tmp_path: Path) -> None:
    batch_id = site.submit(map(cut_off, range(300)), "slow")
    url = site.start_server()
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.progress.finish_reasons == FinishReasonCounts(length=300)
    lines = site.log(batch_id).splitlines()
    assert "300 succeeded, 0 failed of 300" in lines[-1]
    assert "300 cut off at max_tokens" in lines[-1]
    assert any(" done (" in line and "cut off at max_tokens" in line for line in lines[:-1])

    counts = dict.fromkeys(("stop", "tool_calls", "content_filter", "other", "none"), 0)
    native = httpx.get(f"{url}/v1/batches/{batch_id}", timeout=120).json()
    assert native["progress"]["truncated"] == 300
    assert native["finish_reasons"] == counts | {"length": 300}
    seen = OpenAI(base_url=f"{url}/v1", api_key="none").batches.retrieve(
        batch_id, extra_query={"format": "openai"}
    )
    assert seen.model_extra
    assert seen.model_extra["finish_reasons"] == native["finish_reasons"]
    assert seen.model_extra["progress"]["truncated"] == 300
    metrics = httpx.get(f"{url}/metrics", timeout=120).text
    assert 'vllm_batch_answers_total{finish_reason="length",model="slow"} 300.0' in metrics
    for path in ("/", f"/batches/{batch_id}"):
        assert "300 cut off at max_tokens" in httpx.get(f"{url}{path}", timeout=120).text
    shell = Shell(tmp_path, url)
    assert "300 of 300 done (100.0%), 300 cut off at max_tokens" in shell("status", batch_id).out
    for command in ("watch", "wait"):
        said = shell(command, batch_id)
        assert (said.code, "300 answered, 300 cut off at max_tokens" in said.err) == (0, True)


def test_each_answer_is_counted_once_across_a_killed_worker(site: Site) -> None:
    """Equal requests, the copies of an answer count as answers; the worker dies in between."""
    lines = [
        echo_line(n, temperature=0, max_tokens=2 + n % 2)
        | {"body": echo_line(n % 200, temperature=0, max_tokens=2 + n % 2)["body"]}
        for n in range(400)
    ]
    site.hold.touch()
    batch_id = site.submit(lines, "held")
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 50)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    site.hold.unlink()
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.progress.completed == 400
    assert batch.progress.deduplicated >= 200
    assert batch.progress.finish_reasons == FinishReasonCounts(stop=200, length=200)
    published = [
        each["response"]["body"]["choices"][0]["finish_reason"] for each in site.results(batch_id)
    ]
    assert [published.count("stop"), published.count("length")] == [200, 200]


@pytest.mark.long
@pytest.mark.engine
def test_vllm_says_what_was_cut_off(site: Site) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    lines = [echo_line(n) | {"body": chat | {"max_tokens": 1 + n}} for n in range(4)]
    lines.append(
        {
            "custom_id": "several",
            "url": "/v1/completions",
            "body": {"prompt": "Hello", "n": 2, "max_tokens": 1, "temperature": 1.0, "seed": 1},
        }
    )
    lines.append(
        {
            "custom_id": "new",
            "url": "/v1/responses",
            "body": {"input": "Hi", "max_output_tokens": 1},
        }
    )
    batch_id = site.submit(lines, "demo")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    bodies = [each["response"]["body"] for each in site.results(batch_id)]
    assert batch.progress.completed == 6, orjson.dumps(bodies)
    wanted = [body["choices"][0]["finish_reason"] for body in bodies[:5]]
    wanted.append("length" if bodies[5]["status"] == "incomplete" else "stop")
    counts = batch.progress.finish_reasons
    assert counts.length == wanted.count("length") >= 2
    assert counts.stop == wanted.count("stop")
