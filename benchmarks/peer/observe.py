"""Runs a command and watches it from outside: how long, how much memory, when it said what."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 0.5
TAIL_LINES = 15


class RunFailed(Exception):
    """A contender's command ended with an error; the message has the end of what it said."""


@dataclass
class Observed:
    """`marks` are the times, in seconds from the start, of the lines that were asked for.

    `peak_mb` is the most that all its processes held at one time, in 10^6 bytes: proportional set
    size, so that what they share counts once.
    """

    wall_s: float = 0.0
    peak_mb: float = 0.0
    marks: list[float] = field(default_factory=list)


def observe(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    mark: str | None = None,
    cwd: Path | None = None,
) -> Observed:
    """Run it to its end. What it says goes to `log`; lines that hold `mark` are timed.

    Raises RunFailed when its exit code isn't 0.
    """
    observed = Observed()
    started = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(environment),
        cwd=cwd,
    )
    watch = MemoryWatch(process.pid)
    try:
        assert process.stdout is not None
        with log.open("wb") as said:
            for line in process.stdout:
                if mark is not None and mark.encode() in line:
                    observed.marks.append(time.perf_counter() - started)
                said.write(line)
        code = process.wait()
        observed.wall_s = time.perf_counter() - started
    finally:
        observed.peak_mb = watch.stop()
        end_tree(process)
    if code != 0:
        tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        raise RunFailed(f"exit code {code}; the end of {log}:\n" + "\n".join(tail))
    return observed


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of those under it."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        process.kill()
        process.wait()


class MemoryWatch:
    """Samples the memory of a process and of all under it, until `stop`."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End, and say what the peak was, in 10^6 bytes."""
        self._done.set()
        self._thread.join()
        return self._peak / 1e6

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._sample())
            if self._done.wait(SAMPLE_EVERY_S):
                return

    def _sample(self) -> int:
        total = 0
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return 0
        for process in processes:
            try:
                total += _proportional_bytes(process.pid)
            except (OSError, psutil.Error):
                continue  # it has ended meanwhile
        return total


def _proportional_bytes(pid: int) -> int:
    try:
        with Path(f"/proc/{pid}/smaps_rollup").open() as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except (PermissionError, FileNotFoundError):
        pass
    return int(psutil.Process(pid).memory_info().rss)
