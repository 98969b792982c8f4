"""Measuring: what a claim computed, and the benchmark record that becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from batch_app.benchmarks import BenchmarkPrediction, BenchmarkRecord, record_from_run
from batch_app.core import Batch, TokenCounts, is_success
from batch_app.engine.base import EngineInfo, EngineStats, Outcome
from batch_app.forecast.measurement import Reading
from batch_app.forecast.recording import Recording
from batch_app.index import Index
from batch_app.registry import ModelEntry

#: With more of them failing, the time says little of a run that succeeds.
MOST_FAILED_SHARE = 0.1
#: So many times as long, or as short, as four of five runs were expected to be at most.
OUTLIER_FACTOR = 2.0
#: The metadata of a batch that was made to measure.
PURPOSE = "purpose"
BENCH = "bench"


@dataclass(slots=True)
class Tally:
    """Of the requests that one claim computed; copies are left out."""

    index: Index
    num_requests: int = 0
    num_succeeded: int = 0
    tokens: TokenCounts = field(default_factory=TokenCounts)
    lengths: Counter[int] = field(default_factory=Counter)  # requests by output tokens
    line_bytes: int = 0
    num_deaths: int = 0
    recording: Recording = field(default_factory=Recording)
    _last_at_s: float = 0.0

    def add(self, outcomes: Sequence[Outcome]) -> None:
        if not outcomes:
            return
        records = self.index.records[np.array([one.number for one in outcomes])]
        self.num_requests += len(outcomes)
        prompt = completion = cached = 0
        endpoints = self.index.endpoints
        for outcome, limit, endpoint, length in zip(
            outcomes,
            records["max_tokens"].tolist(),
            records["endpoint"].tolist(),
            records["length"].tolist(),
            strict=True,
        ):
            prompt += outcome.prompt_tokens
            completion += outcome.completion_tokens
            self.lengths[outcome.completion_tokens] += 1
            cached += outcome.cached_tokens
            if is_success(outcome.status_code):
                self.num_succeeded += 1
                self.line_bytes += length
                self.recording.finish(
                    endpoints[endpoint],
                    limit,
                    prompt_tokens=outcome.prompt_tokens,
                    output_tokens=outcome.completion_tokens,
                )
        self.tokens += TokenCounts(prompt, completion, cached)

    def begin(self, info: EngineInfo, reading: Reading) -> None:
        """An engine is there; the first of them says what its cache holds."""
        if not self.num_requests:
            self.recording = Recording(kv_cache_tokens=info.kv_cache_tokens)
        self.recording.reset()
        self.recording.read(reading)
        self._last_at_s = reading.at_s

    def read(self, stats: EngineStats) -> None:
        """What the engine says; the same reading counts once."""
        if stats.at_s > self._last_at_s:
            self._last_at_s = stats.at_s
            self.recording.read(reading_of(stats))


def benchmark_of(
    tally: Tally,
    batch: Batch,
    entry: ModelEntry,
    info: EngineInfo,
    *,
    inference_s: float,
    timestamp: datetime,
    machine: str | None,
    driver: str | None,
    model_revision: str | None,
    prediction: BenchmarkPrediction | None,
    failed: bool,
) -> BenchmarkRecord:
    """The record of this claim. `failed`: the batch did not come to its end."""
    purpose = BENCH if (batch.metadata or {}).get(PURPOSE) == BENCH else "batch"
    return record_from_run(
        batch_id=batch.id,
        model=info.model,
        engine=info.engine,
        engine_version=info.engine_version,
        device=info.device_type,
        device_name=info.device,
        num_requests=tally.num_requests,
        success_count=tally.num_succeeded,
        load_s=info.load_s,
        inference_s=inference_s,
        prompt_tokens=tally.tokens.prompt_tokens,
        completion_tokens=tally.tokens.completion_tokens,
        p95_completion_tokens=quantile(tally.lengths, 0.95),
        engine_args={
            "max_model_len": info.max_model_len,
            "gpu_memory_utilization": info.gpu_memory_utilization,
            "enable_prefix_caching": info.enable_prefix_caching,
            "enable_chunked_prefill": info.enable_chunked_prefill,
            "max_num_seqs": info.max_num_seqs,
            "max_num_batched_tokens": info.max_num_batched_tokens,
            "kv_cache_tokens": info.kv_cache_tokens,
            **info.precision,
        },
        timestamp=timestamp,
        recording=tally.recording,
        cached_prompt_tokens=tally.tokens.cached_tokens,
        line_bytes=tally.line_bytes,
        registry_args=entry.engine_args,
        machine=machine,
        driver=driver if info.device_type == "gpu" else None,
        model_revision=model_revision,
        purpose=purpose,
        prediction=prediction,
        set_aside=_set_aside(tally, inference_s, info, prediction, failed=failed),
    )


def _set_aside(
    tally: Tally,
    inference_s: float,
    info: EngineInfo,
    prediction: BenchmarkPrediction | None,
    *,
    failed: bool,
) -> str | None:
    """Why this run says little of the ones to come; None where it does."""
    if failed:
        return "failed: the batch did not come to its end"
    num_failed = tally.num_requests - tally.num_succeeded
    if num_failed > MOST_FAILED_SHARE * tally.num_requests:
        return f"failed: {num_failed} of {tally.num_requests} requests"
    if tally.num_deaths:
        return f"outlier: the engine died {tally.num_deaths} times"
    if prediction is not None and prediction.basis_kind == "measured":
        took_s = info.load_s + inference_s
        low_s, high_s = prediction.low_s, prediction.high_s
        if took_s > OUTLIER_FACTOR * high_s or took_s < low_s / OUTLIER_FACTOR:
            return f"outlier: it took {took_s:.4g} s, not {low_s:.4g} to {high_s:.4g} s"
    return None


def quantile(counts: Counter[int], share: float) -> int | None:
    """The smallest value that this share of them doesn't exceed; None of nothing."""
    left = share * counts.total()
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return None


def reading_of(stats: EngineStats, at_s: float | None = None) -> Reading:
    """An engine's own counters as a forecast takes them."""
    return Reading(
        at_s=stats.at_s if at_s is None else at_s,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        prompt_tokens_total=stats.prompt_tokens_total,
        cached_tokens_total=stats.prefix_cache_hits_total,
        generation_tokens_total=stats.generation_tokens_total,
        kv_cache_usage=stats.kv_cache_usage,
        steps_total=stats.steps_total,
    )
