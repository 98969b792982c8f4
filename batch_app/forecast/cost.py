"""The cost model: seconds of steps, fitted on what was measured. Pure.

A step reads memory (the weights, the context's keys and values) while it computes (a token for each
running request, the prompt tokens of its share of prefill); it takes about as long as the longer of
the two, less sharply the more they get in each other's way:

    t = ((step + context·K)^p + (running·R + prefill·P + attended·A)^p)^(1/p) + started·N

All coefficients are positive and known to an order of magnitude, so their logarithms are fitted,
with a normal prior around the roofline's: what few runs can't tell apart stays where it is usual.
Every run has a pace of its own within a few percent, every other version, machine or argument one
within much more.

Source: Williams, Waterman and Patterson, "Roofline", 2009, for the two sides; Bishop, "Pattern
Recognition and Machine Learning", 2006, section 4.4, for the normal approximation of the posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from batch_app.forecast.roofline import TYPICAL, Coefficients
from batch_app.forecast.schedule import Steps

Numbers = npt.NDArray[np.float64]

NUM_COEFFICIENTS = 6
#: Of logarithms: how far a coefficient tends to be from the prior's proportions,
_OWN_SIGMA = np.array([0.8, 1.0, 0.7, 1.0, 1.2, 1.2])
#: and all of them together, with a roofline or without any idea.
_LEVEL_SIGMA_ROOFLINE, _LEVEL_SIGMA_UNKNOWN = 0.45, 30.0
#: log(p - 1): p is 2 or so.
_SHARPNESS, _SHARPNESS_SIGMA = 0.0, 0.7
#: Of a run: how far its pace, and its time as the schedule has it, may be off by chance.
RUN_SIGMA, SCHEDULE_SIGMA = 0.035, 0.04
#: Of the steps of one kind within a run.
_STEPS_SIGMA = 0.06
#: What the spread is thought to be before any run was forecast from others.
_SPREAD_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class ObservedRun:
    """A run to fit on.

    `steps`: its steps as the schedule has them, `seconds` what they took. `bins` and `bin_seconds`:
    the same as observed, in parts, where there is such a thing; a row of `bins` is the whole part.
    `setting_sigma`: how far, as a standard deviation of the logarithm, its machine, version and
    arguments may put it off; `setting` numbers those that share them. Robustly, a run far off what
    all others say counts less.
    """

    steps: Steps
    seconds: float
    bins: Steps | None = None
    bin_seconds: Numbers | None = None
    setting: int = 0
    setting_sigma: float = 0.0


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds: the median, and the standard deviation of the logarithm."""

    seconds: float
    sigma: float


