"""What /health and /metrics say of a real worker: its engine works, or hangs, or it is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.site import ENDLESS, Site, echo_line
from support.waiting import wait_for


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(
        tmp_path,
        heartbeat_s=1.0,
        engine_hang_s=16.0,
        engine_backoff_s=0.0,
        max_engine_restarts=100,
        poll_interval_s=0.2,
        min_free_bytes=0,
    )
    yield site
    site.close()


def checks(url: str) -> dict[str, str]:
    found: dict[str, str] = httpx.get(f"{url}/health", timeout=120).json()["checks"]
    return found


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=120).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"vllm_batch_{name}"
    )


@pytest.mark.long
def test_a_hung_engine_and_a_worker_that_is_gone(site: Site) -> None:
    url = site.start_server()
    worker = site.start_worker()
    wait_for(lambda: metric(url, "workers_alive") == 1, what="the worker reports")
    assert checks(url)["worker"] == "ok"
    site.submit([echo_line(number) for number in range(60)], "hanging")
    hung = wait_for(
        lambda: checks(url)["engine"] if checks(url)["engine"] != "ok" else "",
        every_s=0.1,
        what="the engine is called hung",
    )
    assert "no token for" in hung
    worker.kill()
    worker.wait(timeout=120)
    wait_for(lambda: checks(url)["worker"].startswith("gone"), what="the worker is missed")
    assert httpx.get(f"{url}/health", timeout=120).status_code == 503
    assert httpx.get(f"{url}/livez", timeout=120).status_code == 200


def test_an_engine_at_work_is_read(site: Site) -> None:
    url = site.start_server()
    site.start_worker()
    site.submit([echo_line(number) for number in range(ENDLESS)], "endless")
    wait_for(lambda: metric(url, "engine_requests") > 0, what="requests in the engine")
    wait_for(lambda: metric(url, "engine_tokens_per_second") > 0, what="a pace")
    assert metric(url, "model_loaded") == 1
    assert set(checks(url).values()) == {"ok"}


def test_engines_that_die_are_counted(site: Site) -> None:
    url = site.start_server()
    site.start_worker()
    site.wait_until_done(site.submit([echo_line(number) for number in range(500)], "mortal"))
    assert metric(url, "engine_restarts_total") >= 1
