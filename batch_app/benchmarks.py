"""Benchmarks: what was measured, one JSON file a run, and which of them an estimate rests on.

A folder of records is all there is; the worker adds one with each finished batch, the API server
notices it at its next look. A file that can't be read is a warning, never a crash.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from batch_app.files import atomic_writer
from batch_app.forecast.measurement import Limits, MeasuredGroup, Measurement, Setting, StepBin
from batch_app.forecast.recording import Recording

logger = logging.getLogger(__name__)

#: Runs with fewer answers measure start and end more than the steady pace between.
FEWEST_REQUESTS = 10
MAX_RECORD_BYTES = 1 << 20
TICK_NS = 100_000_000


def _aware_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Part(BaseModel):
    # Unknown fields pass: a record may come from a newer version of this program.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class BenchmarkConfig(_Part):
    """The engine arguments that matter to speed. None where the run did not set it."""

    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_tokens: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    attention_backend: str | None = None


class BenchmarkGroup(_Part):
    """The answers to requests of one endpoint with about the same limit.

    Quantiles stand at the shares of `forecast.workload.LEVELS`. `num_cut` ended at the limit.
    """

    endpoint: str
    max_tokens: float | None = None
    num_requests: int = Field(ge=0)
    mean_completion_tokens: float = Field(ge=0, allow_inf_nan=False)
    completion_token_quantiles: tuple[float, ...] = ()
    mean_prompt_tokens: float | None = None
    num_cut: int = Field(default=0, ge=0)


class BenchmarkSteps(_Part):
    """Sums over the engine's steps with about the same number of requests in hand."""

    num_steps: float = Field(gt=0, allow_inf_nan=False)
    seconds: float = Field(gt=0, allow_inf_nan=False)
    decode_tokens: float = Field(ge=0, allow_inf_nan=False)
    prefill_tokens: float = Field(ge=0, allow_inf_nan=False)
    context_tokens: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class BenchmarkPrediction(_Part):
    """What was predicted for this run when it was submitted; seconds, loading included."""

    predicted_s: float = Field(ge=0, allow_inf_nan=False)
    low_s: float = Field(ge=0, allow_inf_nan=False)
    high_s: float = Field(ge=0, allow_inf_nan=False)
    basis: tuple[str, ...] = ()
    basis_kind: str = "measured"


class BenchmarkResults(_Part):
    """Counts, seconds, tokens. Throughputs are per second of inference, loading not counted."""

    num_requests: int = Field(ge=0)
    success_count: int = Field(ge=0)
    failure_count: int = Field(ge=0)
    success_rate: float = Field(ge=0, le=100)
    model_load_time_s: float = Field(ge=0, allow_inf_nan=False)
    inference_time_s: float = Field(ge=0, allow_inf_nan=False)
    total_time_s: float = Field(ge=0, allow_inf_nan=False)
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    mean_prompt_tokens: float | None = None
    mean_completion_tokens: float | None = None
    p95_completion_tokens: int | None = None
    throughput_tokens_per_s: float = Field(ge=0, allow_inf_nan=False)
    throughput_requests_per_s: float = Field(ge=0, allow_inf_nan=False)
    #: Of the prompt tokens, those that the prefix cache held.
    cached_prompt_tokens: int | None = None
    #: Of the input lines that these tokens came from.
    line_bytes: int | None = None
    #: At the shares of `forecast.workload.LEVELS`.
    prompt_token_quantiles: tuple[float, ...] = ()
    completion_token_quantiles: tuple[float, ...] = ()
    groups: tuple[BenchmarkGroup, ...] = ()
    steps: tuple[BenchmarkSteps, ...] = ()


class BenchmarkHardware(_Part):
    """`gpu` or `cpu` is the product's name, `device` says which of the two did the work; "remote"
    where a server did, of which `remote` says what is known.

    `machine` tells machines with the same device apart; `driver` is the GPU's.
    """

    gpu: str | None = None
    cpu: str | None = None
    remote: str | None = None
    device: str | None = None
    machine: str | None = None
    driver: str | None = None


