"""Metrics for Prometheus: what the store knows of all batches, models and workers.

Everything but the API server's own process is read from the store at each scrape. So a counter
survives restarts, is the same whichever API server is asked, and no other process opens a port.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from batch_app import __version__
from batch_app.core import FinishReason
from batch_app.store import MISSED_HEARTBEATS, ModelLoads, Totals, WorkerRow
from batch_app.webhooks import DeliveryState

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "vllm_batch_"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one scrape shows. `heartbeat_s`: seconds between a worker's signs of life."""

    totals: Totals
    workers: Sequence[WorkerRow]
    free_bytes: int
    heartbeat_s: float
    now: datetime
    deliveries: Mapping[DeliveryState, int] = field(default_factory=dict)

    def is_alive(self, worker: WorkerRow) -> bool:
        return worker.is_alive(self.now, self.heartbeat_s)


def exposition(reading: Reading) -> bytes:
    """The reading in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(reading))
    ProcessCollector(namespace=PREFIX.rstrip("_") + "_api", registry=registry)
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            f"{PREFIX}server", "This API server.", value={"version": __version__}
        )
        yield from self._queue()
        yield from self._work()
        yield from self._workers()
        yield from self._engines()
        yield from self._webhooks()
        totals = self._reading.totals
        yield _counter("uploads", "Input files accepted.", {(): totals.num_uploads})
        yield _counter("upload_bytes", "Bytes of input files accepted.", {(): totals.upload_bytes})
        free = GaugeMetricFamily(
            f"{PREFIX}free_bytes", "Room on the data folder's disk.", self._reading.free_bytes
        )
        yield free

    def _queue(self) -> Iterator[Metric]:
        totals = self._reading.totals
        states = GaugeMetricFamily(f"{PREFIX}batches", "Batches by state.", labels=["status"])
        for status, number in totals.num_batches.items():
            states.add_metric([status.value], number)
        yield states
        requests = GaugeMetricFamily(
            f"{PREFIX}requests_waiting",
            "Requests of unfinished batches without a result.",
            labels=["model"],
        )
        for model, number in totals.waiting.items():
            requests.add_metric([model], number)
        yield requests
        since = totals.oldest_waiting_since
        yield GaugeMetricFamily(
            f"{PREFIX}oldest_waiting_seconds",
            "Age of the queued batch that came first; 0 with an empty queue.",
            (self._reading.now - since).total_seconds() if since else 0.0,
        )

    def _work(self) -> Iterator[Metric]:
        totals = self._reading.totals
        requests: dict[tuple[str, ...], float] = {}
        deduplicated: dict[tuple[str, ...], float] = {}
        answers: dict[tuple[str, ...], float] = {}
        tokens: dict[tuple[str, ...], float] = {}
        for model, progress in totals.progress.items():
            requests[model, "completed"] = progress.completed
            requests[model, "failed"] = progress.failed
            deduplicated[model,] = progress.deduplicated
            reasons = progress.finish_reasons
            for reason in FinishReason:
                answers[model, reason.value] = getattr(reasons, reason.value)
            answers[model, "none"] = max(progress.completed - reasons.total, 0)
            counts = progress.tokens
            tokens[model, "prompt"] = counts.prompt_tokens
            tokens[model, "completion"] = counts.completion_tokens
            tokens[model, "cached"] = counts.cached_tokens
            tokens[model, "reasoning"] = counts.reasoning_tokens
        yield _counter(
            "requests", "Requests with a result on disk.", requests, ["model", "outcome"]
        )
        yield _counter(
            "deduplicated_requests",
            "Of these, requests that got the answer of an equal one.",
            deduplicated,
            ["model"],
        )
        yield _counter(
            "answers",
            "Of these, completed requests by finish reason. `length`: cut off at `max_tokens`.",
            answers,
            ["model", "finish_reason"],
        )
        yield _counter(
            "tokens",
            "Tokens of these results. `cached` are among `prompt`, `reasoning` among `completion`.",
            tokens,
            ["model", "kind"],
        )
        loads = SummaryMetricFamily(
            f"{PREFIX}model_load_seconds",
            "Model loads, from the start of the engine's process to its first possible request.",
            labels=["model"],
        )
        failed: dict[tuple[str, ...], float] = {}
        for model, counted in totals.loads.items():
            loads.add_metric([model], counted.num_loads, counted.load_s)
            failed[model,] = counted.num_failed
        yield loads
        for name, text, of in _ENGINE_COUNTERS:
            values: dict[tuple[str, ...], float] = {
                (model,): of(counted) for model, counted in totals.loads.items()
            }
            yield _counter(name, text, values, ["model"])
        yield _counter("model_load_failures", "Model loads that failed.", failed, ["model"])

    def _workers(self) -> Iterator[Metric]:
        reading = self._reading
        alive = GaugeMetricFamily(
            f"{PREFIX}workers_alive",
            f"Workers seen within {MISSED_HEARTBEATS} heartbeats, by what they do.",
            labels=["state"],
        )
        numbers = {"idle": 0, "working": 0}
        loaded: dict[str, int] = {}
        # Not by worker: each has a new id, and a label's values must not grow without end.
        beats = GaugeMetricFamily(
            f"{PREFIX}worker_heartbeat_age_seconds",
            "Time since the last sign of life of any worker; missing where there is none.",
        )
        if reading.workers:
            last = max(worker.heartbeat_at for worker in reading.workers)
            beats.add_metric([], max((reading.now - last).total_seconds(), 0.0))
        for worker in reading.workers:
            if reading.is_alive(worker):
                numbers[worker.state] = numbers.get(worker.state, 0) + 1
                if worker.model:
                    loaded[worker.model] = loaded.get(worker.model, 0) + 1
        for state, number in numbers.items():
            alive.add_metric([state], number)
        models = GaugeMetricFamily(
            f"{PREFIX}model_loaded", "Living workers with this model loaded.", labels=["model"]
        )
        for model, number in loaded.items():
            models.add_metric([model], number)
        yield from (alive, beats, models)

    def _engines(self) -> Iterator[Metric]:
        figures: dict[str, list[Mapping[str, float]]] = defaultdict(list)
        for worker in self._reading.workers:
            if worker.model and worker.engine and self._reading.is_alive(worker):
                figures[worker.model].append(worker.engine)
        requests = GaugeMetricFamily(
            f"{PREFIX}engine_requests", "Requests in the engine.", labels=["model", "state"]
        )
        pace = GaugeMetricFamily(
            f"{PREFIX}engine_tokens_per_second",
            "Tokens that the engine computes, over the last heartbeat.",
            labels=["model", "kind"],
        )
        usage = GaugeMetricFamily(
            f"{PREFIX}engine_kv_cache_usage_ratio", "KV cache in use, 0 to 1.", labels=["model"]
        )
        silent = GaugeMetricFamily(
            f"{PREFIX}engine_silent_seconds",
            "Time without any token although requests are in flight; 0 with none.",
            labels=["model"],
        )
        for model, engines in figures.items():

            def total(name: str, engines: Sequence[Mapping[str, float]] = engines) -> float:
                return sum(engine.get(name, 0.0) for engine in engines)

            requests.add_metric([model, "running"], total("num_running"))
            requests.add_metric([model, "waiting"], total("num_waiting"))
            pace.add_metric([model, "prompt"], total("prompt_tokens_per_s"))
            pace.add_metric([model, "completion"], total("generation_tokens_per_s"))
            usage.add_metric([model], max(engine.get("kv_cache_usage", 0.0) for engine in engines))
            silent.add_metric([model], max(engine.get("silent_s", 0.0) for engine in engines))
        yield from (requests, pace, usage, silent)

    def _webhooks(self) -> Iterator[Metric]:
        deliveries = GaugeMetricFamily(
            f"{PREFIX}webhook_deliveries",
            "Deliveries to webhooks by state, settled ones until they are forgotten.",
            labels=["state"],
        )
        for state in DeliveryState:
            deliveries.add_metric([state.value], self._reading.deliveries.get(state, 0))
        yield deliveries


#: Name, help, and what of a model's counts.
_ENGINE_COUNTERS: tuple[tuple[str, str, Callable[[ModelLoads], float]], ...] = (
    (
        "engine_restarts",
        "Engines that died or hung at work and were started again.",
        lambda counted: counted.num_lost,
    ),
    (
        "prefix_cache_queries",
        "Tokens of prompts that were looked up in the prefix cache.",
        lambda counted: counted.prefix_queries,
    ),
    (
        "prefix_cache_hits",
        "Of these, tokens that were there and not computed again.",
        lambda counted: counted.prefix_hits,
    ),
    (
        "preemptions",
        "Requests that the engine put back for want of room in its KV cache.",
        lambda counted: counted.preemptions,
    ),
)


def _counter(
    name: str, text: str, values: dict[tuple[str, ...], float], labels: Sequence[str] = ()
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for values_of_labels, value in values.items():
        family.add_metric(values_of_labels, value)
    return family
