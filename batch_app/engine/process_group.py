"""End the processes that an engine started, in order: by themselves, by SIGTERM, by SIGKILL.

vLLM's workers for several GPUs share memory under /dev/shm. What they leave there when they are
killed is removed by multiprocessing's resource tracker, one more process, which ends after the last
of them: it is never signalled before they are gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

import psutil

_TRACKER = "multiprocessing.resource_tracker"
_TERMINATE_S = 3.0
_KILL_S = 5.0
_LOOK_S = 0.01


def group_members(group_id: int) -> list[psutil.Process]:
    """The living processes of a process group; zombies hold nothing any more."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(pid) == group_id:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
    return members


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that this one started, and theirs."""
    with contextlib.suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def end_processes(processes: Sequence[psutil.Process], *, patience_s: float) -> None:
    """Wait until these have ended; have them end if they haven't after `patience_s`.

    Returns when they are gone, after about 10 s more than that in the worst case.
    """
    alive = _wait(processes, patience_s)
    trackers = [process for process in alive if _is_tracker(process)]
    workers = [process for process in alive if process not in trackers]
    for process in workers:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    workers = _wait(workers, _TERMINATE_S)
    for process in workers:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait(workers, _KILL_S)
    for process in _wait(trackers, _TERMINATE_S):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _wait(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still live after that. Unlike psutil's own, it takes no child's exit code away."""
    deadline = time.monotonic() + timeout_s
    while (alive := [one for one in processes if _is_alive(one)]) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any(_TRACKER in word for word in process.cmdline())
    except psutil.Error:
        return False
