"""The forecast of a run while it runs: what is left, sharpened by what is seen. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from batch_app.forecast.forecast import Forecaster
from batch_app.forecast.measurement import Reading
from batch_app.forecast.workload import Workload


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
        group_of: npt.NDArray[Any] | None = None,
        prompt_tokens: npt.NDArray[Any] | None = None,
    ) -> None:
        """
        Args:
            forecaster: None, or one that knows nothing: then the run itself is all there is.
            group_of: for each place in the order the request's group, shape (n,); None: the
                groups of the workload one after the other.
            prompt_tokens: for each place, where they are known.
        """
        self._num = workload.num_requests
        self._done = 0
        self._began_s: float | None = None
        self._now_s = 0.0

    def finish(
        self, place: int, output_tokens: int, prompt_tokens: int, cached_tokens: int
    ) -> None:
        """This request was answered (also with an error)."""
        self._done += 1

    def read(self, reading: Reading) -> None:
        """What the engine says now; every second or so, after the `finish`es up to then."""
        if self._began_s is None:
            self._began_s = reading.at_s
        self._now_s = reading.at_s

    def reset(self) -> None:
        """The engine was started anew: counters begin at 0, what was in flight runs again."""

    def remaining(self) -> Remaining | None:
        """As of the last reading; costs some milliseconds. None while nothing can be said."""
        if self._began_s is None or not self._done:
            return None
        left_s = (self._now_s - self._began_s) * (self._num - self._done) / self._done
        return Remaining(left_s, 0.8 * left_s, 1.25 * left_s)
