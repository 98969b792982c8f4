"""Whether the engine core is forked or spawned.

A fork saves a second import of vLLM, which takes several seconds, but CUDA doesn't survive it: once
the driver is initialized, a forked process can't use the GPU. On WSL, NVML doesn't survive a fork
either, and importing vLLM initializes that.
docs/decisions/0019-when-the-engine-core-is-spawned.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Literal, NamedTuple

from batch_app.errors import EngineLoadError

StartMethod = Literal["fork", "spawn"]

#: Chooses for the user, where it is set.
VARIABLE = "VLLM_BATCH_CORE_START"
_CUDA_ERROR_NOT_INITIALIZED = 3
#: What PyTorch says of a GPU that was lost in a fork.
_LOST_IN_FORK = ("cannot re-initialize cuda", "cuda driver initialization failed")


class CoreStart(NamedTuple):
    """`reason`: for the log."""

    method: StartMethod
    reason: str


class StartFacts(NamedTuple):
    """What decides. `device_count_result`: a `CUresult`, None where there is no CUDA driver."""

    chosen: str = ""
    is_on_cpu: bool = False
    kernel_release: str = ""
    is_cuda_initialized: bool = False
    visible_devices: str = ""
    device_count_result: int | None = None


def choose_core_start(facts: StartFacts) -> CoreStart:
    """Raises EngineLoadError if the user's choice is neither."""
    if facts.chosen == "fork":
        return CoreStart("fork", f"{VARIABLE} is set")
    if facts.chosen == "spawn":
        return CoreStart("spawn", f"{VARIABLE} is set")
    if facts.chosen:
        raise EngineLoadError(f'{VARIABLE}={facts.chosen}: choose "fork" or "spawn".')
    if facts.is_on_cpu:
        return CoreStart("fork", "vLLM runs on the CPU")
    if "microsoft" in facts.kernel_release.lower():
        return CoreStart("spawn", "NVML does not survive a fork on WSL")
    if facts.is_cuda_initialized:
        return CoreStart("spawn", "CUDA is initialized in this process")
    if "MIG-" in facts.visible_devices:
        return CoreStart("spawn", "CUDA_VISIBLE_DEVICES names MIG devices")
    if facts.device_count_result not in (None, _CUDA_ERROR_NOT_INITIALIZED):
        return CoreStart(
            "spawn",
            "the CUDA driver is not in its initial state "
            f"(cuDeviceGetCount returned {facts.device_count_result})",
        )
    return CoreStart("fork", "CUDA is not initialized in this process")


def start_facts() -> StartFacts:
    """Of this process, once vLLM is imported. Initializes nothing."""
    import torch
    from vllm.platforms import current_platform

    return StartFacts(
        chosen=os.environ.get(VARIABLE, ""),
        is_on_cpu=bool(current_platform.is_cpu()),
        kernel_release=platform.release(),
        is_cuda_initialized=torch.cuda.is_initialized(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        device_count_result=_device_count_result(),
    )


def is_lost_in_fork(error: BaseException) -> bool:
    """Whether this error, or what it was raised from, says that CUDA did not survive a fork."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if any(words in str(link).lower() for words in _LOST_IN_FORK):
            return True
        seen.append(link)
        link = link.__cause__ or link.__context__
    return False


def _device_count_result() -> int | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())))
    except (OSError, AttributeError):
        return None
