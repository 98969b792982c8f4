"""Foresight: what is left of a claimed batch, told again and again while it runs.

One for a claim of a batch. Told of every answer, and about once a second of what the engine says of
itself, it puts the model that runs now (`forecast.live`) before those that come after it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from batch_app.benchmarks import BenchmarkPrediction, machine_text
from batch_app.engine.base import EngineInfo, EngineStats, Outcome
from batch_app.forecast.forecast import Forecast
from batch_app.forecast.live import LiveForecast
from batch_app.forecast.measurement import Limits, Setting
from batch_app.index import Index
from batch_app.measuring import reading_of
from batch_app.outlook import BatchForecast, Left, Outlook, combined, range_of
from batch_app.planner import Group
from batch_app.registry import ModelEntry
from batch_app.workloads import (
    ModelWorkload,
    Planning,
    from_json,
    tokens_per_byte_of,
    workload_in_order,
)

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

#: Seconds between two looks ahead; more where one takes long, so that they cost 2% at the most.
LOOK_EVERY_S = 1.0
MOST_OF_THE_TIME = 0.02


def _never_in_the_way(method: Callable[P, R | None]) -> Callable[P, R | None]:
    """A defect of a forecast must not end a batch that would run well without one."""

    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(*args, **kwargs)
        except Exception:
            logger.exception("The forecast failed; the batch goes on.")
            return None

    return guarded


class Foresight:
    """For the thread that runs the batch. `workload` is asked for what the store has by then."""

    def __init__(
        self,
        *,
        outlook: Outlook,
        planning: Planning,
        index: Index,
        workload: Callable[[], Sequence[Any] | None],
        models: Sequence[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`models`: those that the batch still needs, in the order of their turn."""
        self._outlook = outlook
        self._planning = planning
        self._index = index
        self._workload = workload
        self._models = list(models)
        self._clock = clock
        self._group: Group | None = None
        self._later: BatchForecast | None = None
        self._prior: Forecast | None = None
        self._live: LiveForecast | None = None
        self._place_of: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self._next_look = 0.0
        self._last_at_s = 0.0
        #: What was foreseen before the first model was loaded; for the benchmark.
        self.prediction: BenchmarkPrediction | None = None

    @_never_in_the_way
    def begin(self, entry: ModelEntry, group: Group, *, loads: bool) -> Left | None:
        """This group comes next. Returns what is left; None where nothing can be said."""
        self._group, self._live = group, None
        self._models = self._models[self._models.index(group.model) + 1 :]
        parts = {part.model: part for part in self._known()}
        self._later = self._forecast_later(parts)
        workload, _, _ = workload_in_order(
            self._index, group, self._tokens_per_byte(parts), self._planning
        )
        if not workload.num_requests:
            return self._left_of(None)
        part = ModelWorkload(group.model, workload, len(group.numbers), 0, "")
        self._prior = self._outlook.forecast(part, loads_model=loads)
        if self.prediction is None:
            self.prediction = _prediction(self._outlook.forecast(part))
        if self._prior is None:
            return None
        prior = combined([self._prior])
        assert prior is not None
        return self._left_of((prior.total_s, prior.low_s, prior.high_s))

    @_never_in_the_way
    def loaded(self, info: EngineInfo, stats: EngineStats) -> None:
        """The engine is there, for the first time or anew after it died."""
        group = self._group
        if group is None or not len(group.numbers):
            return
        now_s = time.monotonic()
        if self._live is not None:
            self._live.reset()
        else:
            parts = {part.model: part for part in self._known()}
            planning = self._planning
            if info.kv_cache_tokens:
                planning = replace(planning, kv_cache_tokens={group.model: info.kv_cache_tokens})
            workload, group_of, tokens = workload_in_order(
                self._index, group, self._tokens_per_byte(parts), planning
            )
            setting = Setting(
                model=info.model,
                machine=machine_text(info.device, self._outlook.machine().name),
                engine=info.engine,
                engine_version=info.engine_version,
                arguments=self._outlook.arguments(group.model),
            )
            limits = Limits(
                max_num_seqs=info.max_num_seqs,
                max_num_batched_tokens=info.max_num_batched_tokens,
                kv_cache_tokens=info.kv_cache_tokens,
                max_model_len=info.max_model_len,
            )
            forecaster = self._outlook.forecaster(setting, limits)
            self._live = LiveForecast(
                forecaster, workload, group_of, np.round(tokens).astype(np.int32)
            )
            self._place_of = np.full(len(self._index), -1, np.int32)
            self._place_of[group.numbers] = np.arange(len(group.numbers), dtype=np.int32)
        self._live.read(reading_of(stats, at_s=now_s))
        self._last_at_s = now_s
        self._next_look = now_s + LOOK_EVERY_S

    @_never_in_the_way
    def finished(self, outcomes: Sequence[Outcome]) -> None:
        """These were answered by the engine."""
        live = self._live
        if live is None:
            return
        for one in outcomes:
            place = int(self._place_of[one.number])
            if place >= 0:
                live.finish(place, one.completion_tokens, one.prompt_tokens, one.cached_tokens)

    @_never_in_the_way
    def look(self, stats: EngineStats) -> Left | None:
        """What is left now; None where it isn't time to look again, or nothing can be said."""
        now_s = time.monotonic()
        if self._live is None or now_s < self._next_look or stats.at_s <= self._last_at_s:
            return None
        self._last_at_s = stats.at_s
        self._live.read(reading_of(stats))
        remaining = self._live.remaining()
        cost_s = time.monotonic() - now_s
        self._next_look = now_s + max(LOOK_EVERY_S, cost_s / MOST_OF_THE_TIME)
        if remaining is None:
            return None
        left = (remaining.remaining_s, remaining.low_s, remaining.high_s)
        return self._left_of(left, age_s=now_s - stats.at_s)

    # -- inside --------------------------------------------------------------------------------

    def _known(self) -> tuple[ModelWorkload, ...]:
        kept = self._workload()
        return from_json(kept) if kept else ()

    def _tokens_per_byte(self, parts: dict[str, ModelWorkload]) -> float:
        assert self._group is not None
        usual = self._outlook.bytes_per_token(self._group.model)
        return tokens_per_byte_of(parts.get(self._group.model), usual)

    def _forecast_later(self, parts: dict[str, ModelWorkload]) -> BatchForecast | None:
        found = []
        for model in self._models:
            forecast = self._outlook.forecast(parts[model]) if model in parts else None
            if forecast is not None:
                found.append(forecast)
        return combined(found)

    def _left_of(self, now: tuple[float, float, float] | None, age_s: float = 0.0) -> Left:
        """`age_s`: so long ago it was said."""
        remaining_s, low_s, high_s = now or (0.0, 0.0, 0.0)
        if self._later is not None:
            remaining_s += self._later.total_s
            low_s += self._later.low_s
            high_s += self._later.high_s
        return Left(
            at=round(self._clock() - age_s, 2),
            remaining_s=round(remaining_s, 2),
            low_s=round(low_s, 2),
            high_s=round(high_s, 2),
        )


def _prediction(forecast: Forecast | None) -> BenchmarkPrediction | None:
    if forecast is None:
        return None
    low_s, high_s = range_of([forecast])
    return BenchmarkPrediction(
        predicted_s=round(forecast.total_s, 3),
        low_s=round(low_s, 3),
        high_s=round(high_s, 3),
        basis=forecast.basis,
        basis_kind=forecast.basis_kind,
    )
