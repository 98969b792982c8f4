"""The native dialect: the JSON of the usage guide, made from what the core knows.

The pydantic models here are the shapes, for the answers and for /openapi.json alike. Every field
of a batch is always sent, null where it is unset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from batch_app.benchmarks import BenchmarkRecord
from batch_app.core import Batch, BatchStatus
from batch_app.estimates import Estimate
from batch_app.registry import ModelEntry
from batch_app.webhooks import Webhook
from batch_app.wire.webhooks import WebhookBody, webhook_body

#: How the native dialect calls each state.
STATUS_NAMES: Mapping[BatchStatus, str] = {
    BatchStatus.VALIDATING: "pending",
    BatchStatus.QUEUED: "pending",
    BatchStatus.RUNNING: "running",
    BatchStatus.FINALIZING: "running",
    BatchStatus.CANCELLING: "running",
    BatchStatus.COMPLETED: "completed",
    BatchStatus.FAILED: "failed",
    BatchStatus.EXPIRED: "expired",
    BatchStatus.CANCELLED: "cancelled",
}

#: The other way round, in the order a batch passes through them.
STATUSES: Mapping[str, tuple[BatchStatus, ...]] = {
    name: tuple(status for status, other in STATUS_NAMES.items() if other == name)
    for name in dict.fromkeys(STATUS_NAMES.values())
}


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), frozen=True)


class ProgressBody(_Body):
    """`truncated`: of the completed requests, those with an answer cut off at `max_tokens`."""

    total: int
    completed: int
    failed: int
    truncated: int
    percent: float


class FinishReasonsBody(_Body):
    """The completed requests by why the model ended their answers. `length`: cut off, of several
    choices at least one; `none`: the endpoint has no finish reasons (embeddings)."""

    stop: int
    length: int
    tool_calls: int
    content_filter: int
    other: int
    none: int


class EstimateBody(_Body):
    """What a batch has still before it.

    `estimated_seconds`: of its own, loading the model included; four of five batches take between
    `low_s` and `high_s`. `queue_wait_s` comes before that; `estimated_completion` counts both.
    `basis_kind`: `measured` here, `similar` (elsewhere, or with another version or arguments), or
    `roofline` (data sheets). `basis`: the benchmarks, the weightiest first. `prompt_basis`: how
    `prompt_tokens` are known: `counted`, `sampled`, by `bytes` as in past runs, or a `guess`.
    """

    estimated_seconds: int
    estimated_hours: float
    estimated_completion: str
    throughput_tokens_per_sec: int
    throughput_requests_per_sec: float
    based_on_benchmark: str | None
    low_s: float | None
    high_s: float | None
    prompt_tokens: int | None
    expected_output_tokens: int | None
    queue_wait_s: float
    basis: list[str]
    basis_kind: str
    prompt_basis: str | None


class InputDetailsBody(_Body):
    cached_tokens: int


class OutputDetailsBody(_Body):
    reasoning_tokens: int


class UsageBody(_Body):
    input_tokens: int
    input_tokens_details: InputDetailsBody
    output_tokens: int
    output_tokens_details: OutputDetailsBody
    total_tokens: int


class PausedBody(_Body):
    """Why a batch can't go on at the moment. `kind`: what it waits for. `by`: who paused it;
    `server`: this program, on an error. `retry_at` is null where time alone changes nothing. Times
    as in the rest of the object: Unix seconds in the OpenAI dialect."""

    kind: str
    reason: str
    by: str
    since: str | int
    retry_at: str | int | None


class BatchBody(_Body):
    """A batch. Times are UTC without a zone, as the guide prints them.

    `deduplicated`: of the finished requests, those that got the answer of an equal one. `webhook`:
    the one that was made with the batch, in the answer that creates both, with its secret.
    `provenance`: on what it ran: per model the revision, engine, arguments, device and seed.
    """

    batch_id: str
    model: str
    status: str
    progress: ProgressBody
    created_at: str
    started_at: str | None
    completed_at: str | None
    throughput_tokens_per_sec: int | None
    total_tokens: int | None
    error_message: str | None
    results_url: str | None
    estimate: EstimateBody | None
    deduplicated: int
    pause_reason: str | None
    paused: PausedBody | None
    webhook: WebhookBody | None
    provenance: dict[str, Any] | None
    input_file_id: str
    usage: UsageBody | None
    finish_reasons: FinishReasonsBody


class ModelBody(_Body):
    """A model of the registry. The figures are null until a first benchmark of it exists."""

    model: str
    platform: str
    throughput_tokens_per_sec: int | None
    throughput_requests_per_sec: float | None
    max_model_len: int | None
    gpu_memory_utilization: float | None
    last_benchmark: str | None
    success_rate: float | None


def percent(done: int, total: int) -> float:
    """One decimal, rounded down, so that 100.0 means that all are done."""
    if total <= 0:
        return 0.0
    return min(math.floor(1000 * done / total) / 10, 100.0 if done >= total else 99.9)


def local_time(moment: datetime | None) -> str | None:
    """`2025-10-28T10:00:00.000000`: UTC, without a zone."""
    if moment is None:
        return None
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")


def zulu_time(moment: datetime) -> str:
    """`2025-10-28T10:01:13Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def results_url(batch: Batch) -> str | None:
    """Where a finished batch's results are; None while it runs, or when it has none."""
    if not batch.is_terminal or batch.progress.done == 0:
        return None
    return f"/v1/batches/{batch.id}/results"


def estimate_body(estimate: Estimate | None) -> EstimateBody | None:
    if estimate is None:
        return None
    return EstimateBody(
        estimated_seconds=round(estimate.duration_s),
        estimated_hours=round(estimate.duration_s / 3600, 2),
        estimated_completion=zulu_time(estimate.completion_at),
        throughput_tokens_per_sec=round(estimate.throughput_tokens_per_s),
        throughput_requests_per_sec=round(estimate.throughput_requests_per_s, 2),
        based_on_benchmark=estimate.based_on_benchmark,
        low_s=_tenths(estimate.low_s),
        high_s=_tenths(estimate.high_s),
        prompt_tokens=estimate.prompt_tokens,
        expected_output_tokens=estimate.expected_output_tokens,
        queue_wait_s=round(estimate.queue_wait_s, 1),
        basis=list(estimate.basis),
        basis_kind=estimate.basis_kind,
        prompt_basis=estimate.prompt_basis or None,
    )


def _tenths(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def progress_body(batch: Batch) -> ProgressBody:
    progress = batch.progress
    return ProgressBody(
        total=batch.total,
        completed=progress.completed,
        failed=progress.failed,
        truncated=progress.truncated,
        percent=percent(progress.done, batch.total),
    )


def finish_reasons_body(batch: Batch) -> FinishReasonsBody:
    counts = batch.progress.finish_reasons
    none = max(batch.progress.completed - counts.total, 0)
    return FinishReasonsBody(**asdict(counts), none=none)


def usage_body(batch: Batch) -> UsageBody | None:
    """The tokens of the finished requests; None before the first."""
    if not batch.progress.done:
        return None
    tokens = batch.progress.tokens
    return UsageBody(
        input_tokens=tokens.prompt_tokens,
        input_tokens_details=InputDetailsBody(cached_tokens=tokens.cached_tokens),
        output_tokens=tokens.completion_tokens,
        output_tokens_details=OutputDetailsBody(reasoning_tokens=tokens.reasoning_tokens),
        total_tokens=tokens.total_tokens,
    )


def paused_body(
    batch: Batch, time: Callable[[datetime | None], str | int | None]
) -> PausedBody | None:
    """`time`: how this dialect writes times."""
    paused = batch.paused
    if paused is None:
        return None
    return PausedBody(
        kind=paused.kind.value,
        reason=paused.reason,
        by=paused.by,
        since=time(paused.since) or "",
        retry_at=time(paused.retry_at),
    )


def batch_body(
    batch: Batch, estimate: Estimate | None = None, webhook: Webhook | None = None
) -> BatchBody:
    ended_at = batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at
    total_tokens = batch.progress.tokens.total_tokens
    throughput = batch.throughput_tokens_per_s
    return BatchBody(
        batch_id=batch.id,
        model=batch.model,
        status=STATUS_NAMES[batch.status],
        progress=progress_body(batch),
        created_at=local_time(batch.created_at) or "",
        started_at=local_time(batch.started_at),
        completed_at=local_time(ended_at),
        throughput_tokens_per_sec=None if throughput is None else round(throughput),
        total_tokens=total_tokens if batch.progress.done else None,
        error_message=batch.error_message,
        results_url=results_url(batch),
        estimate=estimate_body(estimate),
        deduplicated=batch.progress.deduplicated,
        pause_reason=batch.pause_reason,
        paused=paused_body(batch, local_time),
        webhook=None if webhook is None else webhook_body(webhook, with_secret=True),
        provenance=None if batch.provenance is None else dict(batch.provenance),
        input_file_id=batch.input_file_id,
        usage=usage_body(batch),
        finish_reasons=finish_reasons_body(batch),
    )


def model_body(entry: ModelEntry, record: BenchmarkRecord | None) -> ModelBody:
    if record is None:
        utilization = entry.engine_args.get("gpu_memory_utilization")
        return ModelBody(
            model=entry.name,
            platform=f"{entry.engine}-native",
            throughput_tokens_per_sec=None,
            throughput_requests_per_sec=None,
            max_model_len=entry.max_model_len,
            gpu_memory_utilization=utilization if isinstance(utilization, float) else None,
            last_benchmark=None,
            success_rate=None,
        )
    return ModelBody(
        model=entry.name,
        platform=record.platform,
        throughput_tokens_per_sec=round(record.results.throughput_tokens_per_s),
        throughput_requests_per_sec=round(record.results.throughput_requests_per_s, 2),
        max_model_len=record.config.max_model_len or entry.max_model_len,
        gpu_memory_utilization=record.config.gpu_memory_utilization,
        last_benchmark=zulu_time(record.timestamp),
        success_rate=record.results.success_rate,
    )
