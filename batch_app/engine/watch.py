"""What the engine is doing, as its worker tells the others: read from a thread beside the one that
works with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from batch_app.engine.base import EngineStats
from batch_app.engine.host import EngineHost
from batch_app.engine.slot import EngineSlot


@dataclass(frozen=True, slots=True)
class EngineReading:
    """An engine at one moment. `silent_s`: since when no token came, with requests in flight.

    `prompt_tokens_per_s` and its sister: between this reading and the one before it.
    """

    model: str
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    silent_s: float

    def figures(self) -> dict[str, float]:
        figures = asdict(self)
        del figures["model"]
        return figures


class EngineWatch:
    """One thread. `counts` are what the engine's counters grew by since `counted`."""

    def __init__(self, slot: EngineSlot, seconds: Callable[[], float] = time.monotonic) -> None:
        self._slot = slot
        self._seconds = seconds
        self._host: EngineHost | None = None
        self._stats = EngineStats()
        self._counted = EngineStats()
        self._at = 0.0

    def read(self) -> EngineReading | None:
        """None while nothing is loaded."""
        host, model, now = self._slot.host, self._slot.model, self._seconds()
        if host is None or model is None:
            self._host = None
            return None
        if host is not self._host:  # another engine, whose counters begin at nothing
            self._host, self._at = host, now
            self._stats = self._counted = EngineStats()
        before, self._stats = self._stats, host.stats()
        passed_s, self._at = now - self._at, now

        def pace(total: int, total_before: int) -> float:
            return max(total - total_before, 0) / passed_s if passed_s > 0 else 0.0

        stats, idle = self._stats, host.is_idle
        return EngineReading(
            model=model,
            num_running=0 if idle else stats.num_running,
            num_waiting=0 if idle else stats.num_waiting,
            kv_cache_usage=0.0 if idle else stats.kv_cache_usage,
            prompt_tokens_per_s=pace(stats.prompt_tokens_total, before.prompt_tokens_total),
            generation_tokens_per_s=pace(
                stats.generation_tokens_total, before.generation_tokens_total
            ),
            silent_s=host.silent_s,
        )

    def counts(self) -> dict[str, float]:
        """By the names of the store's `ModelLoads`; empty where nothing grew."""
        now, before = self._stats, self._counted
        grown = {
            "prefix_queries": now.prefix_cache_queries_total - before.prefix_cache_queries_total,
            "prefix_hits": now.prefix_cache_hits_total - before.prefix_cache_hits_total,
            "preemptions": now.preemptions_total - before.preemptions_total,
        }
        return {name: more for name, more in grown.items() if more > 0}

    def counted(self) -> None:
        """Those are in the store."""
        self._counted = self._stats
