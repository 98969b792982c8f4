"""When to begin with the next model: as the requests of the present one run out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from batch_app.engine.prefetch import Prefetch, local_files
from batch_app.registry import ModelEntry, ModelRegistry

#: Begin so long before the end, by the pace so far. Earlier, and others may push it out again.
AHEAD_S = 120.0
#: About as long as it takes an engine process to import its libraries.
STAND_BY_S = 30.0
LOOK_EVERY_S = 1.0


class Warmup:
    """For one group of requests, which one model runs.

    `next_model` says which model runs after it, as far as is known by now. `stand_by` starts an
    engine process for it and says whether it did.
    """

    def __init__(
        self,
        *,
        prefetch: Prefetch,
        registry: ModelRegistry,
        current: ModelEntry,
        num_requests: int,
        next_model: Callable[[], str | None],
        say: Callable[[str], None],
        stand_by: Callable[[ModelEntry], bool] = lambda _: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefetch = prefetch
        self._registry = registry
        self._current = current
        self._left = num_requests
        self._next_model = next_model
        self._say = say
        self._stand_by = stand_by
        self._clock = clock
        self._done = 0
        self._first_at: float | None = None
        self._look_at = 0.0
        self._begun: Path | None = None

    def delivered(self, num_requests: int) -> None:
        """So many more have finished. Costs nothing but a look once a second."""
        now = self._clock()
        self._done += num_requests
        self._left -= num_requests
        if self._first_at is None:
            self._first_at = now
            self._look_at = now + LOOK_EVERY_S
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        pace = self._done / (now - self._first_at)
        if self._left <= pace * AHEAD_S:
            self._look(seconds_left=self._left / pace if pace else 0.0)

    def _look(self, *, seconds_left: float) -> None:
        name = self._next_model()
        if name is None or not self._registry.knows(name):
            return
        entry = self._registry.get(name)
        if entry == self._current:
            return
        if seconds_left <= STAND_BY_S and self._stand_by(entry):
            self._say(f"Starting an engine process for {entry.name} ahead, which runs next.")
        folder = local_files(entry)
        if folder is None or folder == self._begun:
            return
        self._begun = folder
        num_bytes = self._prefetch.start(folder)
        if num_bytes:
            self._say(
                f"Reading the weights of {entry.name} ahead, which runs next "
                f"({num_bytes / 1e9:,.1f} GB)."
            )
