"""`vllm-batch up`'s part: two children, restarted when they crash, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from batch_app import supervisor
from support.waiting import wait_for

#: A child that says that it runs, and drains when told to end.
GOOD = """
import pathlib, signal, sys, time
name = sys.argv[1]
def end(*_):
    pathlib.Path(name + ".drained").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, lambda *_: pathlib.Path(name + ".interrupted").touch())
with open(name + ".pids", "a") as file:
    file.write(str(__import__("os").getpid()) + "\\n")
while True:
    time.sleep(0.05)
"""
STUBBORN = GOOD.replace("sys.exit(0)", "pass")
PARENT = """
import sys
from batch_app.supervisor import Supervisor
children = {{
    name: [sys.executable, "-c", source, name] for name, source in {children!r}.items()
}}
sys.exit(Supervisor(children).run())
"""


class Terminal:
    """A supervisor in a process of its own, as a terminal would start it."""

    def __init__(self, folder: Path, children: dict[str, str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(children=children)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, name: str) -> list[int]:
        path = self.folder / f"{name}.pids"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self) -> tuple[int, str]:
        _, text = self.process.communicate(timeout=120)
        return self.process.returncode, text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_both(tmp_path: Path, number: signal.Signals) -> None:
    terminal = Terminal(tmp_path, {"a": GOOD, "b": GOOD})
    wait_for(lambda: terminal.pids("a") and terminal.pids("b"))

    terminal.process.send_signal(number)

    assert terminal.end() == (0, "")
    assert (tmp_path / "a.drained").exists()
    assert (tmp_path / "b.drained").exists()
    assert not (tmp_path / "a.interrupted").exists()


def test_a_second_signal_kills(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, {"a": STUBBORN})
    wait_for(lambda: terminal.pids("a"))
    terminal.process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "a.drained").exists)
    assert terminal.process.poll() is None

    terminal.process.send_signal(signal.SIGINT)

    code, _ = terminal.end()
    assert code == 1
    assert not psutil.pid_exists(terminal.pids("a")[0])


def test_a_crashed_child_is_started_again(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, {"a": GOOD, "b": GOOD})
    wait_for(lambda: terminal.pids("a") and terminal.pids("b"))
    os.kill(terminal.pids("a")[0], signal.SIGKILL)
    wait_for(lambda: len(terminal.pids("a")) == 2)

    terminal.process.send_signal(signal.SIGTERM)

    code, text = terminal.end()
    assert code == 0
    assert "SIGKILL" in text
    assert len(terminal.pids("b")) == 1


def test_a_child_that_never_stays_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_BACKOFF_S", 0.05)
    said: list[str] = []
    pid_file = tmp_path / "b.pids"
    code = supervisor.Supervisor(
        {
            "a": [sys.executable, "-c", "raise SystemExit(7)"],
            "b": [sys.executable, "-c", GOOD, str(tmp_path / "b")],
        },
        say=said.append,
    ).run()

    assert code == 1
    assert "exit code 7" in said[0]
    assert "Giving up" in said[-1]
    assert len(said) == supervisor.MAX_CRASHES_IN_A_ROW
    assert not pid_file.exists() or not psutil.pid_exists(int(pid_file.read_text()))


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, {"a": GOOD})
    wait_for(lambda: terminal.pids("a"))
    terminal.process.kill()
    terminal.end()
    wait_for((tmp_path / "a.drained").exists)
