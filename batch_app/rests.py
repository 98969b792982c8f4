"""Batches that a worker leaves alone for a while, because the server of their model doesn't work.

The queue goes on with others meanwhile. Each rest is twice as long as the one before, up to a
minute, or as long as the server asks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batch_app.core import Waiting
from batch_app.engine.retries import LONGEST_RETRY_AFTER_S

FIRST_S, LONGEST_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class _Rest:
    until: float
    length_s: float


class Rests:
    """Of one worker. One thread. `clock` in seconds, of any clock that never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests: dict[str, _Rest] = {}  # by batch, and by model

    def begin(self, batch_id: str, model: str, retry_after_s: float = 0.0) -> float:
        """This batch rests, and all that begin with this model. Returns for how many seconds."""
        now = self._clock()
        self._rests = {name: rest for name, rest in self._rests.items() if now < _forgotten(rest)}
        before = max(
            (self._rests[n].length_s for n in (batch_id, model) if n in self._rests), default=0.0
        )
        length_s = min(max(2 * before, FIRST_S), LONGEST_S)
        rest_s = max(length_s, min(retry_after_s, LONGEST_RETRY_AFTER_S))
        self._rests[batch_id] = self._rests[model] = _Rest(now + rest_s, length_s)
        return rest_s

    def awake(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Those that don't rest."""
        now = self._clock()
        resting = {name for name, rest in self._rests.items() if now < rest.until}
        return [one for one in waiting if not resting & {one.batch_id, one.model}]


def _forgotten(rest: _Rest) -> float:
    """When it was so long ago that the next rest is a first one again."""
    return rest.until + LONGEST_S
