"""GPUs, their driver, and what else a model needs to load on them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from batch_app import compiler, gpus
from batch_app.doctor.finding import Finding, fail, ok, size, warn
from batch_app.gpus import NvmlFault
from batch_app.machine import Machine

#: The CUDA that the set-up installs, for a torch that says none.
_CUDA = "13.0"
_ON_CPU = "to use the CPU meanwhile: VLLM_BATCH_ENGINE=cpu make setup"
_FULL_SHARE = 0.1


def look_at_gpus(machine: Machine, torch_cuda: str | None) -> Iterator[Finding]:
    """`torch_cuda`: the CUDA version that torch was built for."""
    visible = gpus.list_gpus()
    if not visible:
        yield _without_gpu(machine)
        return
    for gpu in visible:
        total = "memory shared with the machine"
        if gpu.memory_bytes is not None:
            total = size(gpu.memory_bytes)
        yield ok("GPU", f"{gpu.name}, {total}, driver {gpu.driver or 'unknown'}")
        memory = gpus.memory(gpu)
        if memory is not None and memory.used_bytes > _FULL_SHARE * memory.total_bytes:
            yield warn(
                "GPU memory",
                f"{size(memory.used_bytes)} of {size(memory.total_bytes)} are in use now",
                "ignore it if that is this server's own engine; else find the process with "
                "nvidia-smi and end it, or lower gpu_memory_utilization",
            )
    yield _driver(torch_cuda)
    yield _compiler()
    yield from _cuda_toolkit()


def _without_gpu(machine: Machine) -> Finding:
    problem = gpus.why_unavailable()
    if problem is None:
        return _none_listed(machine)
    if problem.fault is NvmlFault.NO_PYNVML:
        return fail("GPU", "can't be looked for: nvidia-ml-py is not installed", "make setup")
    if problem.fault is NvmlFault.NO_DRIVER and gpus.has_nvidia_card():
        return warn(
            "GPU",
            "there is an NVIDIA card, but no NVIDIA driver",
            f"install driver {gpus.oldest_driver(_CUDA)} or newer, restart, and run make setup",
        )
    is_here = gpus.kernel_driver_is_loaded() or gpus.has_nvidia_card()
    if not is_here and problem.fault in (NvmlFault.NO_DRIVER, NvmlFault.NOT_LOADED):
        return ok("CPU", f"{machine.device}; no NVIDIA GPU")
    message, fix = _BROKEN.get(
        problem.fault,
        ("the NVIDIA driver doesn't answer", "run nvidia-smi and repair what it says"),
    )
    return fail("GPU", f"{message} ({problem.message})", f"{fix}; {_ON_CPU}")


_BROKEN = {
    NvmlFault.VERSION_MISMATCH: (
        "the NVIDIA driver was updated, but the old one is still loaded",
        "restart the machine",
    ),
    NvmlFault.NO_PERMISSION: (
        "this user may not use the GPU",
        "allow it to read and write /dev/nvidia*, or start the container with --gpus all",
    ),
    NvmlFault.LIBRARY_MISSING: (
        "the NVIDIA kernel driver is loaded, but its library libnvidia-ml.so.1 is not found",
        "install the whole driver, or start the container with --gpus all",
    ),
    NvmlFault.NOT_LOADED: (
        "there is an NVIDIA card, but its kernel driver is not loaded",
        "run sudo modprobe nvidia; if that fails, install the driver again for this kernel",
    ),
}


def _none_listed(machine: Machine) -> Finding:
    """NVML answers, and CUDA would find nothing."""
    hidden = gpus.list_gpus({})
    if hidden:
        value = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return warn(
            "GPU",
            f"CUDA_VISIBLE_DEVICES={value!r} hides {hidden[0].name}",
            "unset it, or set it to the index or UUID that nvidia-smi -L shows",
        )
    if gpus.kernel_driver_is_loaded():
        return fail(
            "GPU",
            "the NVIDIA driver is loaded, but has no GPU that can be used",
            f"run nvidia-smi -L; with MIG on, create an instance; {_ON_CPU}",
        )
    return ok("CPU", f"{machine.device}; no NVIDIA GPU")


def _driver(torch_cuda: str | None) -> Finding:
    cuda = torch_cuda or _CUDA
    present, oldest = gpus.driver_version(), gpus.oldest_driver(cuda)
    supports = gpus.driver_supports(cuda)
    if supports is None:
        return ok("driver", f"{present or 'unknown'}; what CUDA {cuda} needs is not known")
    if supports:
        return ok("driver", f"{present}; CUDA {cuda} needs {oldest} or newer")
    return fail(
        "driver",
        f"{present} is too old: CUDA {cuda} needs {oldest} or newer",
        f"update the NVIDIA driver and restart; {_ON_CPU}",
    )


def _compiler() -> Finding:
    problem = compiler.find_problem()
    if problem is None:
        return ok("C compiler", f"{compiler.find_compiler()} compiles Python extensions")
    message = f"no model loads on the GPU, since Triton compiles C: {problem.message}"
    return fail("C compiler", message, problem.fix)


def _cuda_toolkit() -> Iterator[Finding]:
    """The toolkit is needed only by whoever asks for kernels that are compiled at load."""
    if os.environ.get("VLLM_USE_FLASHINFER_SAMPLER") != "1" or _has_nvcc():
        return
    if importlib.util.find_spec("flashinfer_jit_cache") is None:
        yield warn(
            "CUDA toolkit",
            "VLLM_USE_FLASHINFER_SAMPLER=1 compiles kernels with nvcc, which is not found",
            "unset it, install flashinfer-jit-cache, or install the CUDA toolkit and set CUDA_HOME",
        )


def _has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") is not None or Path(home, "bin", "nvcc").is_file()
