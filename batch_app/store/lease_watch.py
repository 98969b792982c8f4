"""Which leases have run out, judged without asking any clock for the time of day.

A holder shows that it lives by counting up its batch's heartbeats. Whoever would take the batch
over watches that count by its own monotonic clock, and believes the holder gone when the count has
stood still for as long as the lease holds. So a clock that jumps, here or on the holder's machine,
neither ends a lease early nor lets two have the same one; all it takes is that seconds are equally
long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """A batch's lease as it stands in the store. Seconds."""

    batch_id: str
    epoch: int
    heartbeats: int
    lease_s: float


class LeaseWatch:
    """What one process has seen of the leases of others. Safe to use from several threads."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic = monotonic
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, int, float]] = {}  # epoch, heartbeats, first seen at

    def run_out(self, leases: list[Lease]) -> list[Lease]:
        """Those of these leases, which are all that there are now, that have run out.

        One that is seen for the first time, or with another count than before, has not.
        """
        now = self.monotonic()
        with self._lock:
            seen, self._seen = self._seen, {}
            over = []
            for lease in leases:
                epoch, heartbeats, since = seen.get(lease.batch_id, (-1, -1, now))
                if (epoch, heartbeats) != (lease.epoch, lease.heartbeats):
                    since = now
                self._seen[lease.batch_id] = (lease.epoch, lease.heartbeats, since)
                if now - since > lease.lease_s:
                    over.append(lease)
        return over

    def saw(self, lease: Lease) -> None:
        """This lease was given, or renewed, just now."""
        now = self.monotonic()
        with self._lock:
            self._seen[lease.batch_id] = (lease.epoch, lease.heartbeats, now)
