"""What a worker tells of its engine: paces between readings, counters over several engines."""

from __future__ import annotations

from typing import Any

from batch_app.engine.base import EngineStats
from batch_app.engine.watch import EngineWatch


class Host:
    silent_s = 2.5
    is_idle = False

    def __init__(self, **figures: Any) -> None:
        self.figures = figures

    def stats(self) -> EngineStats:
        return EngineStats(**self.figures)


class Slot:
    model: str | None = None
    host: Host | None = None


def test_paces_and_counts_go_on_over_a_restart() -> None:
    slot, now = Slot(), [100.0]
    watch = EngineWatch(slot, lambda: now[0])  # type: ignore[arg-type]
    assert watch.read() is None
    slot.model = "sim"
    slot.host = Host(
        generation_tokens_total=1000,
        prefix_cache_queries_total=50,
        preemptions_total=1,
        kv_cache_usage=0.5,
        num_running=4,
    )
    first = watch.read()
    assert first is not None
    assert first.generation_tokens_per_s == 0.0, "of no time nothing can be said"
    assert (first.model, first.kv_cache_usage, first.silent_s) == ("sim", 0.5, 2.5)
    assert watch.counts() == {"prefix_queries": 50, "preemptions": 1}
    assert watch.counts() == {"prefix_queries": 50, "preemptions": 1}, "not yet in the store"
    watch.counted()
    assert watch.counts() == {}

    now[0] += 10
    slot.host.figures |= {"generation_tokens_total": 1500, "prefix_cache_hits_total": 7}
    second = watch.read()
    assert second is not None
    assert second.generation_tokens_per_s == 50.0
    assert watch.counts() == {"prefix_hits": 7}
    watch.counted()

    now[0] += 10
    slot.host = Host(generation_tokens_total=20, prefix_cache_hits_total=3)
    third = watch.read()
    assert third is not None
    assert third.generation_tokens_per_s == 0.0
    assert watch.counts() == {"prefix_hits": 3}, "the new engine counts from nothing"


def test_an_idle_engine_is_empty_whatever_it_said_last() -> None:
    slot = Slot()
    slot.model, slot.host = "sim", Host(num_running=4, num_waiting=9, kv_cache_usage=0.5)
    slot.host.is_idle = True
    reading = EngineWatch(slot).read()  # type: ignore[arg-type]
    assert reading is not None
    assert (reading.num_running, reading.num_waiting, reading.kv_cache_usage) == (0, 0, 0.0)
