"""The forecast of a run while it runs: what is left, sharpened by what is seen. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, log

import numpy as np
import numpy.typing as npt

from batch_app.forecast.forecast import RANGE_SIGMAS, Forecaster, binned
from batch_app.forecast.lengths import Lifetimes, mixing, octaves, product_limit
from batch_app.forecast.measurement import Measurement, Reading, Setting
from batch_app.forecast.recording import Recording
from batch_app.forecast.schedule import Capacity, Steps, condensed, schedule
from batch_app.forecast.workload import RequestGroup, Workload, spread_out

Numbers = npt.NDArray[np.float64]

#: Requests that stand for those that wait.
_MOST_SCHEDULED = 2048
#: What earlier batches say of the lengths counts as much as so many answers of this one.
_PRIOR_ANSWERS, _UNKNOWN_ANSWERS = 8.0, 0.5
#: Of what steps or finished requests say of the pace, the least uncertainty; what may change yet.
_STEPS_SIGMA, _REPLAY_SIGMA, _DRIFT_SIGMA = 0.035, 0.015, 0.03
_WAITING, _BEGUN, _DONE = 0, 1, 2
#: Of one request; servers may say anything.
_MOST_TOKENS = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Remaining:
    """Seconds of inference still to come, and the range that four of five runs stay in."""

    remaining_s: float
    low_s: float
    high_s: float


class LiveForecast:
    """What is left of a run. One for each model of a batch, made when its first request starts.

    Requests are known by their place in the order in which they are submitted. Those that finish
    early are the short ones: the others count as longer than what they have so far, not as
    average.
    """

    def __init__(
        self,
        forecaster: Forecaster | None,
        workload: Workload,
        group_of: npt.NDArray[np.integer] | None = None,
        prompt_tokens: npt.NDArray[np.integer] | None = None,
    ) -> None:
        """
        Args:
            forecaster: None, or one that knows nothing: then the run itself is all there is.
            group_of: for each place in the order the request's group, shape (n,); None: the
                groups of the workload one after the other.
            prompt_tokens: for each place, where they are known; 0 where one isn't.

        Memory: about 20 bytes a request.
        """
        self._knows = forecaster is not None and forecaster.can_forecast
        self._forecaster = forecaster or Forecaster(Setting(model=""), ())
        workload = self._forecaster.filled(workload)
        self._groups = workload.groups
        num = workload.num_requests
        if group_of is None:
            sizes = [group.num_requests for group in self._groups]
            group_of = np.repeat(np.arange(len(sizes)), sizes)
        self._group_of = np.asarray(group_of, np.int16)
        if len(self._group_of) != num:
            raise ValueError(f"{num} requests, but groups of {len(self._group_of)}.")
        self._prompts = self._prompt_lengths(prompt_tokens)
        if prompt_tokens is not None:
            self._split_by_prompt()
        self._state = np.zeros(num, np.int8)
        self._begun_at = np.zeros(num, np.float32)  # steps, when it began
        self._output = np.zeros(num, np.int32)
        self._num_done = 0
        self._next = 0  # the first place that may not have begun
        self._step = 0.0
        self._elapsed_s = 0.0
        self._prefilled = self._cached = 0.0
        self._generated = 0.0  # since the last reset, as the engine counts
        self._answered = 0.0  # of that, what finished requests have
        self._last: Reading | None = None
        self._num_readings = 0
        self._recording = Recording(self._forecaster.capacity.kv_cache_tokens)
        self._prefill_only = self._prefill_only_s = 0.0  # while nothing was generated
        self._pace = 1.0
        self._shown: tuple[float, float] | None = None  # elapsed, when it is expected to end
        self._prior: dict[int, Lifetimes] = {}

    def _split_by_prompt(self) -> None:
        """Make groups of prompts of about the same length: their answers are of like length."""
        groups: list[RequestGroup] = []
        group_of = np.zeros_like(self._group_of)
        for number, group in enumerate(self._groups):
            here = np.flatnonzero(self._group_of == number)
            of_prompts = octaves(self._prompts[here].astype(np.float64))
            for octave in np.unique(of_prompts).tolist():
                inside = here[of_prompts == octave]
                group_of[inside] = len(groups)
                total = float(self._prompts[inside].sum())
                groups.append(
                    replace(
                        group,
                        num_requests=len(inside),
                        prompt_tokens=total,
                        spared_tokens=total * group.spared_share,
                        prompt_quantiles=(),
                    )
                )
        self._groups, self._group_of = tuple(groups), group_of

    def finish(
        self, place: int, output_tokens: int, prompt_tokens: int = 0, cached_tokens: int = 0
    ) -> None:
        """This request was answered (also with an error). Token counts as the answer has them."""
        if self._state[place] == _DONE:
            return
        self._state[place] = _DONE
        self._output[place] = min(output_tokens, _MOST_TOKENS)
        if prompt_tokens:
            self._prompts[place] = min(prompt_tokens, _MOST_TOKENS)
            self._prefilled += prompt_tokens
            self._cached += cached_tokens
        self._num_done += 1
        self._answered += output_tokens

    def read(self, reading: Reading) -> None:
        """What the engine says now; every second or so, after the `finish`es up to then.

        The first one is best taken before the first request is submitted: time and tokens count
        from there.
        """
        last, self._last = self._last, reading
        if last is None:
            self._recording.read(reading)
        else:
            self._num_readings += 1
            self._elapsed_s += max(reading.at_s - last.at_s, 0.0)
            generated = reading.generation_tokens_total - last.generation_tokens_total
            self._recording.read(reading)
            prompts = (reading.prompt_tokens_total - reading.cached_tokens_total) - (
                last.prompt_tokens_total - last.cached_tokens_total
            )
            if generated == 0 and prompts > 0:
                self._prefill_only += prompts
                self._prefill_only_s += reading.at_s - last.at_s
            if generated > 0:
                self._generated += generated
                self._step += generated / max((reading.num_running + last.num_running) / 2, 1.0)
        # Requests begin in the order of their places: so many have begun.
        num_begun = int((self._state == _BEGUN).sum())
        wanted = reading.num_running - num_begun
        while wanted > 0 and self._next < len(self._state):
            if self._state[self._next] == _WAITING:
                self._state[self._next] = _BEGUN
                self._begun_at[self._next] = self._step
                wanted -= 1
            self._next += 1

    def reset(self) -> None:
        """The engine was started anew: counters begin at 0, what was in flight runs again."""
        self._last = None
        self._recording.reset()
        self._state[self._state == _BEGUN] = _WAITING
        self._next = 0
        self._generated = self._answered = 0.0

    def remaining(self) -> Remaining | None:
        """As of the last reading. None while nothing can be said.

        Costs some tens of milliseconds, however many requests there are.
        """
        num_left = len(self._state) - self._num_done
        if num_left == 0:
            return Remaining(0.0, 0.0, 0.0)
        if not self._knows and not self._num_done:
            return None
        lifetimes = [self._lifetimes(number) for number in range(len(self._groups))]
        ahead = self._ahead(lifetimes, 1.0)
        cost = self._forecaster.cost
        left_s = cost.scheduled_s(ahead)
        pace, pace_sigma = self._observed_pace(lifetimes, left_s)
        variance = pace_sigma**2
        # Lengths: known the better, the more answers there are.
        errors = [self._length_error(number, one) for number, one in enumerate(lifetimes)]
        worst = max(errors)
        if worst > 0 and left_s > 0:
            longer_s = cost.scheduled_s(self._ahead(lifetimes, exp(worst)))
            variance += log(max(longer_s, 1e-9) / left_s) ** 2
        variance += 0.3**2 / num_left
        remaining_s = self._steadied(left_s * pace)
        below, above = (
            (variance + self._chance(lifetimes, left_s, side) ** 2) ** 0.5 for side in (-1.0, 1.0)
        )
        return Remaining(
            remaining_s,
            remaining_s * exp(-RANGE_SIGMAS * below),
            remaining_s * exp(RANGE_SIGMAS * above),
        )

    def _chance(self, lifetimes: list[Lifetimes], left_s: float, side: float) -> float:
        """What chance may do to one side, as a standard deviation of the logarithm.

        Above all it decides how long the longest of the last answers is, and with that the end.
        """
        if left_s <= 0:
            return 0.0
        other_s = self._forecaster.cost.scheduled_s(
            self._ahead(lifetimes, 1.0, side * RANGE_SIGMAS)
        )
        return log(max(other_s, 1e-9) / left_s) / RANGE_SIGMAS

    # -- pace ----------------------------------------------------------------------------------

    def _observed_pace(self, lifetimes: list[Lifetimes], left_s: float) -> tuple[float, float]:
        """By how much it runs slower than the model says, and how sure that is.

        From three things, by how sure each is: what is usual; what the steps that were seen should
        have taken; what the requests that are done should have taken, which is sure only when few
        of those begun are still under way.
        """
        cost = self._forecaster.cost
        prior_sigma = 3.0 if not self._knows else max(cost.time(self._some()).sigma, 0.05)
        told = [(0.0, prior_sigma)]
        actual_s, expected_s = self._observed_steps()
        if actual_s > 0 and expected_s > 0:
            sigma = _STEPS_SIGMA + 0.1 / self._num_readings**0.5
            told.append((log(actual_s / expected_s), sigma))
        if self._num_done:
            done_s = cost.scheduled_s(self._whole(lifetimes)) - left_s
            num_begun = int((self._state == _BEGUN).sum())
            if done_s > 0 and self._elapsed_s > 0:
                sigma = _REPLAY_SIGMA + 0.25 * num_begun / self._num_done
                told.append((log(self._elapsed_s / done_s), sigma))
        precision = sum(sigma**-2 for _, sigma in told)
        ratio = sum(value * sigma**-2 for value, sigma in told) / precision
        # What comes is not quite like what was; the less so, the farther runs of this machine
        # are off what others of it say.
        drift = cost.inflation * _DRIFT_SIGMA**2
        return exp(ratio), (1.0 / precision + drift) ** 0.5

    def _observed_steps(self) -> tuple[float, float]:
        """Seconds of the steps that were seen: actual, and expected."""
        num_prompts = max(self._num_done, 1)
        seen = Measurement(
            id="",
            setting=self._forecaster.setting,
            num_requests=num_prompts,
            prompt_tokens=max(self._prefilled, float(num_prompts)),
            cached_tokens=self._cached,
            output_tokens=self._answered,
            inference_s=self._elapsed_s,
            steps=self._recording.steps,
        )
        steps, seconds = binned(seen)
        actual_s = expected_s = 0.0
        if steps is not None and seconds is not None:
            actual_s, expected_s = float(seconds.sum()), self._forecaster.cost.seconds(steps)
        if self._prefill_only_s > 0:
            actual_s += self._prefill_only_s
            expected_s += self._forecaster.cost.seconds(self._of_prefill(self._prefill_only))
        return actual_s, expected_s

    def _of_prefill(self, tokens: float) -> Steps:
        """Steps in which nothing but so many prompt tokens is computed."""
        size = float(min(self._capacity.max_num_batched_tokens, max(tokens, 1.0)))
        mean = float(self._prompts.mean())
        return condensed([(tokens / size, 0.0, size, size * mean / 2, 0.0, size / max(mean, 1.0))])

    def _steadied(self, remaining_s: float) -> float:
        """Without the jumps of single readings: the expected end moves by degrees."""
        end_s = self._elapsed_s + remaining_s
        if self._shown is not None:
            at_s, shown_s = self._shown
            since = self._elapsed_s - at_s
            keep = exp(-since / (0.02 * self._elapsed_s + 1e-9)) if self._elapsed_s else 0.0
            end_s = keep * shown_s + (1.0 - keep) * end_s
        self._shown = (self._elapsed_s, end_s)
        return max(end_s - self._elapsed_s, 0.0)

    # -- lengths -------------------------------------------------------------------------------

    def _lifetimes(self, number: int) -> Lifetimes:
        """Natural lengths of a group: what is known before, what has ended, what hasn't yet."""
        group = self._groups[number]
        if number not in self._prior:
            self._prior[number] = self._forecaster.lengths.of(group)
        prior = self._prior[number]
        inside = self._group_of == number
        ended_at = self._output[inside & (self._state == _DONE)].astype(np.float64)
        begun = inside & (self._state == _BEGUN)
        so_far = self._so_far(begun)
        before = _PRIOR_ANSWERS if self._forecaster.lengths.is_known else _UNKNOWN_ANSWERS
        limit = group.max_tokens
        natural = np.ones(len(ended_at), bool) if limit is None else ended_at < limit * 0.999
        return product_limit(
            np.concatenate((prior.values, ended_at, so_far)),
            np.concatenate((prior.shares * before, np.ones(len(ended_at) + len(so_far)))),
            np.concatenate(
                (np.ones(len(prior.values), bool), natural, np.zeros(len(so_far), bool))
            ),
        )

    def _so_far(self, begun: npt.NDArray[np.bool_]) -> Numbers:
        """Output tokens that these have by now: one a step since they began."""
        ages: Numbers = np.maximum(self._step - self._begun_at[begun], 0.0).astype(np.float64)
        everyone = self._state == _BEGUN
        total = float(np.maximum(self._step - self._begun_at[everyone], 0.0).sum())
        known = self._generated - self._answered
        if total > 0 and known > 0:
            ages *= min(max(known / total, 0.5), 2.0)
        return ages

    def _length_error(self, number: int, lifetimes: Lifetimes) -> float:
        """Standard deviation of the logarithm of the group's mean length."""
        group = self._groups[number]
        before = self._forecaster.lengths.error(group)
        if before == 0.0:
            return 0.0
        inside = self._group_of == number
        num = int((inside & (self._state == _DONE)).sum())
        mean = lifetimes.mean(group.max_tokens)
        cut = (
            lifetimes.values
            if group.max_tokens is None
            else np.minimum(lifetimes.values, group.max_tokens)
        )
        spread = float((lifetimes.shares * (cut - mean) ** 2).sum()) ** 0.5 / max(mean, 1e-9)
        if num == 0 or spread == 0.0:
            return before if num == 0 else 0.0
        return float((1.0 / before**2 + num / spread**2) ** -0.5)

    # -- work ----------------------------------------------------------------------------------

    def _ahead(self, lifetimes: list[Lifetimes], longer: float, chance: float = 0.0) -> Steps:
        """The steps still to come. `longer`: with lengths so many times as long; `chance`: see
        `Lifetimes.spread`."""
        begun = np.flatnonzero(self._state == _BEGUN)
        waiting = np.flatnonzero(self._state == _WAITING)
        had = np.zeros(len(begun))
        wanted = np.zeros(len(begun))
        for number, group in enumerate(self._groups):
            here = self._group_of[begun] == number
            if not here.any():
                continue
            mask = np.zeros(len(self._state), bool)
            mask[begun[here]] = True
            had[here] = self._so_far(mask)
            wanted[here] = self._lengths(
                group, lifetimes[number], int(here.sum()), had[here], chance
            )
        rest = wanted - had
        wanted = had + np.maximum(rest * longer, 1.0)

        def steps(places: npt.NDArray[np.intp]) -> Steps:
            outputs = self._expected(places, lifetimes, chance) * longer
            whole = self._prompts[places].astype(np.float64)
            spared = self._spared_shares()[self._group_of[places]]
            begun_prompts = self._prompts[begun].astype(np.float64)
            return schedule(
                np.concatenate((begun_prompts, whole * (1.0 - spared))),
                np.concatenate((begun_prompts, whole)),
                np.concatenate((wanted, outputs)),
                self._capacity,
                num_begun=len(begun),
                had=had,
            )

        return _extended(steps, waiting)

    def _whole(self, lifetimes: list[Lifetimes]) -> Steps:
        """The steps of the whole run, done and to come."""
        so_far = np.zeros(len(self._state))
        for number in range(len(self._groups)):
            mask = (self._state == _BEGUN) & (self._group_of == number)
            if mask.any():
                so_far[mask] = self._so_far(mask)

        def steps(chosen: npt.NDArray[np.intp]) -> Steps:
            state = self._state[chosen]
            outputs = self._expected(chosen, lifetimes)
            outputs[state == _DONE] = self._output[chosen[state == _DONE]]
            for number, group in enumerate(self._groups):
                here = np.flatnonzero((state == _BEGUN) & (self._group_of[chosen] == number))
                if len(here):
                    after = so_far[chosen[here]]
                    outputs[here] = self._lengths(group, lifetimes[number], len(here), after)
            whole = self._prompts[chosen].astype(np.float64)
            spared = self._spared_shares()[self._group_of[chosen]]
            return schedule(whole * (1.0 - spared), whole, outputs, self._capacity)

        return _extended(steps, np.arange(len(self._state)))

    def _some(self) -> Steps:
        """Some steps of the kind that the workload has, to ask how sure their time is."""
        return self._forecaster.steps(
            Workload(tuple(g.scaled(max(min(g.num_requests, 64), 1)) for g in self._groups))
        )

    @property
    def _capacity(self) -> Capacity:
        return self._forecaster.capacity

    def _spared_shares(self) -> Numbers:
        """Of each group the share of prompt tokens that the cache spares, as far as it was seen."""
        expected = np.array([group.spared_share for group in self._groups])
        total = sum(group.spared_tokens for group in self._groups)
        prompts = sum(group.prompt_tokens for group in self._groups)
        if self._prefilled <= 0 or total <= 0:
            return expected
        seen = (self._cached / self._prefilled) / (total / prompts)
        weight = self._num_done / (self._num_done + 50.0)
        return np.clip(expected * (1.0 + weight * (seen - 1.0)), 0.0, 1.0)

    def _expected(
        self, places: npt.NDArray[np.intp], lifetimes: list[Lifetimes], chance: float = 0.0
    ) -> Numbers:
        """Lengths that stand for the answers to these, mixed."""
        outputs = np.zeros(len(places))
        for number, group in enumerate(self._groups):
            here = np.flatnonzero(self._group_of[places] == number)
            if len(here):
                lengths = self._lengths(group, lifetimes[number], len(here), None, chance)
                outputs[here] = lengths[np.argsort(mixing(len(here)))]
        return outputs

    def _lengths(
        self,
        group: RequestGroup,
        lifetimes: Lifetimes,
        num: int,
        after: Numbers | None = None,
        chance: float = 0.0,
    ) -> Numbers:
        if not group.generates:
            return np.zeros(num)
        if group.fixed_tokens and group.max_tokens:
            return np.full(num, group.max_tokens)
        return lifetimes.spread(num, group.max_tokens, after, chance)

    def _prompt_lengths(self, told: npt.NDArray[np.integer] | None) -> npt.NDArray[np.int32]:
        """Of each place, where it isn't told one that is usual in its group."""
        lengths = np.zeros(len(self._group_of), np.int32)
        for number, group in enumerate(self._groups):
            here = np.flatnonzero(self._group_of == number)
            if not len(here):
                continue
            usual = np.full(len(here), group.mean_prompt_tokens)
            if group.prompt_quantiles:
                usual = spread_out(group.prompt_quantiles, len(here))[np.argsort(mixing(len(here)))]
            lengths[here] = np.rint(usual)
        if told is not None:
            lengths = np.where(np.asarray(told) > 0, told, lengths).astype(np.int32)
        return lengths


def _extended(
    steps: Callable[[npt.NDArray[np.intp]], Steps], places: npt.NDArray[np.intp]
) -> Steps:
    """The steps of these places; of many, from a few of them, as the middle repeats itself."""
    num = len(places)
    if num <= _MOST_SCHEDULED:
        return steps(places)
    many = places[np.linspace(0, num - 1, _MOST_SCHEDULED).astype(int)]
    few = places[np.linspace(0, num - 1, _MOST_SCHEDULED // 2).astype(int)]
    repeats = (num - len(many)) / (len(many) - len(few))
    return Steps.join(steps(many).times(1.0 + repeats), steps(few).times(-repeats))
