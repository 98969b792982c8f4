"""A batch that runs on a server: it waits while that is away, others go on, and no key is seen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from starlette.requests import Request
from starlette.responses import Response

from batch_app.core import Batch, BatchStatus, PauseKind
from support.model_server import ModelServerStub, error
from support.network import network_of
from support.site import Site, assert_answers_echo, echo_line, engine_pid
from support.waiting import wait_for

KEY = "sk-4711-zanzibar"


@pytest.fixture
def server() -> Iterator[ModelServerStub]:
    server = ModelServerStub(api_key=KEY)
    yield server
    server.stop()


@pytest.fixture
def site(tmp_path: Path, server: ModelServerStub) -> Iterator[Site]:
    site = Site(
        tmp_path,
        lease_s=60.0,
        heartbeat_s=0.3,
        drain_s=5.0,
        poll_interval_s=0.5,
        pause_longest_s=4.0,
    )
    entries = ""
    for name, key in {"remote": "STUB_API_KEY", "keyless": "NO_SUCH_KEY"}.items():
        entries += f"""
[[model]]
name = "{name}"
engine = "openai"
source = "served-name"
[model.engine_args]
base_url = "{server.base_url}"
api_key_env = "{key}"
max_retries = 1
backoff_s = 0.02
"""
    with site.settings.models.open("a") as registry:
        registry.write(entries)
    yield site
    site.close()


def paused(site: Site, batch_id: str) -> Batch | None:
    batch = site.batch(batch_id)
    return batch if batch.paused else None


def test_a_batch_waits_for_its_server_and_nobody_else_does(
    site: Site, server: ModelServerStub
) -> None:
    waits = site.submit((echo_line(n) for n in range(60)), "remote")
    fails = site.submit((echo_line(n) for n in range(3)), "keyless")
    other = site.submit((echo_line(n) for n in range(20)), "sim")
    worker = site.start_worker(STUB_API_KEY=KEY)
    assert site.wait_until_done(other).status is BatchStatus.COMPLETED
    rejected = site.batch(fails).paused
    assert rejected is not None
    assert (rejected.kind, rejected.retry_at) == (PauseKind.REGISTRY, None)
    assert "no API key in the variable NO_SUCH_KEY" in rejected.reason
    batch = wait_for(lambda: paused(site, waits), what="it says why it waits")
    assert batch.status is BatchStatus.QUEUED
    assert "no connection to the server" in (batch.pause_reason or "")
    assert batch.progress.done == 0

    server.start()
    done = site.wait_until_done(waits)
    assert done.status is BatchStatus.COMPLETED
    assert (done.progress.completed, done.progress.failed) == (60, 0)
    assert done.progress.tokens.cached_tokens == 60
    assert_answers_echo(site.results(waits), 60)
    assert done.pause_reason is None
    assert "remote server (openai stub 1.2.3)" in site.log(waits)

    engine = engine_pid(worker.pid)
    assert network_of(engine) == network_of(os.getpid())  # there is a server to be reached
    assert KEY.encode() not in Path(f"/proc/{engine}/environ").read_bytes()
    assert KEY.encode() not in Path(f"/proc/{engine}/cmdline").read_bytes()
    for path in site.settings.data_dir.parent.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert "say number" not in site.data.engine_log.read_text()
    assert "127.0.0.1" not in orjson.dumps(done.provenance).decode()
    assert "127.0.0.1" not in site.log(waits)


def test_a_server_that_breaks_under_way_costs_no_request(
    site: Site, server: ModelServerStub
) -> None:
    works_for = [100]  # requests, then no more

    async def fault(_: Request) -> Response | None:
        return error(500) if len(server.bodies) > works_for[0] else None

    server.fault = fault
    server.start()
    batch_id = site.submit((echo_line(n) for n in range(300)), "remote")
    site.start_worker(STUB_API_KEY=KEY)
    batch = wait_for(lambda: paused(site, batch_id), timeout_s=60, what="it pauses")
    assert "answers 500, also to the shortest request" in (batch.pause_reason or "")
    assert batch.progress.failed == 0
    works_for[0] = 1_000_000
    done = site.wait_until_done(batch_id)
    assert (done.progress.completed, done.progress.failed) == (300, 0)
    assert_answers_echo(site.results(batch_id), 300)
