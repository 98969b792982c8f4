"""Metrics for Prometheus: what the store knows of all batches, models and workers.

Everything but the API server's own process is read from the store at each scrape. So a counter
survives restarts, is the same whichever API server is asked, and no other process opens a port.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

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
from batch_app.store import Totals, WorkerRow

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "vllm_batch_"
#: A worker that has missed so many signs of life is not counted as alive.
MISSED_HEARTBEATS = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """What one scrape shows. `heartbeat_s`: seconds between a worker's signs of life."""

    totals: Totals
    workers: Sequence[WorkerRow]
    free_bytes: int
    heartbeat_s: float
    now: datetime


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
        tokens: dict[tuple[str, ...], float] = {}
        for model, progress in totals.progress.items():
            requests[model, "completed"] = progress.completed
            requests[model, "failed"] = progress.failed
            deduplicated[model,] = progress.deduplicated
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
        yield _counter("model_load_failures", "Model loads that failed.", failed, ["model"])

    def _workers(self) -> Iterator[Metric]:
        reading = self._reading
        silent = timedelta(seconds=MISSED_HEARTBEATS * reading.heartbeat_s)
        alive = GaugeMetricFamily(
            f"{PREFIX}workers_alive",
            f"Workers seen within {MISSED_HEARTBEATS} heartbeats, by what they do.",
            labels=["state"],
        )
        numbers = {"idle": 0, "working": 0}
        loaded: dict[str, int] = {}
        beats = GaugeMetricFamily(
            f"{PREFIX}worker_heartbeat_age_seconds",
            "Time since each worker's last sign of life.",
            labels=["worker"],
        )
        for worker in reading.workers:
            age = reading.now - worker.heartbeat_at
            beats.add_metric([worker.id], max(age.total_seconds(), 0.0))
            if age <= silent:
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


def _counter(
    name: str, text: str, values: dict[tuple[str, ...], float], labels: Sequence[str] = ()
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for values_of_labels, value in values.items():
        family.add_metric(values_of_labels, value)
    return family
