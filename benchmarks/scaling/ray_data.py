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

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = zip(batch["number"], batch["endpoint"], batch["body"], strict=True)
        asked = [EngineRequest(int(number), endpoint, body) for number, endpoint, body in rows]
        self._engine.submit(asked)
        answers: dict[int, bytes] = {}
        while len(answers) < len(asked):
            answers |= {one.number: one.body for one in self._engine.collect(1.0)}
        bodies = np.array([answers[one.number] for one in asked], dtype=object)
        return {"number": batch["number"], "answer": bodies}


def run(
    num_replicas: int, engine_args: Mapping[str, Any], count: int, batch_size: int
) -> dict[str, Any]:
    """All of `count` requests in such batches.

    The pace is taken from the first block on, so that the actors' start doesn't count. It flatters:
    what the other actors had done by then counts as done after it, the more the larger batches are.
    """
    import ray.data

    rows = [
        {"number": one.number, "endpoint": one.endpoint, "body": one.body}
        for one in requests(count)
    ]
    started_at = time.monotonic()
    answers = ray.data.from_items(rows, override_num_blocks=max(num_replicas, count // batch_size))
    answers = answers.map_batches(
        Holder,
        fn_constructor_args=(dict(engine_args),),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_replicas),
        num_cpus=0.01,
    )
    seen = bytearray(count)
    first_at = None
    num_first = 0
    for block in answers.iter_batches(batch_size=None):
        numbers = block["number"]
        if first_at is None:
            first_at, num_first = time.monotonic(), len(numbers)
        for number in numbers:
            assert not seen[number]
            seen[number] = 1
    assert all(seen)
    ended_at = time.monotonic()
    assert first_at is not None
    # From the first block on, so that the actors' start doesn't count against it.
    took_s = ended_at - first_at
    return {
        "requests": count,
        "batch_size": batch_size,
        "seconds": round(took_s, 2),
        "requests_per_s": round((count - num_first) / took_s, 2),
        "seconds_with_start": round(ended_at - started_at, 2),
    }
