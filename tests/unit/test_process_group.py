"""Processes are ended in order: by themselves, by SIGTERM, by SIGKILL."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from batch_app.engine.process_group import descendants, end_processes, group_members
from support.waiting import wait_for

TERMINATED = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
WAIT = "print('ready', flush=True); time.sleep(600)"
#: Named as Python's own, which must outlive whoever has memory to share.
TRACKER = "import time; multiprocessing_resource_tracker = 'multiprocessing.resource_tracker'; "


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start_one(script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def test_a_process_is_terminated_before_it_is_killed(
    start: Callable[[str], subprocess.Popen[str]],
) -> None:
    polite, stubborn = start(TERMINATED + WAIT), start(STUBBORN + WAIT)
    end_processes([psutil.Process(polite.pid), psutil.Process(stubborn.pid)], patience_s=0.0)
    assert polite.wait() == 7  # nobody took its exit code away
    assert stubborn.wait() == -9


def test_a_process_that_ends_by_itself_gets_no_signal(
    start: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = start(TERMINATED + "print('ready', flush=True); time.sleep(0.3)")
    end_processes([psutil.Process(process.pid)], patience_s=60.0)
    assert process.wait() == 0


def test_the_resource_tracker_ends_after_the_others(
    start: Callable[[str], subprocess.Popen[str]],
) -> None:
    """It ends by itself then, having removed what they left."""
    worker = start(STUBBORN + WAIT)
    tracker = start(
        f"{TRACKER}import psutil; worker = psutil.Process({worker.pid}); "
        "print('ready', flush=True)\n"
        "while worker.is_running() and worker.status() != 'zombie': time.sleep(0.01)\n"
        "raise SystemExit(5)"
    )
    end_processes([psutil.Process(tracker.pid), psutil.Process(worker.pid)], patience_s=0.0)
    assert (worker.wait(), tracker.wait()) == (-9, 5)


def test_a_group_is_its_living_members(start: Callable[[str], subprocess.Popen[str]]) -> None:
    script = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(600)']); import time; "
    )
    head = start(script + WAIT)
    (child,) = descendants(head.pid)
    assert {process.pid for process in group_members(head.pid)} == {head.pid, child.pid}
    head.kill()  # a zombie: `wait` comes later
    wait_for(lambda: group_members(head.pid) == [child], what="only the child is left")
    end_processes(group_members(head.pid), patience_s=0.0)
    assert group_members(head.pid) == []


def test_nobody_is_waited_for_in_an_empty_group() -> None:
    started = time.monotonic()
    end_processes([], patience_s=60.0)
    assert time.monotonic() - started < 30
    assert descendants(os.getpid() + 2**22) == []
