"""How much an engine may have in hand at once: chosen by the machine, lowered when memory runs out.

What the registry sets goes first, then this table. An engine that runs out of memory is started
again with `smaller` limits, and these are remembered, so that the next load begins with them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from batch_app.core import EngineLimits, GpuMemory, LimitsTried, utc_now
from batch_app.engine.base import EngineInfo, ModelSpec
from batch_app.errors import StorageFull
from batch_app.files import atomic_writer

logger = logging.getLogger(__name__)

GIB = 1 << 30
#: `max_num_seqs` and `max_num_batched_tokens` by a GPU's memory: the first row that it reaches.
#: docs/decisions/0005-engine-limits-from-a-table.md says why a table, and why this one.
_BY_GPU_MEMORY = ((70 * GIB, 1024, 16384), (0, 256, 8192))
_WITHOUT_GPU = (512, 8192)

#: Below these an engine that runs out of memory has another problem than its limits.
LEAST_SEQS = 1
LEAST_BATCHED_TOKENS = 512
LEAST_GPU_MEMORY_UTILIZATION = 0.5
_UTILIZATION_STEP = 0.05
#: Of the memory that other processes leave: kept back, because theirs and the driver's varies; and
#: the least share of a GPU that is worth a start.
_BESIDE_OTHERS_MARGIN = 0.02
LEAST_BESIDE_OTHERS = 0.1
#: How often one load is tried again with less.
MAX_SMALLER_STARTS = 6
#: Memory may have been short for a passing reason: after this time the full limits are tried again.
REMEMBERED_FOR = timedelta(days=7)


def table_limits(gpu_memory_bytes: int | None, gpu_name: str = "") -> tuple[int, int, str]:
    """`max_num_seqs` and `max_num_batched_tokens` for this machine, and the row they come from.

    `gpu_memory_bytes` is None where there is no GPU, 0 where its memory size is unknown.
    """
    if gpu_memory_bytes is None:
        return (*_WITHOUT_GPU, "no GPU")
    row = f"a GPU with {gpu_memory_bytes / GIB:.0f} GiB"
    if not gpu_memory_bytes:
        row = "a GPU whose memory size is unknown"
    # An A100 computes too slowly for steps as large as its memory would allow.
    memory_bytes = 0 if "a100" in gpu_name.lower() else gpu_memory_bytes
    seqs, tokens = next(row[1:] for row in _BY_GPU_MEMORY if memory_bytes >= row[0])
    return seqs, tokens, row


def smaller(limits: EngineLimits) -> EngineLimits | None:
    """The limits to start with after these were too much; None where there are none.

    Half the requests and tokens of a step, and a twentieth of the GPU's memory left to others.
    `max_model_len` never changes: a request that fits must not become one that doesn't.
    """
    seqs = max(limits.max_num_seqs // 2, min(LEAST_SEQS, limits.max_num_seqs))
    least_tokens = min(max(limits.least_batched_tokens, seqs), limits.max_num_batched_tokens)
    tokens = max(limits.max_num_batched_tokens // 2, least_tokens)
    utilization = limits.gpu_memory_utilization
    if utilization is not None and utilization > LEAST_GPU_MEMORY_UTILIZATION:
        utilization = max(round(utilization - _UTILIZATION_STEP, 3), LEAST_GPU_MEMORY_UTILIZATION)
    lower = replace(
        limits,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=utilization,
    )
    return None if lower == limits else lower


def utilization_beside(memory: GpuMemory) -> float | None:
    """The `gpu_memory_utilization` to start with while other processes use the rest of this GPU.

    None if they leave too little.
    """
    if memory.total_bytes <= 0:
        return None
    share = math.floor((memory.free_bytes / memory.total_bytes - _BESIDE_OTHERS_MARGIN) * 1e3) / 1e3
    return share if share >= LEAST_BESIDE_OTHERS else None


def limits_of(info: EngineInfo) -> LimitsTried | None:
    """What a loaded engine runs with; None where its steps are not ours to limit."""
    if info.max_num_batched_tokens is None:
        return None
    limits = EngineLimits(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        gpu_memory_utilization=info.gpu_memory_utilization,
        least_batched_tokens=info.least_batched_tokens,
    )
    return LimitsTried(limits, info.device, info.engine_version)


def lowered_for(spec: ModelSpec, device: str, engine_version: str) -> EngineLimits | None:
    """The limits that were lowered before, if that was on this device and by this engine."""
    lowered = spec.lowered
    if lowered is None or (lowered.device, lowered.engine_version) != (device, engine_version):
        return None
    return lowered.limits


def told(info: EngineInfo) -> str:
    """The limits of a loaded engine, and where they come from."""
    tried = limits_of(info)
    words = f"{info.max_num_seqs:,} requests" if tried is None else in_words(tried.limits)
    return f"{words} ({info.limits_source})" if info.limits_source else words


def in_words(limits: EngineLimits) -> str:
    words = f"{limits.max_num_seqs:,} requests and {limits.max_num_batched_tokens:,} tokens a step"
    if limits.gpu_memory_utilization is not None:
        words += f", {limits.gpu_memory_utilization:.0%} of the GPU's memory"
    return words


class _Entry(msgspec.Struct):
    arguments: str
    tried: LimitsTried
    at: datetime


_decode = msgspec.json.Decoder(dict[str, _Entry]).decode


class LoweredLimits:
    """The limits that had to be lowered, by machine and model, in one small file.

    An entry counts as long as the registry says the same of the model; the engine looks at the
    device and its own version (`lowered_for`).
    """

    def __init__(self, path: Path, clock: Callable[[], datetime] = utc_now) -> None:
        self._path = path
        self._clock = clock
        self._unwritten: dict[str, _Entry] = {}

    def get(self, spec: ModelSpec) -> LimitsTried | None:
        entry = self._read().get(_key(spec))
        if entry is None or entry.arguments != _arguments(spec):
            return None
        return entry.tried if self._clock() - entry.at < REMEMBERED_FOR else None

    def set(self, spec: ModelSpec, lowered: LimitsTried) -> None:
        """Remember this one; where it can't be written, for as long as this process lives."""
        new = {_key(spec): _Entry(_arguments(spec), lowered, self._clock())}
        entries = self._read() | new
        try:
            with atomic_writer(self._path) as file:
                file.write(msgspec.json.format(msgspec.json.encode(entries)) + b"\n")
        except (StorageFull, OSError) as error:
            self._unwritten |= new
            logger.warning("Can't write %s: %s", self._path.name, error)

    def _read(self) -> dict[str, _Entry]:
        try:
            return _decode(self._path.read_bytes()) | self._unwritten
        except FileNotFoundError:
            return dict(self._unwritten)
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("Ignoring %s: %s", self._path.name, error)
            return {}


def _key(spec: ModelSpec) -> str:
    return f"{platform.node()}/{spec.name}"


def _arguments(spec: ModelSpec) -> str:
    said: Mapping[str, Any] = {
        "engine": spec.engine,
        "source": spec.source,
        "revision": spec.revision,
        "engine_args": spec.engine_args,
    }
    return hashlib.sha256(msgspec.json.encode(said, order="deterministic")).hexdigest()[:16]
