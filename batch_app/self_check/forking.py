"""Steps that try what the engine process does before any model loads: it leaves the network and
forks its core, which is the first to use the GPU. Where a fork would lose the GPU, it spawns it.
"""

from __future__ import annotations

import os
from pathlib import Path

from batch_app.engine import vllm_probe
from batch_app.engine.isolation import ON_LOOPBACK, isolate_network
from batch_app.engine.vllm_core_start import choose_core_start, start_facts
from batch_app.self_check.process import call
from batch_app.self_check.step import Note, Options, StepFailed

_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def before_the_fork(options: Options, note: Note) -> str:
    """Import what the engine imports. Fails if that initializes CUDA: a fork couldn't use it."""
    vllm_probe.import_engine()
    facts = start_facts()
    start = choose_core_start(facts)
    note(
        cuda_is_initialized=facts.is_cuda_initialized,
        device_count_result=facts.device_count_result,
        core_start=start.method,
        reason=start.reason,
        nvml_is_loaded="libnvidia-ml" in Path("/proc/self/maps").read_text(errors="replace"),
        num_threads=len(list(Path("/proc/self/task").iterdir())),
    )
    result = facts.device_count_result
    if options["on_gpu"] and result is None:
        raise StepFailed("NVIDIA's driver library libcuda.so.1 is not found")
    if facts.is_cuda_initialized or result not in (None, _NOT_INITIALIZED):
        raise StepFailed(
            "importing the engine's libraries initializes CUDA: torch.cuda.is_initialized() is "
            f"{facts.is_cuda_initialized}, cuDeviceGetCount() returns {result}"
        )
    found = "no CUDA driver here" if result is None else f"cuDeviceGetCount() returns {result}"
    return f"CUDA is not initialized ({found}); the engine uses {start.method} ({start.reason})"


def compute_in_isolation(options: Options, note: Note) -> str:
    """Leave the network, import, start a process as the engine does, and have it compute."""
    refused = ""
    try:
        isolate_network()
    except OSError as error:
        refused = error.strerror or str(error)
    else:
        os.environ.update(ON_LOOPBACK)
    note(isolated=not refused, refused=refused)
    vllm_probe.import_engine()
    method = choose_core_start(start_facts()).method
    if method == "fork":
        found = vllm_probe.compute_in_fork(on_gpu=options["on_gpu"])
    else:
        found = call(
            f"{__name__}:compute",
            options,
            timeout_s=options["timeout_s"],
            folder=Path(options["folder"]),
            name="spawned",
        )
    note(core_start=method, **found)
    if "error" in found:
        raise StepFailed(f"a process started by {method} can't compute: {found['error']}")
    if not found["is_exact"]:
        raise StepFailed(f"a process started by {method} computes a wrong product")
    device = "GPU" if options["on_gpu"] else "CPU"
    network = f"not isolated ({refused})" if refused else "in a network of its own"
    return f"a process started by {method} computes on the {device}, {network}"


def compute(options: Options, note: Note) -> str:
    """The spawned process of `compute_in_isolation`."""
    note(is_exact=vllm_probe.product_is_exact(on_gpu=options["on_gpu"]))
    return "computed"
