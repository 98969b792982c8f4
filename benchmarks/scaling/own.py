"""Through our own engine, fed as a worker feeds it: a bounded window, refilled as answers come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from batch_app.config import Settings
from batch_app.engine.base import Engine, EngineInfo, ModelSpec
from batch_app.engine.ray import RayEngine
from benchmarks.scaling.requests import requests

_MIB = 1 << 20


@contextmanager
def loaded(
    num_replicas: int, engine_args: Mapping[str, Any]
) -> Iterator[tuple[Engine, EngineInfo]]:
    """Our engine with so many replicas, each with these arguments, on Ray's running cluster."""
    table = {
        "engine": "sim",
        "num_cpus": 0.01,
        "min_replicas": num_replicas,
        "max_replicas": num_replicas,
    }
    args = {**engine_args, "ray": table}
    engine = RayEngine(ModelSpec(name="sim", engine="ray", source="sim", engine_args=args))
    info = engine.load()
    try:
        yield engine, info
    finally:
        engine.close()


def run(engine: Engine, info: EngineInfo, count: int) -> dict[str, Any]:
    """All of `count` requests. Returns the seconds they took, and the driver's memory on the way.

    Raises AssertionError where a request has no answer, or two.
    """
    size = int(info.max_num_seqs * Settings().window_factor)
    upcoming = requests(count)
    answered = bytearray(count)
    memory = {}
    this = psutil.Process()
    in_flight = num_done = 0
    first_s: float | None = None
    started = time.monotonic()
    while num_done < count:
        refill = list(itertools.islice(upcoming, size - in_flight))
        in_flight += len(refill)
        engine.submit(refill)
        outcomes = engine.collect(0.1)
        if outcomes and first_s is None:
            first_s = time.monotonic() - started
        for outcome in outcomes:
            assert outcome.status_code == 200
            assert not answered[outcome.number]
            answered[outcome.number] = 1
        in_flight -= len(outcomes)
        before, num_done = num_done, num_done + len(outcomes)
        tenth = num_done * 10 // count
        if tenth != before * 10 // count:
            memory[f"{tenth * 10}%"] = round(this.memory_info().rss / _MIB, 1)
    took_s = time.monotonic() - started
    return {
        "requests": count,
        "seconds": round(took_s, 2),
        "requests_per_s": round(count / took_s, 2),
        "first_answer_s": round(first_s or 0.0, 2),
        "driver_rss_mib": memory,
    }
