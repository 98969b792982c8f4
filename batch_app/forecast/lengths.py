"""Lengths: how many output tokens requests will take, from what earlier ones took. Pure.

An answer that ended at its limit, or hasn't ended yet, says only that its natural length is longer:
a censored observation. The product-limit estimator takes it for just that.

Source: Kaplan and Meier, "Nonparametric Estimation from Incomplete Observations", 1958; Wilson and
Hilferty, "The Distribution of Chi-Square", 1931.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_app.forecast.measurement import MeasuredGroup, Measurement
from batch_app.forecast.workload import RequestGroup, spread_out

Numbers = npt.NDArray[np.float64]

_ENOUGH_FOR_MEAN = 8
#: Points that stand for one measured group.
_POINTS = 48
#: Where nothing is known of a model's answers: median and spread of their natural length.
_UNKNOWN_MEDIAN, _UNKNOWN_SIGMA = 180.0, 1.0
#: Of a record that knows only the mean.
_SIGMA_OF_MEAN = 0.25
#: How far apart, as a standard deviation of the logarithm, two batches' mean lengths tend to be.
BETWEEN_BATCHES = 0.45
_BETWEEN_WEIGHT = 3.0
_UNKNOWN_BETWEEN = 0.7
_MOST_CHECKED = 12
#: How near, in octaves, two prompts' lengths are that get answers of similar length.
_PROMPT_OCTAVES = 0.5


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """A distribution of natural lengths: `values` ascending with their `shares`, sum 1."""

    values: Numbers
    shares: Numbers

    def spread(
        self, num: int, limit: float | None, after: Numbers | None = None, chance: float = 0.0
    ) -> Numbers:
        """`num` lengths in order of size, none above `limit`, evenly over the distribution.

        `after`, shape (num,): each is longer than this; then they are in the order of `after`.
        `chance`: by so many standard deviations longer than usual, as chance has it: the longest of
        few may have about any length, that in the middle of many hardly any other.
        """
        levels = (np.arange(num) + 0.5) / max(num, 1)
        if chance:
            # The shares of those at least as long are gamma distributed: its quantiles, by Wilson
            # and Hilferty's cube. Beside the longest, they go only in part the same way.
            above = np.arange(num, 0, -1.0)
            alike = chance * (1.0 + above**-0.5) / 2
            shares = above * (1.0 - 1.0 / (9.0 * above) - alike / (3.0 * above**0.5)) ** 3
            levels = 1.0 - np.minimum(shares / num, 1.0)
        upto = np.cumsum(self.shares)
        if after is not None:
            # What is left of the distribution beyond; mixed so that sizes don't follow places.
            levels = levels[np.argsort(mixing(num))]
            before = np.interp(after, self.values, upto, left=0.0)
            levels = before + (1.0 - before) * levels
        lengths = np.interp(levels, upto - self.shares / 2, self.values)
        if after is None and num >= _ENOUGH_FOR_MEAN and not chance:
            # A few points of a distribution must not change its mean.
            mean = float((lengths if limit is None else np.minimum(lengths, limit)).mean())
            lengths = lengths * min(max(self.mean(limit) / max(mean, 1e-9), 0.8), 1.25)
        if after is not None:
            # Beyond the longest that was seen: it goes on for as long as is usual there.
            lengths = np.where(lengths <= after, after * 1.15 + 1.0, lengths)
        return lengths if limit is None else np.minimum(lengths, limit)

    def mean(self, limit: float | None) -> float:
        cut = self.values if limit is None else np.minimum(self.values, limit)
        return float((cut * self.shares).sum())


def mixing(num: int) -> Numbers:
    """A fixed order without pattern: keys to sort by, shape (num,), evenly within 0 to 1."""
    golden: Numbers = (np.arange(1, num + 1, dtype=np.float64) * 0.6180339887498949) % 1.0
    return golden


def octaves(prompts: npt.NDArray[np.floating] | Numbers) -> npt.NDArray[np.int64]:
    """Of each prompt the octave its length is in, rare ones put to their neighbours."""
    found: npt.NDArray[np.int64] = np.rint(np.log2(np.maximum(prompts, 1.0))).astype(np.int64)
    if not len(found):
        return found
    kinds, counts = np.unique(found, return_counts=True)
    common = kinds[counts >= min(0.04 * len(found), counts.max())]
    nearest = {kind: common[np.abs(common - kind).argmin()] for kind in kinds.tolist()}
    for kind, other in nearest.items():
        found[found == kind] = other
    return found


def product_limit(lengths: Numbers, weights: Numbers, ended: npt.NDArray[np.bool_]) -> Lifetimes:
    """The distribution of lengths of which those not `ended` are only known to be longer.

    What remains beyond the longest one is put there half as long again.
    """
    order = np.lexsort((~ended, lengths))
    lengths, weights, ended = lengths[order], weights[order], ended[order]
    at_risk = np.cumsum(weights[::-1])[::-1]
    hazard = np.where(ended, weights / np.maximum(at_risk, 1e-12), 0.0)
    survival = np.cumprod(1.0 - np.minimum(hazard, 1.0))
    before = np.concatenate(([1.0], survival[:-1]))
    shares = before - survival
    rest = float(survival[-1]) if len(survival) else 1.0
    values = lengths[ended]
    shares = shares[ended]
    if rest > 1e-9:
        longest = float(lengths[-1]) if len(lengths) else 1.0
        # Longer ones in three steps, as an exponential tail would have them.
        values = np.concatenate((values, longest * np.array([1.15, 1.6, 2.6])))
        shares = np.concatenate((shares, rest * np.array([0.4, 0.35, 0.25])))
    return Lifetimes(values, shares / shares.sum())


def _lognormal(median: float, sigma: float) -> Numbers:
    levels = (np.arange(_POINTS) + 0.5) / _POINTS
    # The normal quantile, by its rational approximation: good to 0.005.
    # Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.2.22.
    tail = np.sqrt(-2.0 * np.log(np.minimum(levels, 1.0 - levels)))
    normal = tail - (2.30753 + 0.27061 * tail) / (1.0 + 0.99229 * tail + 0.04481 * tail**2)
    return median * np.exp(sigma * np.where(levels < 0.5, -normal, normal))


class LengthModel:
    """Output lengths by endpoint, limit and length of the prompt, from earlier runs."""

    def __init__(self, measurements: Iterable[tuple[Measurement, float]]) -> None:
        """With each its weight: 1 for a full one, less for an older or a foreign one."""
        batches = [_batch(one, weight) for one, weight in measurements]
        self._batches = [batch for batch in batches if batch]
        self._kept: dict[tuple[str, float | None, int], Lifetimes] = {}
        self.spread = self._spread_between()

    @property
    def is_known(self) -> bool:
        """Whether there is any earlier answer."""
        return bool(self._batches)

    def of(self, group: RequestGroup) -> Lifetimes:
        """The natural lengths that are expected of this group's requests."""
        return _lifetimes(self._batches, _asked(group))

    def at(self, endpoint: str, max_tokens: float | None, octave: int) -> Lifetimes:
        """The same for prompts of about 2^octave tokens."""
        key = (endpoint, max_tokens, octave)
        known = self._kept.get(key)
        if known is None:
            asked = _Asked(endpoint, max_tokens, np.array([float(octave)]))
            known = self._kept[key] = _lifetimes(self._batches, asked)
        return known

    def error(self, group: RequestGroup) -> float:
        """Standard deviation of the logarithm of this group's mean length."""
        if group.fixed_tokens or not group.generates:
            return 0.0
        natural = self.of(group)
        mean = natural.mean(group.max_tokens)
        # What the limit cuts can't be longer: a change of all lengths changes the mean by less.
        longer = Lifetimes(natural.values * math.exp(self.spread), natural.shares)
        return abs(math.log(max(longer.mean(group.max_tokens), 1e-9) / max(mean, 1e-9)))

    def _spread_between(self) -> float:
        """How far a batch's lengths tend to be from what the others let expect.

        Standard deviation of the logarithm of a mean, with a usual value as a prior.
        """
        if not self._batches:
            return _UNKNOWN_BETWEEN
        squares, weight = _BETWEEN_WEIGHT * BETWEEN_BATCHES**2, _BETWEEN_WEIGHT
        if len(self._batches) > 1:
            for place, batch in enumerate(self._batches[:_MOST_CHECKED]):
                others = self._batches[:place] + self._batches[place + 1 :]
                actual = expected = 0.0
                for group in batch:
                    if group.num_cut > 0.2 * group.num:
                        continue  # its limit made it
                    actual += group.num * group.mean
                    likely = _lifetimes(others, group.asked)
                    expected += group.num * likely.mean(group.limit)
                if actual > 0 and expected > 0:
                    squares += batch[0].weight * min(math.log(expected / actual) ** 2, 1.0)
                    weight += batch[0].weight
        return math.sqrt(squares / weight)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is known of requests before they are answered. `prompts`: log2 of some of them."""

    endpoint: str
    limit: float | None
    prompts: Numbers


@dataclass(frozen=True, slots=True)
class _Answered:
    """A measured group: its points, which of them ended by themselves, and what it counts."""

    asked: _Asked
    values: Numbers
    ended: npt.NDArray[np.bool_]
    num: int
    mean: float
    num_cut: int
    weight: float

    @property
    def limit(self) -> float | None:
        return self.asked.limit


def _asked(group: RequestGroup) -> _Asked:
    prompts = np.array([group.mean_prompt_tokens])
    if group.prompt_quantiles:
        prompts = spread_out(group.prompt_quantiles, 24)
    return _Asked(group.endpoint, group.max_tokens, np.log2(np.maximum(prompts, 1.0)))


def _batch(one: Measurement, weight: float) -> list[_Answered]:
    """The groups of a run that say something of natural lengths."""
    mean = one.output_tokens / max(one.num_requests, 1)
    prompt = one.prompt_tokens / max(one.num_requests, 1)
    groups = one.groups or (
        MeasuredGroup("", None, one.num_requests, mean, one.output_quantiles, prompt),
    )
    found = []
    for group in groups:
        if not group.num_requests or group.mean_output_tokens <= 0:
            continue
        alike = [
            other
            for other in groups
            if other.endpoint == group.endpoint and other.max_tokens == group.max_tokens
        ]
        num_cut = sum(other.num_cut for other in alike)
        if num_cut > 0.97 * sum(other.num_requests for other in alike):
            continue  # told to take all of the limit, or a limit that says nothing
        values, ended = _points(group)
        length = np.array([math.log2(max(group.mean_prompt_tokens or prompt, 1.0))])
        asked = _Asked(group.endpoint, group.max_tokens, length)
        found.append(
            _Answered(
                asked,
                values,
                ended,
                group.num_requests,
                group.mean_output_tokens,
                group.num_cut,
                weight,
            )
        )
    return found


def _lifetimes(batches: Sequence[list[_Answered]], asked: _Asked) -> Lifetimes:
    """Natural lengths for what is asked, from groups as much as they are like it."""
    groups = [group for batch in batches for group in batch]
    if not groups:
        values = _lognormal(_UNKNOWN_MEDIAN, _UNKNOWN_SIGMA)
        return Lifetimes(values, np.full(len(values), 1.0 / len(values)))
    likeness = np.array([_likeness(asked, group) for group in groups])
    lengths = np.array([group.asked.prompts[0] for group in groups])
    apart = (asked.prompts[:, None] - lengths[None, :]) / _PROMPT_OCTAVES
    near = likeness * (np.exp(-0.5 * apart**2) + 0.02)
    # Each length of prompt that is asked for counts the same, however often it was measured.
    shares = (near / near.sum(axis=1, keepdims=True)).mean(axis=0)
    return product_limit(
        np.concatenate([group.values for group in groups]),
        np.concatenate(
            [
                np.full(len(group.values), share / len(group.values))
                for group, share in zip(groups, shares, strict=True)
            ]
        ),
        np.concatenate([group.ended for group in groups]),
    )


def _points(group: MeasuredGroup) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Lengths that stand for the group, and which of them ended by themselves."""
    if group.output_quantiles:
        values = spread_out(group.output_quantiles, _POINTS)
    elif group.num_requests == 1:
        values = np.array([group.mean_output_tokens])
    else:
        values = _lognormal(1.0, _SIGMA_OF_MEAN)
        values = values * (group.mean_output_tokens / float(values.mean()))
    ended = np.ones(len(values), bool)
    cut = round(len(values) * group.num_cut / group.num_requests)
    if cut:
        ended[-cut:] = False
    return values, ended


def _likeness(asked: _Asked, group: _Answered) -> float:
    """How much a measured group says of this one: 1 for the same endpoint and limit."""
    theirs = group.asked
    same = 1.0 if theirs.endpoint in ("", asked.endpoint) else 0.05
    if asked.limit is None or theirs.limit is None:
        apart = 0.0 if asked.limit == theirs.limit else 0.7
    else:
        apart = abs(math.log(asked.limit / theirs.limit))
    size = group.num / (group.num + 20.0)
    return group.weight * same * size / (1.0 + (apart / 0.7) ** 2)
