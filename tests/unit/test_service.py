"""What systemd is told, and the files in deploy/ that ask for it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from batch_app.service import ServiceNotifier

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_reach_the_manager(tmp_path: Path, abstract: bool) -> None:
    shown = f"@vllm-batch-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + shown[1:] if abstract else shown)
        manager.settimeout(120)
        notifier = ServiceNotifier({"NOTIFY_SOCKET": shown, "WATCHDOG_USEC": "2500000"})
        assert notifier.watchdog_s == 2.5
        notifier.ready()
        notifier.alive()
        notifier.stopping()
        messages = [manager.recv(100) for _ in range(3)]
    assert messages == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "nobody")}):
        notifier = ServiceNotifier(environment)
        assert notifier.watchdog_s is None
        notifier.ready()
        notifier.alive()


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    environment = {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert ServiceNotifier(environment).watchdog_s is None


def test_units_are_good(tmp_path: Path) -> None:
    assert len(UNITS) == 2
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    copies = []
    for unit in UNITS:
        copies.append(tmp_path / unit.name)
        text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={shutil.which('true')}", unit.read_text())
        copies[-1].write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, copies)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_compose_file_is_good() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["services"]) == {"api", "worker"}
    for service in compose["services"].values():
        assert "data:/var/lib/vllm-batch" in service["volumes"]
        assert service["environment"]["VLLM_BATCH_DATA_DIR"] == "/var/lib/vllm-batch"
    assert compose["services"]["api"]["ports"] == ["127.0.0.1:8080:8080"]
