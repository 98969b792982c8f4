"""Which answers of a server mean "again, later", and how much later. The field's usual rules."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime

#: The server has too much to do, or we asked for too much: nothing is wrong with the request.
BUSY = frozenset({429, 503, 529})
_AGAIN = frozenset({408, 409})
#: Longer is not believed.
LONGEST_RETRY_AFTER_S = 3600.0


def is_worth_another_try(status: int) -> bool:
    """Whether the same request may fare better. A redirect, which is never followed, counts as a
    server that isn't set up."""
    return status in _AGAIN or status in BUSY or status >= 500 or status // 100 in (1, 3)


def pause_s(
    attempt: int, *, first_s: float, longest_s: float, asked_s: float | None = None
) -> float:
    """Seconds to wait after this attempt (from 1) failed: twice as long each time, with jitter, and
    no shorter than the server asks for."""
    grown_s = min(first_s * 2.0 ** min(attempt - 1, 60), longest_s)
    if asked_s is not None:
        return max(asked_s, grown_s) + random.uniform(0.0, 0.25) * grown_s
    return random.uniform(0.5, 1.0) * grown_s


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """What the server asks for: `retry-after-ms`, `Retry-After` in seconds or as a date. None where
    it asks for nothing that can be understood. `headers` with names in lower case."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        with suppress(ValueError):
            seconds = float(text) * unit_s if text[:1].isdecimal() and len(text) < 20 else None
            if seconds is not None:
                return min(seconds, LONGEST_RETRY_AFTER_S)
    with suppress(ValueError, TypeError):
        seconds = (parsedate_to_datetime(headers.get("retry-after", "")) - now).total_seconds()
        return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
    return None
