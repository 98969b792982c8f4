"""Steps that load models while memory is short or was just freed, as the worker does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from batch_app.self_check.step import Note, Options, StepFailed
from benchmarks.gpu.device_memory import GIB, blocked, free_and_total, wait_until_free
from benchmarks.gpu.shapes import shape_spec
from benchmarks.gpu.worker_engine import ask_one, engine_slot, entry

#: What a load takes of a GPU's memory if nobody says otherwise; vLLM's default is 0.90 or 0.92.
_UTILIZATION = 0.92
_BLOCKER_BYTES, _BLOCKER_BYTES_ON_CPU = 10 * 10**9, 256 << 20
#: What a driver keeps, or other processes take meanwhile.
_TOLERANCE_BYTES = GIB
_FREED_S = 30.0


def load_beside_blocker(options: Options, note: Note) -> str:
    """Load a model while another process holds memory that a load would take by default.

    Fails if the model doesn't load, if `gpu_memory_utilization` isn't lowered, or if the slot
    remembers lower limits: the memory is short for now only. On a CPU nothing is lowered.
    """
    on_gpu, folder = options["on_gpu"], Path(options["folder"])
    model = entry(options["spec"])
    free, total = free_and_total(on_gpu=on_gpu)
    # So much that what is left is less than what a load takes.
    blocker_bytes = max(_BLOCKER_BYTES, int((1 - _UTILIZATION) * total) + 2 * GIB)
    if not on_gpu:
        blocker_bytes = _BLOCKER_BYTES_ON_CPU
    note(free_bytes=free, total_bytes=total, blocker_bytes=blocker_bytes)
    said: list[str] = []
    with (
        blocked(blocker_bytes, on_gpu=on_gpu, log=folder / "blocker.log"),
        engine_slot(folder, options["timeout_s"]) as (slot, remembered),
    ):
        note(free_beside_blocker=free_and_total(on_gpu=on_gpu)[0])
        started = time.monotonic()
        host, info = slot.take(model, said.append)
        seconds = time.monotonic() - started
        note(
            load_s=round(seconds, 1),
            utilization=info.gpu_memory_utilization,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            num_retries=len(said),
            remembered=remembered.exists(),
        )
        ask_one(host, info)
        if remembered.exists():
            raise StepFailed(f"lower limits are remembered ({said[-1] if said else 'no retry'})")
    lowered = info.gpu_memory_utilization
    if on_gpu and (lowered is None or lowered * total > free - blocker_bytes + _TOLERANCE_BYTES):
        raise StepFailed(f"the model loaded with a gpu_memory_utilization of {lowered}")
    how = f"utilization {lowered:.2f}, {len(said)} retries" if lowered else "nothing to lower"
    return f"loaded in {seconds:.1f} s beside {blocker_bytes / 1e9:.1f} GB ({how})"


def switch_models(options: Options, note: Note) -> str:
    """Load one model, then another, and so on, `num_switches` times; ask each something.

    Fails if a load fails, if lower limits are remembered, or if memory isn't free afterwards.
    """
    on_gpu, folder = options["on_gpu"], Path(options["folder"])
    other = shape_spec(options["shape"], folder, on_gpu=on_gpu)
    models = (
        entry(options["spec"]),
        entry({"name": other.name, "source": other.source, "engine_args": other.engine_args}),
    )
    free_before, _ = free_and_total(on_gpu=on_gpu)
    note(free_before=free_before)
    loads: list[dict[str, Any]] = []
    with engine_slot(folder, options["timeout_s"]) as (slot, remembered):
        for number in range(options["num_switches"] + 1):
            model = models[number % 2]
            said: list[str] = []
            started = time.monotonic()
            host, info = slot.take(model, said.append)
            seconds = time.monotonic() - started
            ask_one(host, info)
            loads.append(
                {
                    "model": model.name,
                    "seconds": round(seconds, 1),
                    "free_bytes": free_and_total(on_gpu=on_gpu)[0],
                    "max_num_seqs": info.max_num_seqs,
                    "utilization": info.gpu_memory_utilization,
                    "retries": said,
                }
            )
            note(loads=loads)
        lower = remembered.exists()
    started = time.monotonic()
    free = wait_until_free(free_before - _TOLERANCE_BYTES, on_gpu=on_gpu, timeout_s=_FREED_S)
    note(free_after=free, freed_after_s=round(time.monotonic() - started, 1), remembered=lower)
    if lower:
        raise StepFailed("lower limits are remembered after a switch")
    if on_gpu and free < free_before - _TOLERANCE_BYTES:
        raise StepFailed(f"{(free_before - free) / GIB:.1f} GiB are still in use after the last")
    longest = max(load["seconds"] for load in loads)
    num_retries = sum(len(load["retries"]) for load in loads)
    return (
        f"{options['num_switches']} switches, {len(loads)} loads of {longest:.1f} s at most, "
        f"{num_retries} retries, {free / GIB:.1f} of {free_before / GIB:.1f} GiB free afterwards"
    )
