"""Waiting until the GPU memory of an ended engine is free again.

The driver frees it a while after the process has ended. vLLM measures how much is free when it
starts and again after a trial step, and fails if that has grown meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from batch_app import gpus
from batch_app.core import GpuMemory

TIMEOUT_S = 30.0
SETTLED_S = 1.0
_LOOK_EVERY_S = 0.1
#: A desktop's few windows come and go.
_TOLERANCE_BYTES = 64 << 20
#: A GPU with so much of its memory free has nothing to wait for.
_NEARLY_ALL = 0.97


def read_gpu_memory() -> GpuMemory | None:
    """Return the memory of all GPUs that an engine would see; None without any that says."""
    readings = [reading for gpu in gpus.list_gpus() if (reading := gpus.memory(gpu)) is not None]
    if not readings:
        return None
    return GpuMemory(
        sum(reading.free_bytes for reading in readings),
        sum(reading.total_bytes for reading in readings),
    )


class GpuMemoryWait:
    """Waits before each load. Not thread-safe."""

    def __init__(
        self,
        read: Callable[[], GpuMemory | None] = read_gpu_memory,
        *,
        timeout_s: float = TIMEOUT_S,
        settled_s: float = SETTLED_S,
    ) -> None:
        """`timeout_s`: how long it may take at most. `settled_s`: how long nothing may have been
        freed before the wait ends."""
        self._read = read
        self._timeout_s = timeout_s
        self._settled_s = settled_s
        self._free_before: int | None = None  # the load before this one

    def wait(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Wait until as much is free as before the last load, or no more becomes free.

        Not at all without a GPU; not once `interrupted` answers True.
        """
        started = last_rise = time.monotonic()
        highest = -1
        while (memory := self._read()) is not None:
            now = time.monotonic()
            if memory.free_bytes > highest + _TOLERANCE_BYTES:
                highest, last_rise = memory.free_bytes, now
            if (
                self._is_enough(memory)
                or now - last_rise >= self._settled_s
                or now - started >= self._timeout_s
                or interrupted()
            ):
                self._free_before = memory.free_bytes
                return
            time.sleep(_LOOK_EVERY_S)

    def _is_enough(self, memory: GpuMemory) -> bool:
        nearly_all = memory.total_bytes * _NEARLY_ALL
        before = self._free_before
        enough = nearly_all if before is None else min(before - _TOLERANCE_BYTES, nearly_all)
        return memory.free_bytes >= enough
