"""How to tell that a process ended for want of memory."""

from __future__ import annotations

import re
from pathlib import Path

_SAID = re.compile(
    r"out of memory|OutOfMemory|cannot allocate memory|\bMemoryError\b|bad_alloc|ALLOC_FAILED", re.I
)
_COUNTERS = Path("/proc/vmstat")


def says_out_of_memory(text: str) -> bool:
    """Whether an engine's last words speak of memory that it didn't get."""
    return _SAID.search(text) is not None


def num_oom_kills() -> int:
    """Processes that the kernel has ended for want of memory, since its start; 0 if unknown."""
    try:
        for line in _COUNTERS.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
