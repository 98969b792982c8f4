"""What the pages show of a batch: words and numbers ready to be printed. Pure.

The same view goes into the page and into its events, so that both always say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise

from batch_app.batch_log import truncated_text
from batch_app.core import Batch, BatchStatus, Paused, Sample, Waiting
from batch_app.dashboard.formats import between, count, duration, iso, ordinal, plural
from batch_app.estimates import Estimate
from batch_app.retry import can_be_retried
from batch_app.store import WorkerRow
from batch_app.wire.native import STATUS_NAMES, percent, results_url

#: What a state is called on the pages.
LABELS: Mapping[BatchStatus, str] = {
    BatchStatus.VALIDATING: "Checking",
    BatchStatus.QUEUED: "Waiting",
    BatchStatus.RUNNING: "Running",
    BatchStatus.FINALIZING: "Publishing",
    BatchStatus.CANCELLING: "Cancelling",
    BatchStatus.COMPLETED: "Completed",
    BatchStatus.FAILED: "Failed",
    BatchStatus.EXPIRED: "Expired",
    BatchStatus.CANCELLED: "Cancelled",
}
#: Seconds over which the present speed is averaged.
SPEED_OVER_S = 15.0
NO_WORKER = "No worker is running. Start one: ./start_worker.sh"


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers that show signs of life."""

    alive: tuple[WorkerRow, ...] = ()

    @classmethod
    def of(cls, workers: Sequence[WorkerRow], heartbeat_s: float, now: datetime) -> Crew:
        return cls(tuple(worker for worker in workers if worker.is_alive(now, heartbeat_s)))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are loaded, each once."""
        return tuple(dict.fromkeys(worker.model for worker in self.alive if worker.model))

    @property
    def text(self) -> str:
        if not self.alive:
            return "No worker"
        working = sum(worker.state == "working" for worker in self.alive)
        num = len(self.alive)
        if num == 1:
            return "Worker busy" if working else "Worker idle"
        return f"{working:,} of {num:,} workers busy"


@dataclass(frozen=True, slots=True)
class Line:
    """The batches that wait for a worker, in the order of their turns as far as it can be told."""

    waiting: tuple[Waiting, ...] = ()

    @classmethod
    def of(cls, waiting: Sequence[Waiting]) -> Line:
        return cls(tuple(sorted(waiting, key=lambda one: (-one.priority, one.place))))

    def ahead_of(self, batch_id: str) -> tuple[Waiting, ...] | None:
        """Those before this batch; None where it doesn't wait."""
        for position, one in enumerate(self.waiting):
            if one.batch_id == batch_id:
                return self.waiting[:position]
        return None


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch in words. `state` is for style sheets and tests, `since` and `done_at` are ISO 8601
    or empty. `percent` is None while there is nothing to count. `is_bad`: it has run, and nothing
    but failures came of it."""

    id: str
    name: str
    model: str
    state: str
    group: str
    label: str
    percent: float | None
    percent_text: str
    counts: str
    failed: str
    truncated: str
    speed: str
    eta: str
    done_at: str
    note: str
    created_at: str
    ended_at: str
    elapsed: str
    tokens: str
    cached: str
    cost: str
    is_over: bool
    is_bad: bool
    can_cancel: bool
    can_retry: bool
    can_download: bool

    def as_event(self) -> dict[str, object]:
        return asdict(self)


def speed_now(batch: Batch, samples: Sequence[Sample], now: datetime) -> float | None:
    """Tokens a second of a running batch over the last seconds; None where that can't be told.

    The series may have larger gaps than `SPEED_OVER_S`; then it is the speed since its last sample
    but one.
    """
    if batch.status is not BatchStatus.RUNNING or len(samples) < 2:
        return None
    last = samples[-1]
    earlier = [one for one in samples[:-1] if (last.at - one.at).total_seconds() >= SPEED_OVER_S]
    first = earlier[-1] if earlier else _since_it_moved(samples)
    passed_s = (last.at - first.at).total_seconds()
    if passed_s < 0.5:
        return None
    return (last.total_tokens - first.total_tokens) / passed_s


def _since_it_moved(samples: Sequence[Sample]) -> Sample:
    """The sample before the first result: what went before was loading."""
    for before, after in pairwise(samples):
        if after.done > before.done:
            return before
    return samples[0]


def _engine_speed(batch: Batch, crew: Crew) -> float | None:
    """Tokens a second that its engine computes: what there is before the first results."""
    if batch.status is not BatchStatus.RUNNING:
        return None
    for worker in crew.alive:
        if worker.batch_id == batch.id and worker.model == batch.model and worker.engine:
            pace = ("prompt_tokens_per_s", "generation_tokens_per_s")
            return sum(worker.engine.get(name, 0.0) for name in pace)
    return None


def batch_view(
    batch: Batch,
    estimate: Estimate | None,
    *,
    name: str,
    line: Line,
    crew: Crew,
    samples: Sequence[Sample],
    now: datetime,
) -> BatchView:
    progress = batch.progress
    speed = speed_now(batch, samples, now)
    if batch.is_terminal:
        speed = batch.throughput_tokens_per_s
    elif not speed:
        speed = _engine_speed(batch, crew)
    is_bad = batch.status is BatchStatus.COMPLETED and progress.failed == batch.total > 0
    eta, done_at = _eta(batch, estimate, now)
    tokens = progress.tokens
    began = batch.started_at
    ended = batch.ended_at
    return BatchView(
        id=batch.id,
        name=name or batch.id,
        model=batch.model or "several models",
        state=batch.status.value,
        group=STATUS_NAMES[batch.status],
        label="All failed" if is_bad else LABELS[batch.status],
        percent=percent(progress.done, batch.total) if batch.total else None,
        percent_text=f"{percent(progress.done, batch.total):g}%" if batch.total else "",
        counts=(
            f"{count(progress.done)} of {count(batch.total)}" if batch.total else "not counted yet"
        ),
        failed=f"{count(progress.failed)} failed" if progress.failed else "",
        truncated=truncated_text(progress.truncated) if progress.truncated else "",
        speed=f"{count(speed)} tokens/s" if speed else "",
        eta=eta,
        done_at=done_at,
        note=_note(batch, line, crew),
        created_at=iso(batch.created_at),
        ended_at=iso(ended) if ended else "",
        elapsed=duration(((ended or now) - began).total_seconds()) if began else "",
        tokens=(
            f"{count(tokens.prompt_tokens)} in, {count(tokens.completion_tokens)} out"
            if progress.done
            else ""
        ),
        cached=(
            f"{100 * tokens.cached_tokens / tokens.prompt_tokens:.0f}% of the prompt tokens"
            if tokens.cached_tokens and tokens.prompt_tokens
            else ""
        ),
        cost=f"{plural(progress.deduplicated, 'request')} answered from an equal one"
        if progress.deduplicated
        else "",
        is_over=batch.is_terminal,
        is_bad=is_bad,
        can_cancel=not batch.is_terminal and batch.status is not BatchStatus.CANCELLING,
        can_retry=can_be_retried(batch),
        can_download=results_url(batch) is not None,
    )


def _eta(batch: Batch, estimate: Estimate | None, now: datetime) -> tuple[str, str]:
    """How long it still takes, in words, and when it will be done."""
    if estimate is None or batch.is_terminal:
        return "", ""
    left_s = max((estimate.completion_at - now).total_seconds(), 0.0)
    text = f"about {duration(left_s)}" if left_s >= 1 else duration(left_s)
    low_s, high_s = estimate.low_s, estimate.high_s
    if low_s is not None and high_s is not None and high_s > low_s:
        ahead_s = max(left_s - estimate.duration_s, 0.0)
        between_s = between(ahead_s + low_s, ahead_s + high_s)
        if between_s != duration(left_s):
            text += f" ({between_s})"
    return text, iso(estimate.completion_at)


def _note(batch: Batch, line: Line, crew: Crew) -> str:
    """Why it stands where it stands; empty where that needs no words."""
    if batch.is_terminal:
        return batch.error_message or ""
    if batch.paused:
        return f"Paused: {batch.paused.reason}{_next_try(batch.paused)}"
    if batch.status is BatchStatus.VALIDATING:
        return "The lines of its file are being checked."
    if batch.status is BatchStatus.QUEUED:
        return _waits_for(batch, line, crew)
    if batch.status is BatchStatus.FINALIZING:
        return "The result files are being written."
    if batch.status is BatchStatus.CANCELLING:
        return "What is in flight ends; results so far are kept."
    if not crew.alive:
        return f"Its worker is gone. {NO_WORKER}"
    if batch.lease_owner is None:
        return "Waits for a worker to go on."
    if batch.progress.done == 0:
        mine = next((one for one in crew.alive if one.batch_id == batch.id), None)
        if mine is not None and mine.model != batch.model:
            return f"Loading {batch.model}."
        return "The first requests are running."
    return ""


def _next_try(paused: Paused) -> str:
    if paused.retry_at is not None:
        return f" Next try at {paused.retry_at:%H:%M:%S} UTC."
    if paused.entry is not None:
        return f" It is tried again when the registry's entry of {paused.model} changes."
    return ""


def _waits_for(batch: Batch, line: Line, crew: Crew) -> str:
    if not crew.alive:
        return NO_WORKER
    ahead = line.ahead_of(batch.id)
    if ahead:
        requests = sum(one.num_requests for one in ahead)
        return (
            f"{ordinal(len(ahead) + 1)} in line, behind "
            f"{plural(len(ahead), 'batch', 'batches')} with {plural(requests, 'request')}."
        )
    if all(worker.state == "working" for worker in crew.alive):
        return "Next in line, when the running batch has ended."
    if crew.models and batch.model not in crew.models:
        return f"Next in line; {batch.model} has to be loaded."
    return "Next in line."
