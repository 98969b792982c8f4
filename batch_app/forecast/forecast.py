"""The forecast of a run that hasn't begun: seconds, with a range, and what they rest on. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Literal

import numpy as np
import numpy.typing as npt

from batch_app.forecast import roofline
from batch_app.forecast.cost import CostModel, ObservedRun, Time
from batch_app.forecast.lengths import LengthModel, Lifetimes, mixing, octaves
from batch_app.forecast.measurement import Limits, Measurement, Setting
from batch_app.forecast.roofline import Device, ModelSize
from batch_app.forecast.schedule import Capacity, Steps, condensed, schedule
from batch_app.forecast.workload import RequestGroup, Workload, spread_out

Numbers = npt.NDArray[np.float64]

BasisKind = Literal["measured", "similar", "roofline"]

#: The share of runs that end within `low_s` and `high_s`.
RANGE = 0.8
#: So many standard deviations lie on each side of it.
RANGE_SIGMAS = 1.2816
#: Requests that stand for a workload of more.
MOST_SCHEDULED = 2048
#: A fit takes the newest ones.
MOST_MEASUREMENTS = 24
#: How far, as a standard deviation of the logarithm, another version or arguments (or ones that
#: weren't kept), or another machine may put a pace off.
OTHER_ARGUMENTS, OTHER_MACHINE = 0.13, 0.8
#: Without any measurement.
ROOFLINE_SIGMA = 0.5
#: Of loads, as the standard deviation of the logarithm: of one that was measured (the files come
#: from the page cache or they don't) before several have said more, and of a guess.
LOAD_SIGMA, GUESSED_LOAD_SIGMA = 0.25, 0.5
_LOAD_WEIGHT = 3.0
#: Prompts of which only the mean is known: their spread.
_PROMPT_SIGMA = 0.4


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a workload takes.

    `run_s`: the expected seconds of inference, without loading; `low_s` and `high_s` around it:
    four of five runs end between them. `load_s`: for the model to be loaded, 0 where it is;
    `load_sigma`: how sure that is, the standard deviation of its logarithm.
    `throughput_*`: per second of inference, at the pace of the measurements it rests on.
    `basis`: the ids of the measurements, the weightiest first. `basis_kind`: "measured" on this
    machine, "similar" elsewhere or with another version or arguments, "roofline" not at all.
    """

    run_s: float
    low_s: float
    high_s: float
    load_s: float
    prompt_tokens: float
    expected_output_tokens: float
    throughput_tokens_per_s: float
    throughput_requests_per_s: float
    basis: tuple[str, ...]
    basis_kind: BasisKind
    load_sigma: float = 0.0

    @property
    def total_s(self) -> float:
        """Loading and inference."""
        return self.load_s + self.run_s


