"""Which paused batches are to be tried again, as one worker sees it.

A pause ends at its time, by this machine's clock or after as many seconds as it was meant to have,
so that a clock that jumps back prolongs none. One that waits for a model's registry entry ends as
soon as that says something else, and for a worker that was started since: what is in its
environment may have changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from batch_app.core import PAUSES_OF_A_MODEL, Paused, Waiting

#: How soon a change of the registry file is noticed.
LOOK_AT_ENTRIES_S = 2.0


class PauseWatch:
    """Of one worker. One thread. `entry_of`: the fingerprint of a model's registry entry, empty
    where there is none. `clock` in seconds, of any clock that never goes back."""

    def __init__(
        self,
        started_at: datetime,
        entry_of: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._started_at = started_at
        self._entry_of = entry_of
        self._clock = clock
        self._seen: dict[tuple[str, datetime], float] = {}
        #: Seconds until the next look may find more; None: nothing is paused.
        self.next_look_s: float | None = None

    def ready(self, waiting: Sequence[Waiting], now: datetime) -> list[Waiting]:
        """Those that are not paused, or no longer. One that was never tried waits with the paused
        ones of its model where it would only meet the same."""
        seen, self._seen, self.next_look_s = self._seen, {}, None
        entries: dict[str, str] = {}
        paused_models = set()
        ready = []
        for one in waiting:
            if one.paused is None:
                ready.append(one)
                continue
            key = one.batch_id, one.paused.since
            self._seen[key] = seen.get(key, self._clock())
            if self._is_over(one.paused, self._seen[key], now, entries):
                ready.append(one)
            elif one.paused.kind in PAUSES_OF_A_MODEL:
                paused_models.add(one.paused.model)
        return [one for one in ready if one.paused or one.begun or one.model not in paused_models]

    def _is_over(
        self, paused: Paused, first_seen: float, now: datetime, entries: dict[str, str]
    ) -> bool:
        if paused.entry is not None:
            entry = entries.get(paused.model)
            if entry is None:
                entry = entries[paused.model] = self._entry_of(paused.model)
            if entry != paused.entry:
                return True
            self._look_again_in(LOOK_AT_ENTRIES_S)
        if paused.retry_at is None:
            return paused.since < self._started_at
        length_s = (paused.retry_at - paused.since).total_seconds()
        left_s = min((paused.retry_at - now).total_seconds(), first_seen + length_s - self._clock())
        if left_s <= 0:
            return True
        self._look_again_in(left_s)
        return False

    def _look_again_in(self, seconds: float) -> None:
        if self.next_look_s is None or seconds < self.next_look_s:
            self.next_look_s = seconds
