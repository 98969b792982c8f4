"""Figures as a person reads them."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

from batch_app.batch_log import failed_and_truncated
from batch_app.client import Batch, Estimate
from batch_app.core import utc_now

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`: two units, the lower one only where it matters."""
    left = max(round(seconds), 1)
    for (size, name), (smaller, smaller_name) in pairwise(_UNITS):
        if left >= size:
            count, rest = divmod(left, size)
            rest //= smaller
            more = f" {rest} {smaller_name}" if rest and count < 10 else ""
            return f"{count} {name}{more}"
    return f"{left} s"


def ago(moment: datetime, now: datetime | None = None) -> str:
    seconds = ((now or utc_now()) - moment).total_seconds()
    if seconds < 2:
        return "now"
    count, unit, *_ = duration(seconds).split(" ")
    return f"{count} {unit} ago"


def pause_text(batch: Batch, now: datetime | None = None) -> str:
    """Why a batch is paused and when it is tried again; empty if it isn't."""
    paused = batch.paused
    if paused is None:
        return batch.pause_reason or ""
    text = f"{paused.reason} (waits for: {paused.kind}"
    if paused.retry_at is not None:
        left_s = (paused.retry_at - (now or utc_now())).total_seconds()
        text += f"; next try in {duration(left_s)}" if left_s > 1 else "; next try now"
    return f"{text})"


def plural(number: int, one: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def span(estimate: Estimate) -> str:
    """`12 min`, with the range where the server knows one."""
    text = duration(estimate.duration_s)
    if estimate.low_s is not None and estimate.high_s is not None:
        low, high = duration(estimate.low_s), duration(estimate.high_s)
        if low != high:
            text += f" ({low} to {high})"
    return text


def seconds_left(batch: Batch, now: datetime | None = None) -> float | None:
    """By the server's estimate, else by the batch's own pace so far; None where neither is."""
    now = now or utc_now()
    if batch.is_finished:
        return None
    if batch.estimate is not None and batch.estimate.completion_at is not None:
        left_s = (batch.estimate.completion_at - now).total_seconds()
        if left_s > 0:
            return left_s
    if batch.started_at is None or not batch.progress.done:
        return None
    took_s = (now - batch.started_at).total_seconds()
    return took_s * (batch.progress.total - batch.progress.done) / batch.progress.done


def share(batch: Batch) -> str:
    """`340 of 1,000 done (34.0%), 2 failed, 12 cut off at max_tokens`."""
    progress = batch.progress
    done = f"{progress.done:,} of {progress.total:,} done ({progress.percent:.1f}%)"
    return done + failed_and_truncated(progress.failed, progress.truncated)


def ending(batch: Batch) -> str:
    """How a batch ended, in a line."""
    progress = batch.progress
    took = ""
    if batch.started_at and batch.ended_at:
        took = f" in {duration((batch.ended_at - batch.started_at).total_seconds())}"
    more = failed_and_truncated(progress.failed, progress.truncated)
    reason = f": {batch.error_message}" if batch.error_message else ""
    if batch.status != "completed":
        return f"❌ {batch.id} {batch.status}{reason} ({progress.completed:,} answered{more})"
    mark = "⚠️ " if progress.failed else "✅"
    return f"{mark} {batch.id} completed{took}: {progress.completed:,} answered{more}"
