"""How numbers and times are written on the pages. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def count(number: float) -> str:
    """`12,345`."""
    return f"{round(number):,}"


def rate(per_s: float) -> str:
    """`12,345`, `0.27`: with decimals where they tell something."""
    return count(per_s) if per_s >= 100 else f"{per_s:.2f}"


def span(seconds: float) -> str:
    """A mark on an axis of time: `0`, `0.5 s`, `2 min`."""
    if seconds == 0:
        return "0"
    return f"{seconds:g} s" if seconds < 2 * _MINUTE else duration(seconds)


def size(num_bytes: float) -> str:
    """`17.3 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """`4 s`, `12 min`, `3 h 20 min`, `2 d 4 h`: two units at most."""
    seconds = max(seconds, 0.0)
    if seconds < 1:
        return "under 1 s"
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < _DAY:
        minutes = round(seconds / _MINUTE)
        hours, rest = divmod(minutes, 60)
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    hours = round(seconds / _HOUR)
    days, rest = divmod(hours, 24)
    return f"{days} d {rest} h" if rest else f"{days} d"


def between(low_s: float, high_s: float) -> str:
    """`9 to 14 min`; one of them where they read alike."""
    low, high = duration(low_s), duration(high_s)
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    if unit and unit == high.partition(" ")[2]:
        return f"{number} to {high}"
    return f"{low} to {high}"


def moment(at: datetime) -> str:
    """`2026-01-31 14:05 UTC`; the script writes it in the reader's own zone."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def iso(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `3rd`, `11th`."""
    ending = "th"
    if number % 100 not in (11, 12, 13):
        ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 batch`, `2 batches`: with `many` where an s won't do."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
