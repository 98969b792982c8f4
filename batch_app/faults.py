"""Crash points: named places in the code where a test may have the process die.

`VLLM_BATCH_CRASH_AT=NAME:N` kills this process, as `kill -9` would, when it comes to that place for
the Nth time. Without the variable a crash point does nothing.
"""

from __future__ import annotations

import os
import signal

#: Every place there is. A test sees to it that each stands in the code exactly once.
CRASH_POINTS = (
    "upload-moved",
    "upload-added",
    "check-moved",
    "check-told",
    "closing-published",
    "claimed",
    "segment-begun",
    "segment-sealed",
    "results-written",
    "results-committed",
    "progress-told",
    "suspects-written",
    "all-run",
    "finalizing",
    "file-written",
    "file-moved",
    "published",
    "ended",
    "given-back",
)

_name, _, _count = os.environ.get("VLLM_BATCH_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def _die(name: str) -> None:
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _go_on(name: str) -> None:
    pass


crash_point = _die if _name else _go_on
