"""How much of the device's memory is free, and a process that takes some of it away."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from batch_app import gpus
from batch_app.engine.lifeline import die_with_parent
from batch_app.self_check.step import StepFailed

GIB = 1 << 30
_READY = "ready"
_READY_S = 60.0


def free_and_total(*, on_gpu: bool) -> tuple[int, int]:
    """Bytes of the first GPU's memory, or of the machine's. Raises StepFailed if NVML says none."""
    if not on_gpu:
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    for gpu in gpus.list_gpus()[:1]:
        if found := gpus.memory(gpu):
            return found.free_bytes, found.total_bytes
    raise StepFailed("NVML doesn't say how much GPU memory is free")


def wait_until_free(num_bytes: int, *, on_gpu: bool, timeout_s: float) -> int:
    """Wait until so much is free, or the time is over. Returns what is free then."""
    deadline = time.monotonic() + timeout_s
    while (free := free_and_total(on_gpu=on_gpu)[0]) < num_bytes and time.monotonic() < deadline:
        time.sleep(0.2)
    return free


@contextmanager
def blocked(num_bytes: int, *, on_gpu: bool, log: Path) -> Iterator[Callable[[], None]]:
    """Have another process hold this much of the device's memory. Yields what frees it earlier.

    Raises StepFailed if it doesn't get the memory.
    """
    command = [sys.executable, "-m", __name__, str(num_bytes), "cuda" if on_gpu else "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output)

    def free() -> None:
        process.kill()
        process.wait()

    try:
        assert process.stdout is not None
        said = process.stdout.readline().decode().strip()
        if said != _READY:
            raise StepFailed(f"a process that was to hold {num_bytes / GIB:.1f} GiB got {said!r}")
        yield free
    finally:
        free()


def _hold(num_bytes: int, device: str) -> None:
    """Take the memory, say so, and keep it until this process is killed."""
    import torch

    held = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    print(_READY, flush=True)
    while held.numel():
        time.sleep(3600)


if __name__ == "__main__":
    die_with_parent()
    _hold(int(sys.argv[1]), sys.argv[2])
