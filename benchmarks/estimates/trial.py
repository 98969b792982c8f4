"""Trials: a hidden machine runs a job, and what was expected of it is held against that.

Everything goes the way it goes in earnest: what the run shows goes through a recording into a
benchmark record and out of it into the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_app.benchmarks import BenchmarkRecord, record_from_run
from batch_app.core import Endpoint
from batch_app.forecast.forecast import Forecaster
from batch_app.forecast.live import LiveForecast
from batch_app.forecast.measurement import Limits, Measurement, Reading
from batch_app.forecast.recording import Recording
from batch_app.forecast.schedule import schedule
from batch_app.forecast.workload import Workload
from benchmarks.estimates.hidden import Job, Machine, Run
from benchmarks.estimates.shapes import Requests

NOW = datetime(2026, 1, 1, tzinfo=UTC)
#: When, by requests done, the live forecast is looked at.
LOOKS = (0.1, 0.25, 0.5, 0.75, 0.9)
_ENDPOINTS = (str(Endpoint.CHAT_COMPLETIONS), str(Endpoint.EMBEDDINGS))


@dataclass(frozen=True)
class Live:
    """At a share of the requests done: what was left, and what was thought to be left."""

    done: float
    actual_s: float
    expected_s: float
    low_s: float
    high_s: float
    naive_s: float  # by the requests a second so far

    @property
    def error(self) -> float:
        """Relative to the whole run's remaining time."""
        return abs(self.expected_s / self.actual_s - 1.0) if self.actual_s else 0.0


@dataclass(frozen=True)
class Trial:
    """One job: what was expected before, what it took, and how the expectation went on."""

    machine: str
    shape: str
    num_requests: int
    basis: tuple[str, ...]
    actual_s: float
    expected_s: float
    low_s: float
    high_s: float
    scaled_s: float  # by the requests a second of the newest benchmark
    informed_s: float  # as `expected_s`, had the lengths of the answers been known
    actual_output: float
    expected_output: float
    lives: tuple[Live, ...]

    @property
    def error(self) -> float:
        return abs(self.expected_s / self.actual_s - 1.0)

    @property
    def is_within(self) -> bool:
        return self.low_s <= self.actual_s <= self.high_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def limits_of(machine: Machine) -> Limits:
    return Limits(
        max_num_seqs=machine.max_num_seqs,
        max_num_batched_tokens=machine.max_num_batched_tokens,
        kv_cache_tokens=machine.kv_tokens,
        max_model_len=8192,
    )


def workload_of(requests: Requests) -> tuple[Workload, Any]:
    """What intake knows of these requests."""
    num = len(requests.prompt)
    return Workload.of_requests(
        endpoints=_ENDPOINTS,
        endpoint_of=np.full(num, 0 if requests.generates else 1),
        max_tokens=requests.limit,
        generating=(True, False),
        prompt_tokens=requests.prompt,
        spared_share=_held(requests),
        fixed=np.full(num, requests.fixed),
    )


def _held(requests: Requests) -> float:
    """Of the prompts' tokens the share that the cache could hold."""
    return float(requests.cacheable.sum() / max(requests.prompt.sum(), 1))


def job_of(requests: Requests, random: np.random.Generator) -> Job:
    """What really happens: the cache loses some of what it could hold."""
    kept = random.uniform(0.88, 1.0)
    return Job(
        requests.prompt, requests.output, np.rint(requests.cacheable * kept).astype(np.int64)
    )


