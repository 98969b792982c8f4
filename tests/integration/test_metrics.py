"""GET /metrics: what the store knows, in Prometheus's text format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from batch_app import __version__
from batch_app.core import BatchStatus, FinishReasonCounts, Progress, TokenCounts
from batch_app.errors import StoreUnavailable
from batch_app.store import WorkerRow
from integration.api_fixtures import GUIDE_MODEL, Api, input_file

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(api: Api) -> Samples:
    answer = api.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"vllm_batch_{name}", tuple(sorted(labels.items()))]


FIGURES = {
    "num_running": 3,
    "num_waiting": 5,
    "kv_cache_usage": 0.25,
    "prompt_tokens_per_s": 100.0,
    "generation_tokens_per_s": 20.5,
    "silent_s": 1.5,
}


def report(api: Api, name: str, age_s: float, model: str | None, state: str = "idle") -> None:
    now = datetime.now(UTC)
    seen = now - timedelta(seconds=age_s)
    api.store.report_worker(WorkerRow(name, "host", 1, 0.0, now, seen, state, model, None, FIGURES))


def test_an_empty_server(api: Api) -> None:
    samples = scrape(api)
    for status in BatchStatus:
        assert value(samples, "batches", status=status.value) == 0
    assert value(samples, "oldest_waiting_seconds") == 0
    assert value(samples, "upload_bytes_total") == 0
    assert value(samples, "workers_alive", state="idle") == 0
    assert value(samples, "free_bytes") > 0
    assert value(samples, "server_info", version=__version__) == 1
    assert value(samples, "api_process_resident_memory_bytes") > 0


def test_batches_requests_and_tokens(api: Api) -> None:
    first, second = api.submitted(10), api.submitted(5)
    api.submitted(3, model="sim")
    now = datetime.now(UTC)
    batch = api.store.claim_next("worker", 30, now)
    assert batch is not None
    assert batch.id == first
    tokens = TokenCounts(100, 20, 30, 7)
    api.store.renew(batch, lease_s=30, progress=Progress(4, 1, tokens, 3, FinishReasonCounts(1, 2)))

    samples = scrape(api)
    assert value(samples, "batches", status="running") == 1
    assert value(samples, "batches", status="queued") == 2
    assert value(samples, "requests_waiting", model=GUIDE_MODEL) == 5 + 5
    assert value(samples, "requests_waiting", model="sim") == 3
    assert value(samples, "requests_total", model=GUIDE_MODEL, outcome="completed") == 4
    assert value(samples, "requests_total", model=GUIDE_MODEL, outcome="failed") == 1
    assert value(samples, "deduplicated_requests_total", model=GUIDE_MODEL) == 3
    for reason, number in [("stop", 1), ("length", 2), ("tool_calls", 0), ("none", 1)]:
        labels = {"model": GUIDE_MODEL, "finish_reason": reason}
        assert value(samples, "answers_total", **labels) == number
    for kind, number in [("prompt", 100), ("completion", 20), ("cached", 30), ("reasoning", 7)]:
        assert value(samples, "tokens_total", model=GUIDE_MODEL, kind=kind) == number
    assert 0 < value(samples, "oldest_waiting_seconds") < 60
    assert value(samples, "uploads_total") == 3
    sizes = sum(len(input_file(number)) for number in (10, 5, 3))
    assert value(samples, "upload_bytes_total") == sizes

    # Counters only grow: a batch that ends takes nothing away, and waits for nothing.
    batch = api.store.transition(batch, BatchStatus.FINALIZING, now)
    done = Progress(9, 1, TokenCounts(200, 40, 60, 14))
    api.store.transition(batch, BatchStatus.COMPLETED, now, progress=done)
    api.store.cancel_queued(second, now)
    samples = scrape(api)
    assert value(samples, "batches", status="completed") == 1
    assert value(samples, "requests_total", model=GUIDE_MODEL, outcome="completed") == 9
    assert value(samples, "tokens_total", model=GUIDE_MODEL, kind="prompt") == 200
    assert ("vllm_batch_requests_waiting", (("model", GUIDE_MODEL),)) not in samples


def test_workers_and_loads(api: Api) -> None:
    report(api, "worker_a", 0, "sim", "working")
    report(api, "worker_b", 1, "sim")
    report(api, "worker_gone", 3600, "sim")
    for load_s in (1.5, 2.5, None):
        api.store.count_load("sim", load_s)
    api.store.count_load("bad", None)

    samples = scrape(api)
    assert value(samples, "workers_alive", state="working") == 1
    assert value(samples, "workers_alive", state="idle") == 1
    assert value(samples, "model_loaded", model="sim") == 2
    assert 0 <= value(samples, "worker_heartbeat_age_seconds") < 60
    assert value(samples, "model_load_seconds_count", model="sim") == 2
    assert value(samples, "model_load_seconds_sum", model="sim") == 4.0
    assert value(samples, "model_load_failures_total", model="sim") == 1
    assert value(samples, "model_load_failures_total", model="bad") == 1
    assert value(samples, "model_load_seconds_count", model="bad") == 0


def test_engines(api: Api) -> None:
    report(api, "worker_a", 0, "sim", "working")
    report(api, "worker_b", 1, "sim")
    report(api, "worker_gone", 3600, "sim")
    api.store.count_engine("sim", num_lost=2, prefix_queries=100, prefix_hits=60)
    api.store.count_engine("sim", preemptions=4, prefix_hits=1)

    samples = scrape(api)
    assert value(samples, "engine_requests", model="sim", state="running") == 6
    assert value(samples, "engine_requests", model="sim", state="waiting") == 10
    assert value(samples, "engine_tokens_per_second", model="sim", kind="completion") == 41
    assert value(samples, "engine_kv_cache_usage_ratio", model="sim") == 0.25
    assert value(samples, "engine_silent_seconds", model="sim") == 1.5
    assert value(samples, "engine_restarts_total", model="sim") == 2
    assert value(samples, "prefix_cache_queries_total", model="sim") == 100
    assert value(samples, "prefix_cache_hits_total", model="sim") == 61
    assert value(samples, "preemptions_total", model="sim") == 4


def test_webhooks(api: Api) -> None:
    answer = api.call("POST", "/v1/webhooks", json={"url": "https://receiver.invalid/"})
    assert answer.status_code == 200
    batch_id = api.submitted(1)
    api.store.cancel_queued(batch_id, datetime.now(UTC))
    samples = scrape(api)
    assert value(samples, "webhook_deliveries", state="pending") == 1
    assert value(samples, "webhook_deliveries", state="failed") == 0


def test_names_follow_prometheus_s_rules(api: Api) -> None:
    """What promtool's lint looks for."""
    api.submitted(1)
    report(api, "worker_a", 0, "sim")
    api.store.count_load("sim", 1.0)
    families = list(text_string_to_metric_families(api.get("/metrics").text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    labels = {"model", "status", "state", "outcome", "kind", "version", "finish_reason"}
    for family in families:
        assert re.fullmatch(r"vllm_batch_[a-z0-9_]+", family.name), family.name
        assert family.documentation, family.name
        for word in ("milli", "micro", "minutes", "hours", "kilo", "mega", "percent", "celsius"):
            assert word not in family.name
        assert family.name.endswith("_info") == (family.name == "vllm_batch_server_info")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
            assert set(sample.labels) <= labels, "a label whose values may grow without end"
            if family.type != "summary":
                assert not sample.name.endswith(("_count", "_sum", "_bucket"))


DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"


def test_the_dashboard_asks_for_what_there_is(api: Api) -> None:
    api.submitted(1)
    report(api, "worker_a", 0, "sim")
    api.store.count_load("sim", 1.0)
    samples = scrape(api)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"vllm_batch_\w+", target["expr"])
    }
    assert len(asked) >= 15
    assert asked <= {name for name, _ in samples}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_labels_are_escaped(api: Api) -> None:
    odd = 'a"b\\c\nd'
    api.store.count_load(odd, 1.0)
    assert value(scrape(api), "model_load_seconds_count", model=odd) == 1


def test_without_a_database(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise StoreUnavailable("password of the database")

    monkeypatch.setattr(api.store, "totals", refuse)
    answer = api.get("/metrics")
    assert answer.status_code == 503
    assert "password" not in answer.text


def test_counters_survive_a_restart(start_api: Callable[..., Api]) -> None:
    before = start_api()
    before.submitted(4)
    before.store.count_load("sim", 2.0)
    after = scrape(start_api())
    assert value(after, "model_load_seconds_sum", model="sim") == 2.0
    assert value(after, "uploads_total") == 1


def test_every_metric_is_on_the_page(api: Api) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    api.submitted(1)
    report(api, "worker_a", 0, "sim")
    api.store.count_load("sim", 1.0)
    names = {name for name, _ in scrape(api)}
    assert len(names) > 15
    for name in names:
        shown = name.removesuffix("_count").removesuffix("_sum")
        if not name.startswith("vllm_batch_api_process_"):
            assert f"`{shown}`" in page, name
