"""Benchmarks: what was measured, one JSON file a run, and which of them an estimate rests on.

A folder of records is all there is; the worker adds one with each finished batch, the API server
notices it at its next look. A file that can't be read is a warning, never a crash.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from batch_app.files import atomic_writer

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


class BenchmarkHardware(_Part):
    """`gpu` or `cpu` is the product's name, `device` says which of the two did the work."""

    gpu: str | None = None
    cpu: str | None = None
    device: str | None = None


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

    @property
    def is_representative(self) -> bool:
        """Whether a longer run may be expected to go at this pace."""
        return self.results.success_count >= FEWEST_REQUESTS


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
) -> BenchmarkRecord:
    """The record of a run, from plain numbers. `device` is "gpu" or "cpu".

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
        ),
        hardware=BenchmarkHardware(device=device, **{device: device_name}),
    )


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
