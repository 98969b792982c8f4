"""Real servers for the acceptance tests: one with a worker, one whose queue stands still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import browser
from support.receiver import Receiver, receiving
from support.sdk import Sdk
from support.shell import Shell
from support.site import Site


@dataclass(frozen=True)
class Running:
    """A site with an API server process, and its address."""

    site: Site
    url: str


def _running(
    tmp: pytest.TempPathFactory, name: str, workers: int, lease_s: float
) -> Iterator[Running]:
    site = Site(
        tmp.mktemp(name),
        lease_s=lease_s,
        heartbeat_s=0.3,
        poll_interval_s=0.2,
        commit_interval_s=0.05,
        min_free_bytes=0,
        webhook_allowed_hosts="127.0.0.1",
        webhook_backoff_s=0.1,
    )
    try:
        url = site.start_server()
        for _ in range(workers):
            site.start_worker()
        yield Running(site, url)
    finally:
        site.close()


@pytest.fixture(scope="session")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An API server and a worker with the simulated engine."""
    yield from _running(tmp_path_factory, "working", workers=1, lease_s=60.0)


@pytest.fixture(scope="session")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An API server without a worker: what is queued stays queued."""
    yield from _running(tmp_path_factory, "waiting", workers=0, lease_s=5.0)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One headless browser for a module's tests. Not for longer: while it is open, its driver has
    an event loop running in this thread, and no other test could run one."""
    with browser.started() as running:
        yield running


@pytest.fixture
def sdk(working: Running) -> Iterator[Sdk]:
    """A client of the server with a worker."""
    client = Sdk(working.url)
    yield client
    client.close()


@pytest.fixture
def idle_sdk(waiting: Running) -> Iterator[Sdk]:
    """A client of the server without a worker."""
    client = Sdk(waiting.url)
    yield client
    client.close()


@pytest.fixture
def shell(working: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A person who has named the server with a worker."""
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, working.url)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver of webhooks on this machine, which the servers may reach."""
    with receiving() as receiver:
        yield receiver
