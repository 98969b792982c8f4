"""A clock for what falls due: it never runs ahead of the time that has really passed.

The time of day may jump, by a hand or a time server. A jump ahead must not end a completion window
or delete a file before its time. So this clock says the time of day, but never more than the time
of its making and the seconds since. After a jump back it says the earlier time: what is due comes
late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from batch_app.core import utc_now

#: A machine without a clock of its own begins years behind, and jumps once it has asked for the
#: time. Nobody sets a running machine's clock ahead by so much for another reason.
BELIEVED = timedelta(days=30)


def seconds_since_boot() -> float:
    """Counts on while the machine sleeps, and never jumps."""
    boottime: int | None = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


class DueClock:
    """Call it for the time, aware UTC. Lives as long as its process; a new one believes the time of
    day as it finds it."""

    def __init__(
        self,
        time_of_day: Callable[[], datetime] = utc_now,
        seconds: Callable[[], float] = seconds_since_boot,
    ) -> None:
        self._time_of_day = time_of_day
        self._seconds = seconds
        self._anchor = time_of_day(), seconds()

    def __call__(self) -> datetime:
        now, seconds = self._time_of_day(), self._seconds()
        began, began_s = self._anchor
        passed = began + timedelta(seconds=seconds - began_s)
        if now - passed > BELIEVED:
            self._anchor = now, seconds
            return now
        return min(now, passed)
