"""A process ends with the one that started it, however that ended."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

SCRIPT = """
import os, sys, time
from batch_app.engine.lifeline import die_with_parent
pid = os.fork()
if pid == 0:
    die_with_parent()
    sys.stdout.write(f"{os.getpid()}\\n")
    sys.stdout.flush()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_killed_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(120)
        gone, alive = psutil.wait_procs([child], timeout=120)
    for process in alive:
        process.kill()
    assert gone
