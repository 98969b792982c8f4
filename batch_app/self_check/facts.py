"""The first step: what this machine is, in the words of NVML, the driver, torch and `doctor`."""

from __future__ import annotations

import platform
import sys
from typing import Any

from batch_app import gpus
from batch_app.engine import vllm_probe
from batch_app.machine import cpu_name
from batch_app.self_check.step import Note, Options, StepFailed


def device_facts(options: Options, note: Note) -> str:
    """Of the options: `on_gpu`; `doctor`: with the findings of `doctor` on the engine.

    Fails if a GPU is expected and one of them can't use it, or if `doctor` finds an error.
    """
    note(python=sys.version.split()[0], kernel=platform.release(), cpu=cpu_name())
    problem = gpus.why_unavailable()
    found: list[dict[str, Any]] = []
    for gpu in gpus.list_gpus():
        memory = gpus.memory(gpu)
        found.append(
            {
                "name": gpu.name,
                "driver": gpu.driver,
                "memory_bytes": gpu.memory_bytes,
                "used_bytes": memory.used_bytes if memory else None,
            }
        )
    note(gpus=found, nvml=None if problem is None else f"{problem.fault}: {problem.message}")
    errors = _doctor(note) if options.get("doctor") else []
    versions = vllm_probe.versions()
    note(versions=versions)
    device = vllm_probe.device_facts()
    note(device=device)
    libraries = f"vLLM {versions['vllm']}, torch {versions['torch']}"
    if options["on_gpu"]:
        if not found:
            raise StepFailed(f"NVML lists no GPU ({problem.message if problem else 'none there'})")
        if not device:
            raise StepFailed(f"torch {versions['torch']} can't use the GPU {found[0]['name']}")
        libraries += f", CUDA {versions['torch_cuda']}"
        name = f"{device['name']}, compute capability {device['compute_capability']}, "
        name += f"driver {found[0]['driver']}"
    else:
        name = f"{cpu_name()}, no GPU used"
    if errors:
        raise StepFailed(f"doctor: {'; '.join(errors)} ({name}; {libraries})")
    return f"{name}; {libraries}"


def _doctor(note: Note) -> list[str]:
    """Note what `doctor` finds out about engine and device. Returns its errors."""
    try:
        from batch_app.config import load_settings
        from batch_app.doctor.engine import look_at_engine
        from batch_app.doctor.finding import State
        from batch_app.machine import this_machine
    except ImportError as error:
        note(doctor=f"not asked: the Python package {error.name!r} is missing")
        return []
    findings = list(look_at_engine(load_settings(), this_machine()))
    note(doctor=[f"{one.state}: {one.subject}: {one.message}" for one in findings])
    return [f"{one.subject} {one.message}" for one in findings if one.state is State.FAIL]
