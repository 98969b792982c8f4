"""A lease is kept while its holder does what takes long, before the batch runs and after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from batch_app import closing, lease, runner
from batch_app.core import BatchStatus, utc_now
from batch_app.errors import LeaseLost
from batch_app.housekeeping import Housekeeping
from batch_app.lease import HeldLease
from batch_app.registry import ModelRegistry
from batch_app.results import ResultsLog
from batch_app.worker import Worker
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import wait_for


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, commit_interval_s=0.02, heartbeat_s=0.02)
    yield site
    site.close()


@pytest.fixture
def slow_logs(site: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str], None]:
    """Has a module need so long to read a batch's log that the lease must be renewed twice."""

    def slow_down(module: ModuleType, batch_id: str) -> None:
        def read(*arguments: Any) -> ResultsLog:
            before = site.batch(batch_id).heartbeats
            wait_for(
                lambda: site.batch(batch_id).heartbeats > before + 1, what="the lease is renewed"
            )
            return ResultsLog(*arguments)

        monkeypatch.setattr(module, "ResultsLog", read)

    return slow_down


def test_while_a_worker_reads_a_long_log(
    site: Site, slow_logs: Callable[[ModuleType, str], None]
) -> None:
    batch_id = site.submit([echo_line(number) for number in range(5)], "sim")
    slow_logs(runner, batch_id)
    worker = Worker(site.settings, stop=threading.Event())
    try:
        batch = worker._claim()
        assert batch
        worker._work_on(batch)
    finally:
        worker._slot.unload()
        worker._store.close()
    ended = site.batch(batch_id)
    assert (ended.status, ended.epoch) == (BatchStatus.COMPLETED, 1)
    assert_answers_echo(site.results(batch_id), 5)


def test_while_a_server_closes_a_batch(
    site: Site, slow_logs: Callable[[ModuleType, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = site.submit([echo_line(number) for number in range(5)], "sim")
    site.set_row("batches", batch_id, expires_at=site.batch(batch_id).created_at)
    slow_logs(closing, batch_id)
    monkeypatch.setattr(lease, "RENEWALS", 15_000)
    registry = ModelRegistry.load(site.settings.models)
    assert Housekeeping(site.settings, site.data, site.store, lambda: registry, "server").run_once()
    assert site.batch(batch_id).status is BatchStatus.EXPIRED


def test_who_has_lost_it_is_told(site: Site) -> None:
    site.submit([echo_line(0)], "sim")
    batch = site.store.claim_next("one", 30.0, utc_now())
    assert batch
    with HeldLease(site.store, batch, lease_s=30.0, every_s=0.01) as lease:
        lease.check()
        site.store.release_dead("one")
        other = site.store.claim_next("two", 30.0, utc_now())
        assert other

        def is_told() -> bool:
            with suppress(LeaseLost):
                lease.check()
                return False
            return True

        wait_for(is_told)
    assert site.store.renew(other, lease_s=30.0) is BatchStatus.RUNNING
