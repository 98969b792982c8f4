"""Run compilations in processes that can be killed, a few at a time, each with a deadline."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from batch_app.engine.lifeline import die_with_parent

#: Seconds after which one is killed that gets no processor time. Below `engine_hang_s`.
MAX_WALL_S = 180.0
_OUT_OF_MEMORY = 3
_ADVICE = "Use smaller counts (maxLength, {n,m}), fewer alternatives, or a simpler grammar."


class Verdict(NamedTuple):
    """`refusal`: why this constraint can't be used, for its sender; empty if it can."""

    key: bytes
    refusal: str


class _Process(NamedTuple):
    key: bytes
    pid: int
    deadline: float


class Compilations:
    """Those that run and those that wait. One thread; the process may have no other."""

    def __init__(self, max_running: int, max_wall_s: float = MAX_WALL_S) -> None:
        self._max_running = max_running
        self._max_wall_s = max_wall_s
        self._waiting: deque[tuple[bytes, Callable[[Any], None], Any]] = deque()
        self._running: dict[int, _Process] = {}  # by the descriptor of the process
        #: Whether `wait` found something to read.
        self.has_input = False

    def add(self, key: bytes, run: Callable[[Any], None], argument: Any) -> None:
        """Call `run(argument)` in a process of its own, as soon as there is room."""
        self._waiting.append((key, run, argument))
        self._start()

    def wait(self, line: socket.socket) -> list[Verdict]:
        """Wait until `line` has something to read, or a compilation ended; the verdicts on those
        that did."""
        deadlines = [process.deadline for process in self._running.values()]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        readable, _, _ = select.select([line.fileno(), *self._running], (), (), timeout_s)
        self.has_input = line.fileno() in readable
        verdicts = []
        now = time.monotonic()
        for descriptor, process in list(self._running.items()):
            is_late = process.deadline <= now
            if descriptor not in readable and not is_late:
                continue
            if descriptor not in readable:
                os.kill(process.pid, signal.SIGKILL)
            _, status = os.waitpid(process.pid, 0)
            os.close(descriptor)
            del self._running[descriptor]
            exit_code = os.waitstatus_to_exitcode(status)
            verdicts.append(Verdict(process.key, _refusal(exit_code)))
        self._start()
        return verdicts

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            key, run, argument = self._waiting.popleft()
            pid = os.fork()
            if not pid:
                exit_code = 1
                try:
                    die_with_parent()
                    run(argument)
                    exit_code = 0
                except MemoryError:
                    exit_code = _OUT_OF_MEMORY
                finally:
                    os._exit(exit_code)
            process = _Process(key, pid, time.monotonic() + self._max_wall_s)
            self._running[os.pidfd_open(pid)] = process

    def close(self) -> None:
        """Kill what runs, forget what waits."""
        self._waiting.clear()
        for descriptor, process in self._running.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
            os.close(descriptor)
        self._running.clear()


def _refusal(exit_code: int) -> str:
    if exit_code == 0:
        return ""
    if exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"The constraint of this request takes too long to compile. {_ADVICE}"
    if exit_code == _OUT_OF_MEMORY:
        return f"The constraint of this request takes too much memory to compile. {_ADVICE}"
    return f"The compiler of constraints fails on that of this request. {_ADVICE}"