class BenchmarkRecord(_Part):
    """One measured run of one model."""

    test_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    timestamp: Annotated[datetime, AfterValidator(_aware_utc)]
    platform: str
    engine: str | None = None
    engine_version: str | None = None
    model: str
    config: BenchmarkConfig = BenchmarkConfig()
    results: BenchmarkResults
    hardware: BenchmarkHardware = BenchmarkHardware()
    #: As `arguments_text` writes them.
    engine_args: str | None = None
    model_revision: str | None = None
    #: "batch", or "bench" where it was run to measure.
    purpose: str | None = None
    #: Why this run says little of the ones to come: "failed", "outlier: …". None: it counts.
    set_aside: str | None = None
    prediction: BenchmarkPrediction | None = None

    @property
    def is_representative(self) -> bool:
        """Whether a longer run may be expected to go at this pace."""
        return self.set_aside is None and self.results.success_count >= FEWEST_REQUESTS

    @property
    def setting(self) -> Setting:
        """What it holds for; empty strings where an older record doesn't say."""
        hardware = self.hardware
        device = hardware.remote or hardware.gpu or hardware.cpu
        if hardware.device == "cpu":
            device = hardware.cpu
        return Setting(
            model=self.model,
            machine=machine_text(device, hardware.machine),
            engine=self.engine or self.platform.removesuffix("-native"),
            engine_version=self.engine_version or "",
            arguments=self.engine_args or "",
        )

    def measurement(self) -> Measurement:
        """The same run in the form that a forecast is fitted on."""
        results, config = self.results, self.config
        return Measurement(
            id=self.test_id,
            setting=self.setting,
            num_requests=results.num_requests,
            prompt_tokens=results.prompt_tokens,
            output_tokens=results.completion_tokens,
            inference_s=results.inference_time_s,
            load_s=results.model_load_time_s,
            cached_tokens=results.cached_prompt_tokens or 0,
            prompt_quantiles=results.prompt_token_quantiles,
            output_quantiles=results.completion_token_quantiles,
            groups=tuple(
                MeasuredGroup(
                    endpoint=group.endpoint,
                    max_tokens=group.max_tokens,
                    num_requests=group.num_requests,
                    mean_output_tokens=group.mean_completion_tokens,
                    output_quantiles=group.completion_token_quantiles,
                    mean_prompt_tokens=group.mean_prompt_tokens,
                    num_cut=group.num_cut,
                )
                for group in results.groups
            ),
            steps=tuple(
                StepBin(
                    num_steps=one.num_steps,
                    seconds=one.seconds,
                    decode_tokens=one.decode_tokens,
                    prefill_tokens=one.prefill_tokens,
                    context_tokens=one.context_tokens,
                )
                for one in results.steps
            ),
            limits=Limits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                kv_cache_tokens=config.kv_cache_tokens,
                max_model_len=config.max_model_len,
            ),
            is_outlier=self.set_aside is not None,
        )


def machine_text(device: str | None, machine: str | None = None) -> str:
    """What `Setting.machine` holds: the device's name, and what tells its machine apart."""
    return " @ ".join(part for part in (device, machine) if part)


def arguments_text(engine_args: Mapping[str, Any]) -> str:
    """Engine arguments as `Setting.arguments` holds them: JSON with sorted keys."""
    return json.dumps(dict(engine_args), sort_keys=True, separators=(",", ":"), default=str)


def record_from_run(
    *,
    batch_id: str,
    model: str,
    engine: str,
    engine_version: str | None,
    device: str,
    device_name: str | None,
    num_requests: int,
    success_count: int,
    load_s: float,
    inference_s: float,
    prompt_tokens: int,
    completion_tokens: int,
    p95_completion_tokens: int | None = None,
    engine_args: dict[str, Any],
    timestamp: datetime,
    recording: Recording | None = None,
    cached_prompt_tokens: int | None = None,
    line_bytes: int | None = None,
    registry_args: Mapping[str, Any] | None = None,
    machine: str | None = None,
    driver: str | None = None,
    model_revision: str | None = None,
    purpose: str | None = None,
    set_aside: str | None = None,
    prediction: BenchmarkPrediction | None = None,
) -> BenchmarkRecord:
    """The record of a run, from plain numbers. `device` is "gpu", "cpu" or "remote".

    `engine_args`: what the engine says it runs with, by the names of `BenchmarkConfig`;
    `registry_args`: what it was told, which tells runs apart. `recording`: of the same requests.

    Counts and tokens are of the requests that this run computed: one that was resumed, or that
    took answers from elsewhere, must leave those out of both counts and time.
    """
    pace = (1.0 / inference_s) if inference_s > 0 else 0.0
    total_tokens = prompt_tokens + completion_tokens
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rsplit("/", 1)[-1]).strip("-._") or "model"
    platform = f"{engine}-native"
    day = timestamp.astimezone(UTC).strftime("%Y-%m-%d")
    return BenchmarkRecord(
        test_id=f"{platform}-{name[:80]}-{num_requests}-{day}-{batch_id.rsplit('_', 1)[-1][:12]}",
        timestamp=timestamp,
        platform=platform,
        engine=engine,
        engine_version=engine_version,
        model=model,
        config=BenchmarkConfig(
            **{key: engine_args.get(key) for key in BenchmarkConfig.model_fields}
        ),
        results=BenchmarkResults(
            num_requests=num_requests,
            success_count=success_count,
            failure_count=num_requests - success_count,
            success_rate=round(100.0 * success_count / num_requests, 2) if num_requests else 0.0,
            model_load_time_s=round(load_s, 2),
            inference_time_s=round(inference_s, 3),
            total_time_s=round(load_s + inference_s, 2),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=total_tokens,
            mean_prompt_tokens=round(prompt_tokens / success_count, 2) if success_count else None,
            mean_completion_tokens=(
                round(completion_tokens / success_count, 2) if success_count else None
            ),
            p95_completion_tokens=p95_completion_tokens,
            throughput_tokens_per_s=round(total_tokens * pace, 2),
            throughput_requests_per_s=round(num_requests * pace, 4),
            cached_prompt_tokens=(
                recording.cached_tokens
                if recording is not None and cached_prompt_tokens is None
                else cached_prompt_tokens
            ),
            line_bytes=line_bytes,
            **(_recorded(recording) if recording is not None else {}),
        ),
        hardware=BenchmarkHardware(
            device=device, machine=machine, driver=driver, **{device: device_name}
        ),
        engine_args=None if registry_args is None else arguments_text(registry_args),
        model_revision=model_revision,
        purpose=purpose,
        set_aside=set_aside,
        prediction=prediction,
    )


