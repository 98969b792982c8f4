"""An engine process is closed once everything under it has given its memory back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from batch_app.engine.process import EngineProcess, has_members
from support.waiting import wait_for


def test_closing_waits_for_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\nsleep 1000 &\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(launcher))
    process = EngineProcess(tmp_path / "engine.log", "host")
    group = process.pid
    members = wait_for(lambda: [p for p in psutil.process_iter() if is_sleep(p, group)])
    assert has_members(group)
    process.close()
    assert not has_members(group)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in members)


def is_sleep(process: psutil.Process, group: int) -> bool:
    try:
        return process.name() == "sleep" and os.getpgid(process.pid) == group
    except (OSError, psutil.Error):
        return False


def test_one_that_only_waits_to_be_reaped_is_no_member() -> None:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    assert has_members(child.pid)
    child.kill()
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert not has_members(child.pid)
    child.wait()