class CostModel:
    """Fitted coefficients, and how sure they are."""

    def __init__(
        self, runs: Sequence[ObservedRun], prior: Coefficients | None = None, *, check: bool = True
    ) -> None:
        """`prior`: from a roofline; None where there is none. `check`: find the spread by
        forecasting each run from the others."""
        self._runs = tuple(runs)
        self._start = np.log(np.array(astuple(prior or TYPICAL)))
        self._level_sigma = _LEVEL_SIGMA_UNKNOWN if prior is None else _LEVEL_SIGMA_ROOFLINE
        self.is_fitted = bool(self._runs)
        self._precision = self._prior_precision()
        self._mode, self._covariance = self._fit(self._runs, None)
        #: Logarithm: by how much runs take longer than the schedule says that they have steps.
        self.bias = self._schedule_bias(self._runs, self._mode)
        self.inflation = self._checked() if check else 1.0

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients(*np.exp(self._mode[:NUM_COEFFICIENTS]).tolist())

    def time(self, steps: Steps) -> Time:
        """How long these steps take."""
        seconds, gradient = self._total(self._mode, steps)
        variance = float(gradient @ self._covariance @ gradient)
        spread = variance + RUN_SIGMA**2 + SCHEDULE_SIGMA**2
        return Time(float(seconds * np.exp(self.bias)), float((spread * self.inflation) ** 0.5))

    def scheduled_s(self, steps: Steps) -> float:
        """The median of `time`."""
        return float(self.seconds(steps) * np.exp(self.bias))

    def seconds(self, steps: Steps) -> float:
        """How long steps take that were observed, not scheduled."""
        return float((steps.count * step_seconds(self._mode, steps)).sum())

    # -- fitting -------------------------------------------------------------------------------

    def _prior_precision(self) -> Numbers:
        covariance = np.diag(np.append(_OWN_SIGMA, _SHARPNESS_SIGMA) ** 2)
        covariance[:NUM_COEFFICIENTS, :NUM_COEFFICIENTS] += self._level_sigma**2
        return _inverse(covariance)

    def _total(self, theta: Numbers, steps: Steps) -> tuple[float, Numbers]:
        """Seconds of all steps, and the derivatives of their logarithm."""
        each, slopes = _step_seconds_and_slopes(theta, steps)
        total = float((steps.count * each).sum())
        if total <= 0:
            return 0.0, np.zeros(len(theta))
        return total, (slopes * steps.count).sum(axis=1) / total

    def _fit(
        self, runs: Sequence[ObservedRun], start: Numbers | None, rounds: int = 30
    ) -> tuple[Numbers, Numbers]:
        """The mode of the posterior, and its covariance, by Gauss and Newton's steps.

        The paces of runs and settings are integrated out: they make residuals hang together.
        """
        prior = np.append(self._start, _SHARPNESS)
        theta = prior.copy() if start is None else start.copy()
        if start is None and runs:
            ratios = [np.log(run.seconds / self._total(theta, run.steps)[0]) for run in runs]
            theta[:NUM_COEFFICIENTS] += float(np.median(ratios))
        if not runs:
            return theta, _inverse(self._precision)
        covariances = _covariances(runs)
        damping = 1e-3
        cost, hessian, gradient = self._posterior(theta, prior, runs, covariances)
        for _ in range(rounds):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            step = np.clip(step, -1.5, 1.5)
            trial = self._posterior(theta + step, prior, runs, covariances)
            if trial[0] <= cost:
                done = cost - trial[0] < 1e-6
                theta = theta + step
                cost, hessian, gradient = trial
                damping = max(damping / 4, 1e-9)
                if done:
                    break
            else:
                damping *= 8
                if damping > 1e8:
                    break
        return theta, _inverse(hessian)

    def _posterior(
        self,
        theta: Numbers,
        prior: Numbers,
        runs: Sequence[ObservedRun],
        covariances: dict[int, tuple[Numbers, list[int]]],
    ) -> tuple[float, Numbers, Numbers]:
        apart = theta - prior
        cost = 0.5 * float(apart @ self._precision @ apart)
        hessian = self._precision.copy()
        gradient = self._precision @ apart
        for precision, members in covariances.values():
            residuals, slopes = [], []
            for place in members:
                rows, derivatives = self._residuals(theta, runs[place])
                residuals.append(rows)
                slopes.append(derivatives)
            rows, jacobian = np.concatenate(residuals), np.concatenate(slopes)
            weighted = precision @ rows
            distance = float(rows @ weighted)
            # Student's t instead of a normal: what is far off pulls less.
            degrees = 6.0 * len(members) + len(rows)
            factor = (degrees + len(rows)) / (degrees + distance)
            cost += 0.5 * (degrees + len(rows)) * float(np.log1p(distance / degrees))
            hessian += factor * jacobian.T @ precision @ jacobian
            gradient += factor * jacobian.T @ weighted
        return cost, hessian, gradient

    def _residuals(self, theta: Numbers, run: ObservedRun) -> tuple[Numbers, Numbers]:
        """Logarithms of predicted over observed, the whole run first, and their derivatives."""
        whole, slope = self._total(theta, run.steps)
        rows, slopes = [np.log(whole / run.seconds)], [slope]
        if run.bins is None or run.bin_seconds is None:
            return np.array(rows), np.array(slopes)
        each, parts = _step_seconds_and_slopes(theta, run.bins)
        residual = np.log(each * run.bins.count / run.bin_seconds)
        return np.append(rows, residual), np.vstack((slope[None, :], (parts / each).T))

    def _schedule_bias(self, runs: Sequence[ObservedRun], mode: Numbers) -> float:
        """What the schedule is usually off by: whole runs beside their observed steps."""
        apart = [
            float(np.log(run.seconds / self._total(mode, run.steps)[0]))
            for run in runs
            if run.setting_sigma == 0.0 and run.bins is not None
        ]
        few = (RUN_SIGMA / SCHEDULE_SIGMA) ** 2 + 1.0
        return float(np.median(apart)) * len(apart) / (len(apart) + few) if apart else 0.0

    def _checked(self) -> float:
        """By how much the spread is larger than it should be, from runs forecast by others."""
        own = [place for place, run in enumerate(self._runs) if run.setting_sigma == 0.0]
        if len(own) < 2:
            return 1.0
        squares = _SPREAD_WEIGHT
        for place in own[:12]:
            others = [run for other, run in enumerate(self._runs) if other != place]
            mode, covariance = self._fit(others, self._mode, rounds=6)
            run = self._runs[place]
            seconds, slope = self._total(mode, run.steps)
            variance = float(slope @ covariance @ slope) + RUN_SIGMA**2 + SCHEDULE_SIGMA**2
            error = float(np.log(seconds / run.seconds)) + self._schedule_bias(others, mode)
            squares += min(error**2 / variance, 9.0)
        return squares / (_SPREAD_WEIGHT + min(len(own), 12))


