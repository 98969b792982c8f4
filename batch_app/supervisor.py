"""Server and worker in one terminal: start both, restart one that crashes, end both together.

Each child has a process group of its own, so that Ctrl-C reaches this process alone and the
children hear of it once, in the right way. A child that this process can't end any more (it was
killed itself) is told by the kernel: `PR_SET_PDEATHSIG`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

#: A child that lives this long has started well; crashes before it count as in a row.
STEADY_S = 60.0
MAX_CRASHES_IN_A_ROW = 5
MAX_BACKOFF_S = 30.0
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass
class _Child:
    name: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    crashes: int = 0
    restart_at: float = field(default=0.0)


class Supervisor:
    """Runs named commands until a signal, or until one of them can't be kept alive."""

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),  # noqa: T201
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = [_Child(name, command) for name, command in commands.items()]
        self._environment = dict(os.environ if environment is None else environment)
        self._say = say
        self._clock = clock
        self._signals: list[int] = []
        self._given_up = False

    def run(self) -> int:
        """Blocks. 0 when a signal asked for the end and every child drained; else 1."""
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            for child in self._children:
                self._start(child)
            while not self._signals and not self._given_up:
                self._look_after_children()
                time.sleep(POLL_S)
            return self._end()
        finally:
            for child in self._children:
                self._signal(child, signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _start(self, child: _Child) -> None:
        # Resolved before the fork: between fork and exec there may be no import.
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

        def before_exec() -> None:
            if prctl is not None:
                prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        child.process = subprocess.Popen(
            child.command,
            env=self._environment,
            process_group=0,
            preexec_fn=before_exec,  # noqa: PLW1509 - no threads here
            stdin=subprocess.DEVNULL,
        )
        child.started_at = self._clock()

    def _look_after_children(self) -> None:
        for child in self._children:
            if child.process is None:
                if self._clock() >= child.restart_at:
                    self._start(child)
                continue
            code = child.process.poll()
            if code is None:
                continue
            steady = self._clock() - child.started_at >= STEADY_S
            child.crashes = 1 if steady else child.crashes + 1
            child.process = None
            if child.crashes >= MAX_CRASHES_IN_A_ROW:
                self._say(f"❌ The {child.name} ended {child.crashes} times in a row. Giving up.")
                self._given_up = True
                return
            wait_s = min(2.0 ** (child.crashes - 1), MAX_BACKOFF_S)
            child.restart_at = self._clock() + wait_s
            self._say(f"⚠️  The {child.name} ended ({_ending(code)}). Again in {wait_s:g} s.")

    def _end(self) -> int:
        """Ask all to drain, and wait for them; a second signal kills."""
        for child in self._children:
            self._signal(child, signal.SIGTERM)
        killed = False
        while any(_runs(child) for child in self._children):
            if len(self._signals) > 1 and not killed:
                killed = True
                for child in self._children:
                    self._signal(child, signal.SIGKILL)
            time.sleep(POLL_S)
        codes = [child.process.returncode for child in self._children if child.process is not None]
        return 1 if killed or self._given_up or any(codes) else 0

    def _signal(self, child: _Child, number: int) -> None:
        if child.process is None or not _runs(child):
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(child.process.pid, number)  # its own children too
            else:
                child.process.send_signal(number)
        except ProcessLookupError:
            pass  # it has just ended by itself


def _runs(child: _Child) -> bool:
    return child.process is not None and child.process.poll() is None


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
