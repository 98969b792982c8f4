"""This machine, as estimates and provenance speak of it: its device, its driver, its name."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

NVIDIA_SMI_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """`device` is the product's name of the GPU, or of the CPU where there is none.

    `device_type` "gpu" or "cpu", `driver` the GPU's, `memory_bytes` the device's. `name` tells
    machines with the same device apart.
    """

    device: str
    device_type: str
    name: str
    driver: str | None = None
    memory_bytes: int | None = None


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Asks the driver once; imports no engine."""
    gib = round(psutil.virtual_memory().total / (1 << 30))
    cores = len(os.sched_getaffinity(0))
    name = f"{platform.node()}, {cores} cores, {gib} GiB"
    gpu = _gpu()
    if gpu is not None:
        device, driver, memory_bytes = gpu
        return Machine(device, "gpu", name, driver, memory_bytes)
    return Machine(cpu_name(), "cpu", name, None, psutil.virtual_memory().total)


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


def _gpu() -> tuple[str, str, int] | None:
    """Name, driver and bytes of the first GPU; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [tool, *query], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True
        )
        name, driver, mib = (part.strip() for part in done.stdout.splitlines()[0].rsplit(",", 2))
        return name, driver, int(float(mib)) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


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
