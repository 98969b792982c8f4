"""Estimates: how long a batch will take, going by the benchmarks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime, timedelta

from batch_app.benchmarks import BenchmarkFolder, BenchmarkRecord
from batch_app.forecast.forecast import Forecaster
from batch_app.forecast.measurement import Limits, Setting
from batch_app.forecast.roofline import Device, ModelSize


@dataclass(frozen=True, slots=True)
class Estimate:
    """A prediction, and the benchmarks it rests on.

    `duration_s` is the batch's own time, model loading included, what is left of it once it runs;
    four of five batches take between `low_s` and `high_s`. `queue_wait_s`: until its turn comes;
    `completion_at` counts both. `basis`: the benchmarks, the weightiest first; `basis_kind`: see
    `Forecast`. `prompt_basis`: see `PromptCounts.basis`.
    """

    duration_s: float
    completion_at: datetime
    throughput_tokens_per_s: float
    throughput_requests_per_s: float
    based_on_benchmark: str | None
    low_s: float | None = None
    high_s: float | None = None
    prompt_tokens: int | None = None
    expected_output_tokens: int | None = None
    queue_wait_s: float = 0.0
    basis: tuple[str, ...] = ()
    basis_kind: str = "measured"
    prompt_basis: str = ""


def run_time_s(num_requests: int, record: BenchmarkRecord, *, loads_model: bool = True) -> float:
    """Seconds for this many requests: load time + requests / throughput."""
    results = record.results
    load_s = results.model_load_time_s if loads_model else 0.0
    return load_s + num_requests / results.throughput_requests_per_s


def estimate(
    num_requests: int,
    record: BenchmarkRecord | None,
    now: datetime,
    *,
    ahead_s: float = 0.0,
    loads_model: bool = True,
) -> Estimate | None:
    """When these requests will be done; None without a benchmark to go by.

    Args:
        record: a record with a throughput above 0, as `BenchmarkFolder.latest` gives it.
        ahead_s: seconds of work that the queue holds before this batch.
        loads_model: False where the model is loaded already.
    """
    if record is None or record.results.throughput_requests_per_s <= 0:
        return None
    duration_s = run_time_s(num_requests, record, loads_model=loads_model)
    try:
        completion_at = now + timedelta(seconds=ahead_s + duration_s)
    except OverflowError:  # a benchmark so slow that the calendar ends
        return None
    return Estimate(
        duration_s=duration_s,
        completion_at=completion_at,
        throughput_tokens_per_s=record.results.throughput_tokens_per_s,
        throughput_requests_per_s=record.results.throughput_requests_per_s,
        based_on_benchmark=record.test_id,
    )


class Forecasters:
    """The forecasters of a folder of benchmarks, each fitted once per state of the folder.

    Safe to use from several threads.
    """

    #: Of so many different settings the fits are kept.
    MOST_KEPT = 64

    def __init__(self, benchmarks: BenchmarkFolder) -> None:
        self._benchmarks = benchmarks
        self._lock = threading.Lock()
        self._kept: dict[tuple[object, ...], Forecaster] = {}

    def of(
        self,
        setting: Setting,
        *,
        limits: Limits | None = None,
        size: ModelSize | None = None,
        device: Device | None = None,
    ) -> Forecaster:
        """The forecaster for this model, as the benchmarks stand now; see `Forecaster`."""
        records = self._benchmarks.all(setting.model)
        key = (setting, limits, size, device, tuple(record.test_id for record in records))
        with self._lock:
            known = self._kept.get(key)
        if known is not None:
            return known
        measurements = [record.measurement() for record in records]
        made = Forecaster(setting, measurements, limits=limits, size=size, device=device)
        with self._lock:
            while len(self._kept) >= self.MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return made