def _recorded(recording: Recording) -> dict[str, Any]:
    """The fields of `BenchmarkResults` that a recording fills."""
    return {
        "prompt_token_quantiles": _rounded(recording.prompt_quantiles),
        "completion_token_quantiles": _rounded(recording.output_quantiles),
        "groups": tuple(
            BenchmarkGroup(
                endpoint=group.endpoint,
                max_tokens=group.max_tokens,
                num_requests=group.num_requests,
                mean_completion_tokens=round(group.mean_output_tokens, 3),
                completion_token_quantiles=_rounded(group.output_quantiles),
                mean_prompt_tokens=(
                    None if group.mean_prompt_tokens is None else round(group.mean_prompt_tokens, 3)
                ),
                num_cut=group.num_cut,
            )
            for group in recording.groups
        ),
        "steps": tuple(
            BenchmarkSteps(
                num_steps=round(one.num_steps, 3),
                seconds=round(one.seconds, 6),
                decode_tokens=round(one.decode_tokens, 1),
                prefill_tokens=round(one.prefill_tokens, 1),
                context_tokens=None if one.context_tokens is None else round(one.context_tokens),
            )
            for one in recording.steps
            if one.num_steps >= 0.001 and one.seconds >= 1e-6
        ),
    }


def _rounded(quantiles: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 2) for value in quantiles)


class BenchmarkFolder:
    """The records of one folder. Safe to use from several threads.

    A look costs one `stat` while the folder is unchanged: a file that is added, or replaced the
    way `write` does it, changes the folder's time. One edited in place is seen at the next change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._records: tuple[BenchmarkRecord, ...] = ()

    def all(self, model: str | None = None) -> tuple[BenchmarkRecord, ...]:
        """The records, newest first, of one model or of all."""
        records = self._rescan()
        if model is None:
            return records
        return tuple(record for record in records if record.model == model)

    def latest(self, model: str) -> BenchmarkRecord | None:
        """The record that estimates for this model rest on; None if there is none.

        The newest one with at least `FEWEST_REQUESTS` answers: the machine, the engine and its
        arguments are most likely still those of today. A smaller run counts only where there is
        no such record, and one without any answer, or any pace, never does.
        """
        usable = [
            record
            for record in self.all(model)
            if record.results.success_count > 0 and record.results.throughput_requests_per_s > 0
        ]
        for record in usable:
            if record.is_representative:
                return record
        return max(usable, key=lambda record: record.results.success_count, default=None)

    def write(self, record: BenchmarkRecord) -> Path:
        """Add a record. Whole or not at all; raises StorageFull or OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"{record.test_id}.json"
        text = record.model_dump_json(indent=2, exclude_none=False)
        with atomic_writer(target) as file:
            file.write(text.encode() + b"\n")
        return target

    # -- reading -------------------------------------------------------------------------------

    def _rescan(self) -> tuple[BenchmarkRecord, ...]:
        with self._lock:
            try:
                stat = self.path.stat()
            except OSError:
                self._seen, self._records = None, ()
                return ()
            # The inode too: someone may have put another folder in this one's place.
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                records = sorted(self._read_all(), key=lambda record: record.timestamp)
                self._records = tuple(reversed(records))
                # A folder's time has a grain: what is added in the same tick must not be missed.
                just_changed = time.time_ns() - stat.st_mtime_ns < TICK_NS
                self._seen = None if just_changed else seen
            return self._records

    def _read_all(self) -> Iterator[BenchmarkRecord]:
        with os.scandir(self.path) as entries:
            paths = sorted(Path(entry.path) for entry in entries if entry.name.endswith(".json"))
        for path in paths:
            if path.name.startswith("."):
                continue  # being written
            try:
                if path.stat().st_size > MAX_RECORD_BYTES:
                    raise ValueError(f"it is larger than {MAX_RECORD_BYTES} bytes")
                yield BenchmarkRecord.model_validate_json(path.read_bytes())
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"]) or "the file"
                logger.warning("Ignoring benchmark %s: %s: %s", path, where, first["msg"])
            except (OSError, ValueError) as error:
                logger.warning("Ignoring benchmark %s: %s", path, error)
