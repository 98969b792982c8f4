"""What the server says of batches and models, typed. `raw` has the answer as it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

FINISHED = frozenset({"completed", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Progress:
    """Requests by what became of them. `percent` reaches 100.0 only when all are done.

    `truncated`: of the completed ones, those with an answer that was cut off at its `max_tokens`.
    """

    total: int
    completed: int
    failed: int
    percent: float
    truncated: int = 0

    @property
    def done(self) -> int:
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class Estimate:
    """When the batch will be done, as the server sees it. `low_s` and `high_s`: the range, where
    the server knows one."""

    duration_s: float
    completion_at: datetime | None
    low_s: float | None
    high_s: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the finished requests; `cached` are among the prompt's."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Paused:
    """Why a batch can't go on at the moment. `kind`: what it waits for; `retry_at` is None where
    time alone changes nothing. Times are aware, in UTC."""

    kind: str
    reason: str
    by: str
    since: datetime | None
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, as it was when the server was asked.

    `status`: `pending`, `running`, `completed`, `failed`, `cancelled` or `expired`. `model` is
    empty where each line names its own. Times are aware, in UTC. `finish_reasons`: the completed
    requests by why the model ended their answers: `stop`, `length` (cut off), `tool_calls`,
    `content_filter`, `other`, `none`.
    """

    id: str
    model: str
    status: str
    progress: Progress
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    throughput_tokens_per_s: float | None
    error_message: str | None
    pause_reason: str | None
    paused: Paused | None
    deduplicated: int
    input_file_id: str | None
    estimate: Estimate | None
    usage: Usage | None
    raw: Mapping[str, Any] = field(repr=False)
    finish_reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    @property
    def has_results(self) -> bool:
        """Whether there is anything to download: a batch can end before any request ran."""
        return self.progress.done > 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server offers. The throughput is what was measured last, if anything."""

    name: str
    max_model_len: int | None
    throughput_tokens_per_s: float | None
    throughput_requests_per_s: float | None
    raw: Mapping[str, Any] = field(repr=False)


def batch_of(body: Mapping[str, Any]) -> Batch:
    """From the native view of a batch."""
    progress, usage = body["progress"], body.get("usage")
    created_at = _moment(body["created_at"])
    assert created_at is not None
    return Batch(
        id=body["batch_id"],
        model=body["model"],
        status=body["status"],
        progress=Progress(
            progress["total"],
            progress["completed"],
            progress["failed"],
            progress["percent"],
            progress.get("truncated") or 0,
        ),
        created_at=created_at,
        started_at=_moment(body["started_at"]),
        ended_at=_moment(body["completed_at"]),
        throughput_tokens_per_s=body["throughput_tokens_per_sec"],
        error_message=body["error_message"],
        pause_reason=body.get("pause_reason"),
        paused=_paused(body.get("paused")),
        deduplicated=body.get("deduplicated") or 0,
        input_file_id=body.get("input_file_id"),
        estimate=_estimate(body.get("estimate")),
        usage=(
            None
            if usage is None
            else Usage(
                prompt_tokens=usage["input_tokens"],
                cached_tokens=usage["input_tokens_details"]["cached_tokens"],
                completion_tokens=usage["output_tokens"],
                total_tokens=usage["total_tokens"],
            )
        ),
        raw=body,
        finish_reasons=body.get("finish_reasons") or {},
    )


def model_of(body: Mapping[str, Any]) -> Model:
    return Model(
        name=body["model"],
        max_model_len=body.get("max_model_len"),
        throughput_tokens_per_s=body.get("throughput_tokens_per_sec"),
        throughput_requests_per_s=body.get("throughput_requests_per_sec"),
        raw=body,
    )


def _paused(body: Mapping[str, Any] | None) -> Paused | None:
    if body is None:
        return None
    return Paused(
        kind=body["kind"],
        reason=body["reason"],
        by=body["by"],
        since=_moment(body["since"]),
        retry_at=_moment(body["retry_at"]),
    )


def _estimate(body: Mapping[str, Any] | None) -> Estimate | None:
    if body is None:
        return None
    return Estimate(
        duration_s=body["estimated_seconds"],
        completion_at=_moment(body.get("estimated_completion")),
        low_s=body.get("low_s"),
        high_s=body.get("high_s"),
    )


def _moment(text: str | None) -> datetime | None:
    """The guide's times have no zone; they are UTC."""
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