def measured(machine: Machine, requests: Requests, name: str, seed: int) -> BenchmarkRecord:
    """Run it to measure; the record that a finished batch leaves."""
    random = np.random.default_rng(seed)
    run = Run(machine, job_of(requests, random), seed)
    recording = Recording(machine.kv_tokens)
    recording.read(Reading(0.0, 0))
    endpoint = _ENDPOINTS[0 if requests.generates else 1]
    last = None
    for moment in run.moments():
        for place in moment.finished:
            recording.finish(
                endpoint,
                int(requests.limit[place]),
                prompt_tokens=int(requests.prompt[place]),
                output_tokens=int(requests.output[place]),
            )
        recording.read(_reading(moment))
        last = moment
    assert last is not None
    return record_from_run(
        batch_id=f"batch_{name}",
        model="hidden",
        engine="hidden",
        engine_version="1",
        device="gpu",
        device_name=machine.name,
        num_requests=len(requests.prompt),
        success_count=len(requests.prompt),
        load_s=machine.load_s,
        inference_s=last.at_s,
        prompt_tokens=int(requests.prompt.sum()),
        completion_tokens=int(requests.output.sum()),
        engine_args={
            "max_model_len": 8192,
            "max_num_seqs": machine.max_num_seqs,
            "max_num_batched_tokens": machine.max_num_batched_tokens,
            "kv_cache_tokens": machine.kv_tokens,
        },
        timestamp=NOW,
        recording=recording,
        cached_prompt_tokens=int(last.cached_tokens),
        registry_args={},
    )


def tried(
    machine: Machine,
    shape: str,
    requests: Requests,
    benchmarks: Sequence[Measurement],
    seed: int,
) -> Trial:
    """Forecast a job from these benchmarks, run it, and look at the live forecast under way."""
    random = np.random.default_rng(seed)
    setting = benchmarks[0].setting
    forecaster = Forecaster(setting, benchmarks)
    workload, group_of = workload_of(requests)
    forecast = forecaster.forecast(workload)
    assert forecast is not None
    live = LiveForecast(forecaster, workload, group_of, requests.prompt)
    job = job_of(requests, random)
    num = len(requests.prompt)
    looks: list[tuple[float, float, Any]] = []
    live.read(Reading(0.0, 0))
    done, at_s = 0, 0.0
    every_s = max(forecast.run_s / 300, 0.2)
    for moment in Run(machine, job, seed, every_s).moments():
        for place in moment.finished:
            live.finish(
                place, int(job.output[place]), int(job.prompt[place]), int(job.cached[place])
            )
        done += len(moment.finished)
        live.read(_reading(moment))
        at_s = moment.at_s
        if len(looks) < len(LOOKS) and done >= LOOKS[len(looks)] * num and done < num:
            looks.append((done / num, at_s, live.remaining()))
    return Trial(
        machine=machine.name,
        shape=shape,
        num_requests=num,
        basis=tuple(one.id for one in benchmarks),
        actual_s=at_s,
        expected_s=forecast.run_s,
        low_s=forecast.low_s,
        high_s=forecast.high_s,
        scaled_s=num * benchmarks[0].inference_s / benchmarks[0].num_requests,
        informed_s=informed_s(forecaster, requests.prompt, requests.output, _held(requests)),
        actual_output=float(requests.output.sum()),
        expected_output=forecast.expected_output_tokens,
        lives=tuple(
            Live(
                share,
                at_s - then_s,
                left.remaining_s,
                left.low_s,
                left.high_s,
                then_s * (1.0 - share) / share,
            )
            for share, then_s, left in looks
        ),
    )


def informed_s(
    forecaster: Forecaster,
    prompts: npt.NDArray[Any],
    outputs: npt.NDArray[Any],
    spared_share: float,
) -> float:
    """What would be expected, did one know how long the answers get: the cost model's own error."""
    prompts = prompts.astype(np.float64)
    steps = schedule(prompts * (1.0 - spared_share), prompts, outputs, forecaster.capacity)
    return forecaster.cost.time(steps).seconds


def _reading(moment: Any) -> Reading:
    return Reading(
        at_s=moment.at_s,
        num_running=moment.num_running,
        num_waiting=moment.num_waiting,
        prompt_tokens_total=moment.prompt_tokens,
        cached_tokens_total=moment.cached_tokens,
        generation_tokens_total=moment.generation_tokens,
        kv_cache_usage=moment.kv_usage,
    )
