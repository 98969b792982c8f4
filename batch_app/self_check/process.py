"""Runs one step in a process of its own, for as long as it may take, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from batch_app.self_check.step import Figures, Options, Status, Step, StepFailed, StepResult

_PACKAGE_ROOT = str(Path(__file__).parents[2])
_CHILD = "batch_app.self_check.child"
#: For writing the stacks of a step that hangs, and for its processes to end.
_DUMP_S, _END_S = 1.0, 10.0
_TAIL_LINES, _TAIL_BYTES = 25, 16_384


def run_step(step: Step, options: Options, *, timeout_s: float, folder: Path) -> StepResult:
    """Run it to its end, or kill it after `timeout_s`. `folder` gets its files; it must exist."""
    result, log = folder / f"{step.name}.result", folder / f"{step.name}.log"
    own = folder / step.name
    own.mkdir(exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, step.target, str(result)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": _python_path()},
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            text = json.dumps({**step.options, **options, "folder": str(own)})
            process.stdin.write(text.encode())
        exit_code = _wait(process, timeout_s)
        if exit_code is None:
            _dump_stacks(process)
    finally:
        _end(process)
    seconds = time.monotonic() - started
    status, message, figures = _read(result)
    if exit_code is None:
        status, message = Status.FAIL, f"did not end within {timeout_s:.0f} s and was killed"
    elif status is Status.RUNNING:
        status, message = Status.FAIL, f"its process ended ({_ending(exit_code)})"
    tail = _tail([log, *own.glob("*.log")]) if status is Status.FAIL else ()
    return StepResult(step.name, status, round(seconds, 1), message, figures, False, tail)


def call(target: str, options: Options, *, timeout_s: float, folder: Path, name: str) -> Figures:
    """Run a function of a step in another process, and return the figures that it noted.

    It ends with the step's process, and its output goes to `folder`/`name`.log.

    Raises StepFailed if it fails, crashes or takes longer than `timeout_s`.
    """
    result = folder / f"{name}.result"
    with (folder / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, target, str(result)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        process.communicate(json.dumps(dict(options)).encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise StepFailed(f"{name} did not end within {timeout_s:.0f} s") from None
    finally:
        _end_tree(process)
    status, message, figures = _read(result)
    if status is not Status.PASS:
        raise StepFailed(f"{name}: {message or _ending(process.returncode)}")
    return figures


def _python_path() -> str:
    """So that the child finds this package also if it isn't installed."""
    present = os.environ.get("PYTHONPATH")
    return os.pathsep.join([_PACKAGE_ROOT, present] if present else [_PACKAGE_ROOT])


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=timeout_s)
    return None


def _dump_stacks(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGUSR1)
    time.sleep(_DUMP_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the step, its group, and those of its children that have a group of their own."""
    children = _children(process)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _kill(children)
    process.wait()


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    children = _children(process)
    process.kill()
    _kill(children)
    process.wait()


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.Error:
        return []


def _kill(processes: list[psutil.Process]) -> None:
    """And wait: what follows wants the device's memory."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=_END_S)


def _read(path: Path) -> tuple[Status, str, Figures]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Status(found["status"]), found["message"], found["figures"]
    except (OSError, ValueError, KeyError):
        return Status.RUNNING, "", {}


def _ending(exit_code: int) -> str:
    if exit_code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _tail(logs: Iterable[Path]) -> tuple[str, ...]:
    lines: list[str] = []
    for path in logs:
        with contextlib.suppress(OSError):
            text = path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
            if found := text.strip().splitlines()[-_TAIL_LINES:]:
                lines += [f"--- {path.name}", *found]
    return tuple(lines)
