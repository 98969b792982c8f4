"""Why vLLM could not load a model, in words, and how to try again if memory was the reason.

vLLM has no types for this: its messages are all there is. The patterns are of its sources from
0.24 to 0.33. Nothing is imported from it.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from batch_app.core import GpuMemory, LimitsTried, LoadRetry
from batch_app.engine.base import ModelSpec
from batch_app.engine.limits import GIB
from batch_app.engine.memory import says_out_of_memory
from batch_app.errors import EngineLoadError

#: v1/worker/utils.py, `request_memory`.
_IN_USE = re.compile(r"Free memory on device (?:\S+ )?\(([\d.]+)/([\d.]+) GiB\)")
#: v1/worker/gpu_worker.py, `determine_available_memory`.
_MEASURED_WRONG = "Error in memory profiling"
#: v1/core/kv_cache_utils.py or kv_cache_planning.py, `_check_enough_kv_cache_memory`.
_NO_CACHE = "No available memory for the cache blocks"
_TOO_LONG = re.compile(r"To serve at least one request with the model's max seq len \((\d+)\)")
_LONGEST = re.compile(r"estimated maximum model length is (\d+)")
#: v1/executor/multiproc_executor.py, `wait_for_ready`: the cause is in the log only.
_IN_A_WORKER = "WorkerProc initialization failed"
_ERROR_LINE = re.compile(r"\b(\w+(?:Error|Exception): .+)")

_TAIL_BYTES = 64 << 10
_MOST_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class LogPosition:
    """A place in a log file: what is written after it belongs to one load. Can be pickled."""

    path: str
    offset: int

    @classmethod
    def of_stderr(cls) -> LogPosition | None:
        """Where this process's standard error goes on; None if that isn't a file."""
        try:
            status = os.fstat(2)
            if not stat.S_ISREG(status.st_mode):
                return None
            return cls(str(Path("/proc/self/fd/2").readlink()), status.st_size)
        except OSError:
            return None

    def read(self) -> str:
        """Read what was written since, the last 64 KiB of it. Empty if it can't be read."""
        try:
            with Path(self.path).open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self.offset, end - _TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


def load_error(
    spec: ModelSpec,
    error: BaseException,
    started_with: LimitsTried | None,
    log: LogPosition | None = None,
) -> EngineLoadError:
    """Put into words why vLLM could not load this model.

    `log`: where this load's output begins; a process of tensor parallelism tells its error there
    and nowhere else.
    """
    chain = _chain(error)
    said = " ".join(f"{type(link).__name__}: {link}" for link in chain)
    first = f"{type(error).__name__}: {error}"
    if _IN_A_WORKER in said and log is not None:
        logged = log.read()
        said += f" {logged}"
        if causes := _ERROR_LINE.findall(logged):
            first = f"in a worker process: {causes[-1]}"
    first = first[:_MOST_CHARACTERS]
    prefix = f"model {spec.name!r} could not be loaded"
    return (
        _memory_error(prefix, first, said, started_with)
        or _no_such_model(prefix, first, said, spec)
        or EngineLoadError(f"{prefix}: {first}")
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _memory_error(
    prefix: str, first: str, said: str, started_with: LimitsTried | None
) -> EngineLoadError | None:
    if in_use := _IN_USE.findall(said):
        # With several GPUs each tells its own: the fullest counts.
        free, total = min(
            ((float(free), float(total)) for free, total in in_use),
            key=lambda one: one[0] / one[1] if one[1] else 0.0,
        )
        return EngineLoadError(
            f"{prefix}: other processes use GPU memory, and only {free:.1f} of {total:.1f} GiB "
            "are free",
            retriable=True,
            retry=LoadRetry(in_use=GpuMemory(int(free * GIB), int(total * GIB))),
        )
    if _MEASURED_WRONG in said:
        return EngineLoadError(
            f"{prefix}: another process freed GPU memory while vLLM measured how much there is",
            retriable=True,
            retry=LoadRetry(),
        )
    if _NO_CACHE in said:
        return EngineLoadError(
            f"{prefix}: its weights and one step leave no memory for the KV cache. If smaller "
            "limits don't help, set a larger gpu_memory_utilization or tensor_parallel_size in the "
            "registry, or take a smaller or quantized model",
            retriable=True,
            retry=LoadRetry(too_large=_with_its_share(started_with)),
        )
    if too_long := _TOO_LONG.search(said):
        return EngineLoadError(f"{prefix}: {_say_too_long(too_long[1], _LONGEST.search(said))}")
    if says_out_of_memory(said):
        return EngineLoadError(
            f"{prefix}: out of memory ({first})",
            retriable=True,
            retry=LoadRetry(too_large=started_with),
        )
    return None


def _with_its_share(tried: LimitsTried | None) -> LimitsTried | None:
    """With less of the GPU's memory there would be even less for the cache."""
    if tried is None:
        return None
    return replace(tried, limits=replace(tried.limits, gpu_memory_utilization=None))


def _say_too_long(wanted: str, longest: re.Match[str] | None) -> str:
    fix = "a smaller max_model_len"
    if longest is not None:
        fix = f"max_model_len = {longest[1]} or less"
    return (
        f"one request of max_model_len {wanted} doesn't fit in the memory that is left for the KV "
        f"cache. Set {fix} for this model in the registry, or a larger gpu_memory_utilization"
    )


def _no_such_model(prefix: str, first: str, said: str, spec: ModelSpec) -> EngineLoadError | None:
    if Path(spec.source).expanduser().is_dir():
        return None
    signs = (
        *("LocalEntryNotFoundError", "OfflineModeIsEnabled", "RepositoryNotFoundError"),
        *("couldn't connect", "not a local folder", "offline mode"),
    )
    if not any(sign.lower() in said.lower() for sign in signs):
        return None
    return EngineLoadError(
        f"{prefix}: there is no folder {spec.source!r}, and no such model in the hub's cache or on "
        f"the hub ({first})"
    )
