"""This machine, as estimates and provenance speak of it: its device, its driver, its name."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

from batch_app.gpus import list_gpus


@dataclass(frozen=True, slots=True)
class Machine:
    """`device` is the product's name of the first GPU that CUDA uses, or of the CPU without one.

    `device_type` "gpu" or "cpu", `driver` the GPU's, `memory_bytes` the device's: of a MIG slice
    the slice's, and the machine's if the GPU shares it. `name` tells machines with the same device
    apart.
    """

    device: str
    device_type: str
    name: str
    driver: str | None = None
    memory_bytes: int | None = None


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Ask the driver once per process, under the CUDA_VISIBLE_DEVICES of that time."""
    gib = round(psutil.virtual_memory().total / (1 << 30))
    cores = len(os.sched_getaffinity(0))
    name = f"{platform.node()}, {cores} cores, {gib} GiB"
    total = psutil.virtual_memory().total
    gpu = next(iter(list_gpus()), None)
    if gpu is not None:
        return Machine(gpu.name, "gpu", name, gpu.driver, gpu.memory_bytes or total)
    return Machine(cpu_name(), "cpu", name, None, total)


def hub_folder(source: str) -> Path:
    """Where the model hub's cache would keep this id."""
    home = os.environ.get("HF_HOME")
    if not home:
        home = f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    return cache / f"models--{source.replace('/', '--')}"


def cpu_name() -> str:
    """The processor's own name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def host_identity() -> str:
    """This machine since its last start, and this container of it: where process ids mean
    something."""
    boot = container = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        container = str(Path("/proc/self/ns/pid").readlink())
    return f"{platform.node()}/{boot}/{container}"


def process_lives(pid: int, started_at: float) -> bool:
    """Whether the process with this id that was started at this Unix time still runs here."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_at) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
