"""The same through Ray Data: `map_batches` with an actor that holds the same engine.

An actor gets a batch of rows and gives a batch back, so it waits for the slowest request of each.
Two batches at a time and actor are what Ray Data sends ahead; `threads` of them run side by side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batch_app.engine.base import EngineRequest, ModelSpec
from batch_app.engine.host import EngineHost
from benchmarks.scaling.requests import requests


class Holder:
    """The actor of `map_batches`."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        spec = ModelSpec(name="sim", engine="sim", source="sim", engine_args=engine_args)
        self._engine = EngineHost(spec, log_path=Path(tempfile.mkdtemp()) / "engine.log")
        self._engine.load()
        self._ready_at = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = zip(batch["number"], batch["endpoint"], batch["body"], strict=True)
        asked = [EngineRequest(int(number), endpoint, body) for number, endpoint, body in rows]
        self._engine.submit(asked)
        answers: dict[int, bytes] = {}
        while len(answers) < len(asked):
            answers |= {one.number: one.body for one in self._engine.collect(1.0)}
        bodies = np.array([answers[one.number] for one in asked], dtype=object)
        ready_at = np.full(len(bodies), self._ready_at)
        return {"number": batch["number"], "answer": bodies, "ready_at": ready_at}


def run(
    num_replicas: int, engine_args: Mapping[str, Any], count: int, batch_size: int
) -> dict[str, Any]:
    """All of `count` requests in such batches.

    `replica_seconds`: from the moment that an actor was ready to the end of all, summed over the
    actors: they begin as they come, one after the other.
    """
    import ray.data

    rows = [
        {"number": one.number, "endpoint": one.endpoint, "body": one.body}
        for one in requests(count)
    ]
    started_at = time.time()
    answers = ray.data.from_items(rows, override_num_blocks=max(num_replicas, count // batch_size))
    answers = answers.map_batches(
        Holder,
        fn_constructor_args=(dict(engine_args),),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_replicas),
        num_cpus=0.01,
    )
    seen = bytearray(count)
    first_s = None
    ready_at: set[float] = set()
    for block in answers.iter_batches(batch_size=None):
        first_s = first_s or time.time() - started_at
        ready_at |= set(block["ready_at"].tolist())
        for number in block["number"]:
            assert not seen[number]
            seen[number] = 1
    ended_at = time.time()
    assert all(seen)
    return {
        "requests": count,
        "batch_size": batch_size,
        "seconds_with_start": round(ended_at - started_at, 2),
        "first_block_s": round(first_s or 0.0, 2),
        "replicas": len(ready_at),
        "replica_seconds": round(sum(ended_at - moment for moment in ready_at), 1),
        "first_block_after_first_ready_s": round(started_at + (first_s or 0.0) - min(ready_at), 2),
    }