class Forecaster:
    """Forecasts for one model on one machine, fitted once on what was measured.

    Making one costs some tens of milliseconds a measurement; keep it as long as these are the same.
    """

    def __init__(
        self,
        setting: Setting,
        measurements: Sequence[Measurement],
        *,
        limits: Limits | None = None,
        size: ModelSize | None = None,
        device: Device | None = None,
    ) -> None:
        """
        Args:
            setting: what is to be forecast for; fields that aren't known stay empty.
            measurements: newest first, of this model; others are passed over.
            limits: of the engine, where it is known what it will run with. Else those of the
                newest measurement.
            size, device: for a guess where nothing was measured.
        """
        self.setting = setting
        usable = [
            one
            for one in measurements
            if one.setting.model == setting.model
            and one.inference_s > 0
            and one.num_requests > 0
            and one.prompt_tokens + one.output_tokens > 0
            and not one.is_outlier
        ]
        # Those of the same machine first, and few others beside them.
        usable.sort(key=lambda one: _setting_sigma(setting, one.setting))
        self.measurements = tuple(usable[:MOST_MEASUREMENTS])
        prior, guessed = None, None
        if size is not None and device is not None:
            prior = roofline.coefficients(size, device)
            guessed = Limits(kv_cache_tokens=roofline.kv_cache_tokens(size, device))
        self._limits, self._guessed, self._size = limits, guessed, size
        self.can_forecast = bool(self.measurements) or prior is not None
        known = [one.limits for one in self.measurements]
        self.capacity = Capacity.of(limits, *known, guessed)
        weights = [_weight(_setting_sigma(setting, one.setting)) for one in self.measurements]
        self.lengths = LengthModel(zip(self.measurements, weights, strict=True))
        numbers: dict[Setting, int] = {}
        runs = []
        for one in self.measurements:
            number = numbers.setdefault(one.setting, len(numbers))
            sigma = _setting_sigma(setting, one.setting)
            runs.append(_observed(one, Capacity.of(one.limits, limits, guessed), number, sigma))
        self.cost = CostModel(runs, prior)

    def forecast(self, workload: Workload, *, loads_model: bool = True) -> Forecast | None:
        """None where there is nothing to go by: no measurement, and no size and device."""
        if not self.can_forecast:
            return None
        filled = self.filled(workload)
        time = self.cost.time(self.steps(filled))
        # The mean of a logarithmic normal distribution lies above its median: means can be added.
        run_s = time.seconds * exp(min(time.sigma, 0.5) ** 2 / 2)
        sigma = self._sigma(filled, time)
        low_s = time.seconds * exp(-RANGE_SIGMAS * sigma)
        high_s = time.seconds * exp(RANGE_SIGMAS * sigma)
        output = self.expected_output_tokens(filled)
        tokens_per_s, requests_per_s = self._pace(filled)
        return Forecast(
            run_s=run_s,
            low_s=min(low_s, run_s),
            high_s=max(high_s, run_s),
            load_s=self.load_s if loads_model else 0.0,
            prompt_tokens=filled.prompt_tokens,
            expected_output_tokens=output,
            throughput_tokens_per_s=tokens_per_s,
            throughput_requests_per_s=requests_per_s,
            basis=tuple(one.id for one in self.measurements),
            basis_kind=self.basis_kind,
            load_sigma=self.load_sigma,
        )

    @property
    def basis_kind(self) -> BasisKind:
        if not self.measurements:
            return "roofline"
        nearest = _setting_sigma(self.setting, self.measurements[0].setting)
        return "measured" if nearest == 0.0 else "similar"

    @property
    def load_s(self) -> float:
        """What loading took in the measurements of the same setting, the middle one.

        Loads from a warm page cache and from a cold one differ much; the middle is the usual case.
        Where none was measured, a guess by the model's size; 0 where that isn't known either.
        """
        if nearest := self._loads():
            return float(np.median(nearest))
        return roofline.load_s(self._size) if self._size is not None else 0.0

    @property
    def load_sigma(self) -> float:
        """How far a load may be off, as the standard deviation of its logarithm."""
        nearest = self._loads()
        if (
            not nearest
            or _setting_sigma(self.setting, self.measurements[0].setting) > OTHER_ARGUMENTS
        ):
            return GUESSED_LOAD_SIGMA
        apart = np.log(np.array(nearest) / np.median(nearest))
        squares = _LOAD_WEIGHT * LOAD_SIGMA**2 + float((apart**2).sum())
        return float((squares / (_LOAD_WEIGHT + len(nearest) - 1)) ** 0.5)

    def _loads(self) -> list[float]:
        """Seconds of each load in the measurements of the nearest setting."""
        return [
            one.load_s
            for one in self.measurements
            if one.load_s and one.setting == self.measurements[0].setting
        ]

    def expected_output_tokens(self, workload: Workload) -> float:
        return sum(group.num_requests * self._mean_output(group) for group in workload.groups)

    def log_error(self, measurement: Measurement) -> float | None:
        """How far this run was off what is expected of it, lengths known: log(actual/expected).

        In units of the spread of such runs. None where nothing can be expected. Beyond 4 or so it
        is an outlier.
        """
        if not self.measurements or measurement.inference_s <= 0:
            return None
        capacity = Capacity.of(measurement.limits, self._limits, self._guessed)
        expected = self.cost.time(_observed(measurement, capacity, 0, 0.0).steps)
        return log(measurement.inference_s / expected.seconds) / expected.sigma

    # -- also used while it runs ---------------------------------------------------------------

    def filled(self, workload: Workload) -> Workload:
        """The workload with prompts that aren't known taken to be as those that were measured."""
        if all(group.prompt_known for group in workload.groups):
            return workload
        mean, quantiles = 500.0, tuple[float, ...]()
        if self.measurements:
            nearest = self.measurements[0]
            mean = nearest.prompt_tokens / nearest.num_requests
            quantiles = nearest.prompt_quantiles
        return replace(
            workload,
            groups=tuple(
                group
                if group.prompt_known
                else replace(
                    group,
                    prompt_tokens=mean * group.num_requests,
                    prompt_quantiles=quantiles,
                    prompt_error=0.5 if self.measurements else 1.0,
                    prompt_known=True,
                )
                for group in workload.groups
            ),
        )

    def steps(self, workload: Workload) -> Steps:
        """What the engine has to do for it."""
        num = workload.num_requests
        if num <= MOST_SCHEDULED:
            return self._schedule(workload.groups)
        # Beginning and end are the same however long it is; between them the steps repeat.
        few = _thinned(workload.groups, MOST_SCHEDULED // 2)
        many = _thinned(workload.groups, MOST_SCHEDULED)
        num_few = sum(group.num_requests for group in few)
        num_many = sum(group.num_requests for group in many)
        repeats = (num - num_many) / (num_many - num_few)
        short, long = self._schedule(few), self._schedule(many)
        return Steps.join(long.times(1.0 + repeats), short.times(-repeats))

    def _schedule(
        self, groups: Sequence[RequestGroup], longer: Sequence[float] | None = None
    ) -> Steps:
        """`longer`: of each group, by what its answers' natural lengths are multiplied."""
        computed, prompts, outputs = [], [], []
        for number, group in enumerate(groups):
            if not group.num_requests:
                continue
            prompt = _prompts(group)
            output = self.outputs(group, prompt)
            if longer is not None:
                output = np.minimum(output * longer[number], self._limit(group) or np.inf)
            computed.append(prompt * (1.0 - group.spared_share))
            prompts.append(prompt)
            outputs.append(output)
        if not prompts:
            return condensed([])
        return schedule(
            np.concatenate(computed),
            np.concatenate(prompts),
            np.concatenate(outputs),
            self.capacity,
        )

    def outputs(self, group: RequestGroup, prompts: Numbers) -> Numbers:
        """Lengths that stand for the answers to these prompts of the group, shape (n,)."""
        if not group.generates:
            return np.zeros(len(prompts))
        if group.fixed_tokens and group.max_tokens:
            return np.full(len(prompts), group.max_tokens)
        return _by_octave(
            prompts,
            lambda octave: self.lengths.at(group.endpoint, group.max_tokens, octave),
            self._limit(group),
        )

    def _mean_output(self, group: RequestGroup) -> float:
        few = group.scaled(min(group.num_requests, 512))
        return float(self.outputs(few, _prompts(few)).mean()) if few.num_requests else 0.0

    def _limit(self, group: RequestGroup) -> float | None:
        """What ends an answer at the latest: its own limit, or the context."""
        told = [self._limits, *(one.limits for one in self.measurements)]
        longest = next((one.max_model_len for one in told if one and one.max_model_len), None)
        if longest is None:
            return group.max_tokens
        room = max(longest - group.mean_prompt_tokens, 1.0)
        return room if group.max_tokens is None else min(group.max_tokens, room)

    def _sigma(self, workload: Workload, time: Time) -> float:
        """Standard deviation of the logarithm of the run's time, from all that isn't sure."""
        variance = time.sigma**2
        if not self.cost.is_fitted:
            variance += ROOFLINE_SIGMA**2
        small = _thinned(workload.groups, 256)
        base = self.cost.scheduled_s(self._schedule(small))
        errors = [self.lengths.error(group) for group in workload.groups]
        if any(errors):
            changed = self.cost.scheduled_s(self._schedule(small, [exp(error) for error in errors]))
            variance += log(max(changed, 1e-9) / max(base, 1e-9)) ** 2
        if workload.prompt_error > 0:
            larger = [
                replace(group, prompt_tokens=group.prompt_tokens * (1.0 + group.prompt_error))
                for group in small
            ]
            changed = self.cost.scheduled_s(self._schedule(larger))
            variance += log(max(changed, 1e-9) / max(base, 1e-9)) ** 2
        return float(variance**0.5)

    def _pace(self, workload: Workload) -> tuple[float, float]:
        """Tokens and requests a second for such requests, as many as were measured at a time."""
        num = workload.num_requests
        if not num:
            return 0.0, 0.0
        reference = self.measurements[0] if self.measurements else None
        wanted = reference.num_requests if reference else max(num, 1000)
        groups = _thinned(workload.groups, wanted)
        scaled = Workload(groups, workload.longest_first)
        seconds = self.cost.scheduled_s(self.steps(scaled))
        tokens = scaled.prompt_tokens + self.expected_output_tokens(scaled)
        return tokens / seconds, scaled.num_requests / seconds


def _setting_sigma(wanted: Setting, measured: Setting) -> float:
    """How far a measurement of another setting may be off; 0 for one of the same."""
    if wanted.machine != measured.machine and (wanted.machine and measured.machine):
        return OTHER_MACHINE
    return 0.0 if wanted == measured and measured.engine_version else OTHER_ARGUMENTS


def _weight(sigma: float) -> float:
    """What the lengths of a measurement count: they depend on the model, little on the machine."""
    return 1.0 if sigma == 0.0 else 0.8 if sigma < OTHER_MACHINE else 0.5


def _thinned(groups: Sequence[RequestGroup], wanted: int) -> tuple[RequestGroup, ...]:
    """About `wanted` requests in the same proportions, at least one of each group."""
    num = sum(group.num_requests for group in groups)
    if not num:
        return tuple(groups)
    factor = wanted / num
    return tuple(
        group.scaled(max(round(group.num_requests * factor), 1)) if group.num_requests else group
        for group in groups
    )


def _prompts(group: RequestGroup) -> Numbers:
    """Prompts that stand for those of this group, without order; their sum is the group's."""
    num = group.num_requests
    mean = group.mean_prompt_tokens
    if group.prompt_quantiles:
        values = spread_out(group.prompt_quantiles, num)
    else:
        values = _usual_prompts(num)
    total = float(values.sum())
    if total > 0:
        values = values * (mean * num / total)
    # In another order than the outputs': the two have little to do with each other.
    order = np.argsort((np.arange(1, num + 1) * 0.7548776662466927) % 1.0)
    return values[order]


def _usual_prompts(num: int) -> Numbers:
    levels = (np.arange(num) + 0.5) / num
    # The logistic distribution's quantiles, near enough to the normal one's.
    logistic: Numbers = np.exp(_PROMPT_SIGMA * 0.5513 * np.log(levels / (1.0 - levels)))
    return logistic


def _observed(
    one: Measurement, capacity: Capacity, number: int, setting_sigma: float
) -> ObservedRun:
    """A measurement in the form that the cost model is fitted on."""
    steps = _measured_schedule(one, capacity)
    bins, seconds = binned(one)
    return ObservedRun(
        steps=steps,
        seconds=one.inference_s,
        bins=bins,
        bin_seconds=seconds,
        setting=number,
        setting_sigma=setting_sigma,
    )


def _measured_schedule(one: Measurement, capacity: Capacity) -> Steps:
    """The steps that a run must have had, from the lengths that it had."""
    mean_prompt = one.prompt_tokens / one.num_requests
    share = one.cached_tokens / one.prompt_tokens if one.prompt_tokens else 0.0

    def planned(wanted: int) -> tuple[Steps, int]:
        if one.groups:
            prompts, outputs = _as_answered(one, wanted)
        else:
            whole = RequestGroup(
                wanted, prompt_tokens=mean_prompt * wanted, prompt_quantiles=one.prompt_quantiles
            )
            prompts = _prompts(whole)
            outputs = np.zeros(wanted)
            if one.output_tokens:
                alone = LengthModel([(one, 1.0)])
                outputs = _by_octave(prompts, lambda octave: alone.at("", None, octave), None)
        return schedule(prompts * (1.0 - share), prompts, outputs, capacity), len(prompts)

    if one.num_requests <= MOST_SCHEDULED:
        return planned(one.num_requests)[0]
    (short, num_few), (long, num_many) = planned(MOST_SCHEDULED // 2), planned(MOST_SCHEDULED)
    repeats = (one.num_requests - num_many) / (num_many - num_few)
    return Steps.join(long.times(1.0 + repeats), short.times(-repeats))


def _as_answered(one: Measurement, wanted: int) -> tuple[Numbers, Numbers]:
    """About so many prompts and answers as the run had them, long limits first, else mixed."""
    factor = wanted / max(sum(group.num_requests for group in one.groups), 1)
    parts: dict[float, list[tuple[Numbers, Numbers]]] = {}
    for group in one.groups:
        num = max(round(group.num_requests * factor), 1)
        prompt = group.mean_prompt_tokens or one.prompt_tokens / one.num_requests
        outputs = np.full(num, group.mean_output_tokens)
        if group.output_quantiles and num > 1:
            outputs = spread_out(group.output_quantiles, num)
            mean = float(outputs.mean())
            if mean > 0:
                outputs = outputs * (group.mean_output_tokens / mean)
        limit = group.max_tokens or np.inf
        parts.setdefault(limit, []).append((np.full(num, prompt), outputs))
    prompts, answers = [], []
    for limit in sorted(parts, reverse=True):
        joined = [np.concatenate(arrays) for arrays in zip(*parts[limit], strict=True)]
        order = np.argsort(mixing(len(joined[0])))
        prompts.append(joined[0][order])
        answers.append(joined[1][order])
    return np.concatenate(prompts), np.concatenate(answers)


def _by_octave(
    prompts: Numbers, lifetimes_at: Callable[[int], Lifetimes], limit: float | None
) -> Numbers:
    """Lengths for the answers to these prompts, of each octave as it is distributed there."""
    lengths = np.zeros(len(prompts))
    of_prompts = octaves(prompts)
    for octave in np.unique(of_prompts).tolist():
        here = np.flatnonzero(of_prompts == octave)
        order = np.argsort(mixing(len(here)))
        lengths[here] = lifetimes_at(octave).spread(len(here), limit)[order]
    return lengths


def binned(one: Measurement) -> tuple[Steps | None, Numbers | None]:
    """The steps as they were observed, with what they don't say taken from the whole run."""
    # Without a token generated there is no telling how many steps there were.
    bins = [part for part in one.steps if part.num_steps > 0 and part.decode_tokens > 0]
    if not bins:
        return None, None
    values = np.array([one.prompt_tokens / one.num_requests])
    if one.prompt_quantiles:
        values = spread_out(one.prompt_quantiles, 64)
    before = float((values**2).sum() / max(values.sum(), 1.0)) / 2
    computed = max((one.prompt_tokens - one.cached_tokens) / one.num_requests, 1.0)
    context = (one.prompt_tokens + one.output_tokens / 2) / one.num_requests
    rows = np.array(
        [
            (
                part.num_steps,
                part.num_running,
                part.prefill_tokens / part.num_steps,
                part.prefill_tokens / part.num_steps * before,
                part.num_running * context
                if part.context_tokens is None
                else part.context_tokens / part.num_steps,
                part.prefill_tokens / part.num_steps / computed,
            )
            for part in bins
        ]
    )
    return Steps(*rows.T), np.array([part.seconds for part in bins])
