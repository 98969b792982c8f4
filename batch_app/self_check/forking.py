"""Steps that try what the engine process does before any model loads: it leaves the network and
forks its core, which is the first to use the GPU.
"""

from __future__ import annotations

import os
from dataclasses import asdict

from batch_app.engine import vllm_probe
from batch_app.engine.isolation import ON_LOOPBACK, isolate_network
from batch_app.self_check.step import Note, Options, StepFailed


def before_the_fork(options: Options, note: Note) -> str:
    """Import what the engine imports. Fails if that initialises CUDA: the fork couldn't use it."""
    vllm_probe.import_engine()
    state = vllm_probe.cuda_state()
    note(**asdict(state))
    if options["on_gpu"] and state.device_count_status is None:
        raise StepFailed("NVIDIA's driver library libcuda.so.1 is not found")
    if not state.is_untouched:
        raise StepFailed(
            "importing the engine's libraries initialises CUDA: torch.cuda.is_initialized() is "
            f"{state.torch_initialized}, cuDeviceGetCount() returns {state.device_count_status}"
        )
    if state.device_count_status is None:
        return "no CUDA driver here; torch has not initialised CUDA"
    return "cuDeviceGetCount() returns 3 (not initialised)"


def compute_in_isolation(options: Options, note: Note) -> str:
    """Leave the network, import, fork, and have the fork compute on the device."""
    refused = ""
    try:
        isolate_network()
    except OSError as error:
        refused = error.strerror or str(error)
    else:
        os.environ.update(ON_LOOPBACK)
    note(isolated=not refused, refused=refused)
    vllm_probe.import_engine()
    found = vllm_probe.compute_in_fork(on_gpu=options["on_gpu"])
    note(**found)
    if "error" in found:
        raise StepFailed(f"a forked process can't compute: {found['error']}")
    if not found["is_exact"]:
        raise StepFailed("a forked process computes a wrong product")
    device = "GPU" if options["on_gpu"] else "CPU"
    network = f"not isolated ({refused})" if refused else "in a network of its own"
    return f"a forked process computes on the {device}, {network}"
