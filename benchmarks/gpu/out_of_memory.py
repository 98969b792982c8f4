"""An engine that runs out of memory in the middle of its work starts again with smaller limits."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import psutil

from batch_app.engine.base import EngineInfo
from batch_app.engine.host import EngineHost
from batch_app.engine.limits import in_words
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineDied, EngineOutOfMemory
from batch_app.registry import ModelEntry
from batch_app.self_check.loaded_engine import LoadedEngine
from batch_app.self_check.step import Note, Options, StepFailed, StepSkipped
from benchmarks.gpu.device_memory import blocked, free_and_total
from benchmarks.gpu.shapes import completions, shape_spec, token_prompts
from benchmarks.gpu.throughput import require_lengths
from benchmarks.gpu.worker_engine import engine_slot, entry

#: The engine gets this share, so that another process can take all the rest.
_UTILIZATION = 0.4
#: What is left to the engine, besides what it holds already.
_LEFT_BYTES = 64 << 20
_LEFT_BYTES_ON_CPU = 8 << 20
_OUTPUT_TOKENS = 4


def recover(options: Options, note: Note) -> str:
    """Take the memory away that the next step needs, send a full step, and begin again.

    The logits of a full step are what takes most: a row of the whole vocabulary for each request.

    Fails if the engine dies of anything but memory, or doesn't come back with smaller limits.
    Skipped if it never runs out: what it had allocated before may be enough.
    """
    on_gpu, folder = options["on_gpu"], Path(options["folder"])
    more = {"gpu_memory_utilization": _UTILIZATION} if on_gpu else {}
    shape = shape_spec(options["shape"], folder, on_gpu=on_gpu, **more)
    model = entry({"name": shape.name, "source": shape.source, "engine_args": shape.engine_args})
    prompts = token_prompts(options["shape"], options["num_requests"], options["prompt_tokens"])
    with engine_slot(folder, options["timeout_s"]) as (slot, remembered):
        host, info = slot.take(model)
        before = _limits(info)
        note(before=before)
        _run_out(host, info, prompts, on_gpu=on_gpu, folder=folder)
        lowered = slot.lower()
        slot.lost()
        if lowered is None:
            raise StepFailed(f"there are no smaller limits than {before}")
        seconds = _answer_again(slot, model, prompts, note)
        note(after=in_words(lowered), remembered=remembered.exists())
    return f"ran out with {before}, answered with {in_words(lowered)}, {seconds:.1f} s to load"


def _run_out(
    host: EngineHost, info: EngineInfo, prompts: list[list[int]], *, on_gpu: bool, folder: Path
) -> None:
    """Raises StepFailed if it dies of something else, StepSkipped if it doesn't die."""
    engine = LoadedEngine(host, info)
    requests = completions(prompts, _OUTPUT_TOKENS)
    try:
        if on_gpu:
            free, _ = free_and_total(on_gpu=True)
            # A context takes memory beside what is asked for; what it is shows by trying.
            with blocked(free - (1 << 30), on_gpu=True, log=folder / "blocker.log"):
                rest, _ = free_and_total(on_gpu=True)
                more = max(rest - (600 << 20) - _LEFT_BYTES, 1)
                with blocked(more, on_gpu=True, log=folder / "second-blocker.log"):
                    engine.answer(requests, timeout_s=60.0)
        else:
            _limit_memory(host)
            engine.answer(requests, timeout_s=60.0)
    except EngineOutOfMemory:
        return
    except EngineDied as error:
        raise StepFailed(f"the engine died, and not of memory: {error.message}") from error
    raise StepSkipped("the engine answered all the same: what it had allocated was enough")


def _limit_memory(host: EngineHost) -> None:
    """Let no process of the engine have more memory than it has now."""
    assert host.pid is not None
    engine = psutil.Process(host.pid)
    for process in engine.children(recursive=True):
        limit = process.memory_info().vms + _LEFT_BYTES_ON_CPU
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))


def _answer_again(
    slot: EngineSlot, model: ModelEntry, prompts: list[list[int]], note: Note
) -> float:
    started = time.monotonic()
    host, info = slot.take(model)
    seconds = time.monotonic() - started
    note(load_again_s=round(seconds, 1))
    outcomes = LoadedEngine(host, info).answer(
        completions(prompts, _OUTPUT_TOKENS), timeout_s=120.0
    )
    require_lengths(outcomes, _OUTPUT_TOKENS)
    return seconds


def _limits(info: EngineInfo) -> str:
    return f"{info.max_num_seqs:,} requests and {info.max_num_batched_tokens or 0:,} tokens a step"