def _inverse(matrix: Numbers) -> Numbers:
    return np.asarray(np.linalg.inv(matrix), np.float64)


def step_seconds(theta: Numbers, steps: Steps) -> Numbers:
    """Seconds of one step of each kind, shape (k,). `theta`: log coefficients, and log(p - 1)."""
    return _step_seconds_and_slopes(theta, steps)[0]


def _step_seconds_and_slopes(theta: Numbers, steps: Steps) -> tuple[Numbers, Numbers]:
    """The same, and the derivatives by each of `theta`, shape (7, k)."""
    step, running, prefill, context, attended, started = np.exp(theta[:NUM_COEFFICIENTS])
    power = 1.0 + float(np.exp(theta[NUM_COEFFICIENTS]))
    parts = (running * steps.running, prefill * steps.prefill, attended * steps.attended)
    memory = step + context * steps.context
    compute = np.maximum(parts[0] + parts[1] + parts[2], 1e-12)
    larger = np.maximum(memory, compute)
    m, c = (memory / larger) ** power, (compute / larger) ** power
    inner = larger * (m + c) ** (1.0 / power)
    by_memory = inner * m / (m + c) / memory
    by_compute = inner * c / (m + c) / compute
    log_m, log_c = np.log(memory / larger), np.log(compute / larger)
    by_power = inner * ((m * log_m + c * log_c) / (m + c) / power - np.log(m + c) / power**2)
    slopes = np.array(
        [
            by_memory * step,
            by_compute * parts[0],
            by_compute * parts[1],
            by_memory * context * steps.context,
            by_compute * parts[2],
            started * steps.started,
            by_power * (power - 1.0),
        ]
    )
    return inner + started * steps.started, slopes


def _covariances(runs: Sequence[ObservedRun]) -> dict[int, tuple[Numbers, list[int]]]:
    """For each setting the precision of its residuals, all runs of it one after the other."""
    found: dict[int, tuple[Numbers, list[int]]] = {}
    settings: dict[int, list[int]] = {}
    for place, run in enumerate(runs):
        # The runs of the setting itself need no common term, each stands for itself.
        key = -1 - place if run.setting_sigma == 0.0 else run.setting
        settings.setdefault(key, []).append(place)
    for key, members in settings.items():
        blocks = []
        for place in members:
            run = runs[place]
            size = 1
            own = [SCHEDULE_SIGMA**2]
            if run.bins is not None and run.bin_seconds is not None:
                share = run.bin_seconds / run.bin_seconds.sum()
                own += (_STEPS_SIGMA**2 + 0.01**2 / share).tolist()
                size += len(share)
            blocks.append((size, np.array(own)))
        total = sum(size for size, _ in blocks)
        covariance = np.full((total, total), runs[members[0]].setting_sigma ** 2)
        begin = 0
        for size, own_variances in blocks:
            here = slice(begin, begin + size)
            covariance[here, here] += RUN_SIGMA**2 + np.diag(own_variances)
            begin += size
        found[key] = (_inverse(covariance), members)
    return found
