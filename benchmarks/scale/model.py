"""A fluid model of a site with many replicas, and a day of batches on it. Pure.

A component's load is the share of it that is used; at 1 it is the limit. What is measured comes
from `reports/measured.json` and the reports of `benchmarks/`; all else is an assumption, a flag.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MEASURED = Path(__file__).parent / "reports" / "measured.json"
MILLION = Path(__file__).parents[1] / "reports" / "million.json"
GUIDE = Path(__file__).parents[1] / "metadata" / "vllm-native-gemma3-4b-5000-2025-10-28.json"
DAY_S = 86_400.0


@dataclass(frozen=True)
class Costs:
    """Measured. `database_s`: PostgreSQL's processor seconds for a call, by size of the fleet."""

    database_s: Mapping[str, Mapping[int, float]]
    connection_mb: float
    upload_bytes_per_s: float
    results_per_s: float
    requests_per_s_per_replica: float
    prompt_tokens: float
    completion_tokens: float

    def of(self, call: str, num_workers: float) -> float:
        """Between the sizes measured on a line, beyond the largest on the last line's."""
        sizes = sorted(self.database_s[call])
        seconds = [self.database_s[call][size] for size in sizes]
        if num_workers <= sizes[-1]:
            return float(np.interp(num_workers, sizes, seconds))
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        return seconds[-1] + slope * (num_workers - sizes[-1])


def load_costs() -> Costs:
    """From the committed reports. Of calls measured with several numbers of connections, four."""
    measured: dict[str, Any] = json.loads(MEASURED.read_text())
    seconds: dict[str, dict[int, float]] = {}
    for rate in measured["rates"]:
        if rate["num_connections"] == 4 and rate["database_s"] > 0:
            seconds.setdefault(rate["call"], {})[rate["num_workers"]] = rate["database_s"]
    million = json.loads(MILLION.read_text())["figures"]
    guide = json.loads(GUIDE.read_text())["results"]
    return Costs(
        database_s=seconds,
        connection_mb=measured["connection_mb"],
        upload_bytes_per_s=million["upload_bytes"] / million["upload_s"],
        results_per_s=million["durable_results_per_s"],
        requests_per_s_per_replica=guide["throughput_requests_per_s"],
        prompt_tokens=guide["mean_prompt_tokens"],
        completion_tokens=guide["mean_completion_tokens"],
    )


@dataclass(frozen=True)
class Site:
    """Assumptions, each a flag. Bytes a token: of English text in JSON, with what is around it."""

    replicas_per_worker: int = 1
    database_cores: float = 2.0
    api_cores: float = 2.0
    data_bytes_per_s: float = 1e9
    max_connections: int = 1000
    connections_per_worker: int = 4
    watched_servers: int = 1
    requests_per_batch: int = 50_000
    bytes_per_token: float = 4.0
    bytes_around: float = 400.0
    tell_every_s: float = 0.25  # `commit_interval_s`: progress is told as often as results come
    heartbeat_s: float = 5.0
    slower_database: float = 1.0
    costs: Costs = field(default_factory=load_costs)

    @property
    def input_bytes(self) -> float:
        return self.bytes_around + self.bytes_per_token * self.costs.prompt_tokens

    @property
    def output_bytes(self) -> float:
        return self.bytes_around + self.bytes_per_token * self.costs.completion_tokens

    def loads(self, replicas: float) -> dict[str, float]:
        """Of each component, if all of the replicas were kept busy."""
        rate = replicas * self.costs.requests_per_s_per_replica
        workers = max(1.0, replicas / self.replicas_per_worker)
        moved = 2 * self.input_bytes + 4 * self.output_bytes
        return {
            "PostgreSQL, processor": self._database_s(workers, rate) / self.database_cores,
            "PostgreSQL, connections": workers * self.connections_per_worker / self.max_connections,
            "API servers, uploads": (
                rate * self.input_bytes / (self.costs.upload_bytes_per_s * self.api_cores)
            ),
            "data folder, bytes": rate * moved / self.data_bytes_per_s,
            "a worker's results": rate / workers / self.costs.results_per_s,
        }

    def limits(self) -> dict[str, float]:
        """Of each component: the replicas at which it is used up; infinite if a million don't."""
        found = {}
        for name in self.loads(1):
            low, high = 0.0, 1e6
            if self.loads(high)[name] < 1:
                found[name] = math.inf
                continue
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if self.loads(middle)[name] < 1 else (low, middle)
            found[name] = low
        return found

    def usable(self, replicas: float) -> float:
        """How many of these replicas the rest of the site can keep busy."""
        return min(replicas, *self.limits().values())

    def throughput(self, replicas: float) -> float:
        """Requests a second."""
        return self.usable(replicas) * self.costs.requests_per_s_per_replica

    def _database_s(self, workers: float, rate: float) -> float:
        """Processor seconds of PostgreSQL a second."""
        costs = self.costs
        of_a_worker = rate / workers
        # At most one telling each `tell_every_s`, and only if a result came in it.
        tells = max(
            (1 - math.exp(-of_a_worker * self.tell_every_s)) / self.tell_every_s,
            1 / self.heartbeat_s,
        )
        batches = rate / self.requests_per_batch
        followed = min(workers, max(costs.database_s["feed"]))  # it follows no more batches
        total = workers * tells * costs.of("heartbeat", workers)
        total += workers / self.heartbeat_s * costs.of("report", workers)
        total += batches * sum(costs.of(call, workers) for call in ("create", "claim", "end"))
        total += self.watched_servers * costs.of("feed", followed)
        return self.slower_database * total


@dataclass(frozen=True)
class Day:
    """Requests. `wait_p95_s`: from the end of the upload until a worker begins."""

    arrived: int
    finished: int
    running: int
    waiting: int
    wait_p50_s: float
    wait_p95_s: float


def day(site: Site, replicas: int, load: float, seed: int = 1) -> Day:
    """A day on which `load` of what the site could do arrives, in batches of random sizes, first
    in, first out; each worker runs one at a time."""
    rng = np.random.default_rng(seed)
    workers = max(1, int(site.usable(replicas) // site.replicas_per_worker))
    of_a_worker = site.throughput(replicas) / workers
    mean = site.requests_per_batch
    num = rng.poisson(load * workers * of_a_worker * DAY_S / mean)
    arrivals = np.sort(rng.uniform(0, DAY_S, num))
    sizes = np.maximum(1, mean * rng.lognormal(-0.5, 1.0, num)).astype(np.int64)
    free = [0.0] * workers
    finished = running = waiting = 0
    waits = []
    for arrival, size in zip(arrivals, sizes, strict=True):
        begun = max(arrival, heapq.heappop(free))
        ended = begun + size / of_a_worker
        heapq.heappush(free, ended)
        waits.append(begun - arrival)
        if ended <= DAY_S:
            finished += int(size)
        elif begun <= DAY_S:
            running += int(size)
        else:
            waiting += int(size)
    p50, p95 = np.quantile(waits, (0.5, 0.95)) if waits else (0.0, 0.0)
    return Day(
        int(sizes.sum()), finished, running, waiting, round(float(p50), 1), round(float(p95), 1)
    )
