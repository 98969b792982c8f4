"""Compilations run in processes that can be killed: each gets a verdict, whatever it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

#: In a process of its own: it forks, which one with other threads must not do.
_PROGRAM = """
import ctypes, json, os, resource, signal, socket, sys, time
from batch_app.engine.grammar_processes import Compilations

def run(what):
    if what == "good":
        return
    if what == "memory":
        raise MemoryError
    if what == "crash":
        os.abort()
    if what == "raises":
        raise SystemExit(7)
    if what == "processor":
        resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
        while True:
            pass
    signal.pause()  # "asleep": no processor time, and no end

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
ours, theirs = socket.socketpair()
compilations = Compilations(max_running=2, max_wall_s=float(sys.argv[1]))
wanted = sys.argv[2:]
for what in wanted:
    compilations.add(what.encode(), run, what)
found = {}
while len(found) < len(wanted):
    found.update((verdict.key.decode(), verdict.refusal) for verdict in compilations.wait(ours))
theirs.send(b"x")
compilations.add(b"last", run, "asleep")
assert compilations.wait(ours) == [] and compilations.has_input
compilations.close()
try:
    os.waitpid(-1, os.WNOHANG)
    found["left"] = "a process"
except ChildProcessError:
    pass
print(json.dumps(found))
"""


def verdicts(max_wall_s: float, *wanted: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(max_wall_s), *wanted],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_each_has_its_verdict_and_none_stops_another() -> None:
    found = verdicts(600.0, "memory", "crash", "raises", "processor", "good")
    assert set(found) == {"memory", "crash", "raises", "processor", "good"}
    assert found["good"] == ""
    assert "too much memory" in found["memory"]
    assert "takes too long" in found["processor"]
    assert "fails" in found["crash"]
    assert "fails" in found["raises"]


def test_one_without_processor_time_ends_at_its_deadline() -> None:
    assert "takes too long" in verdicts(0.2, "asleep")["asleep"]
