"""The engine process is in a network of its own, where the kernel allows it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from batch_app.config import load_settings
from batch_app.engine import isolation
from batch_app.engine.base import ModelSpec
from batch_app.engine.host import EngineHost
from batch_app.engine.isolation import needs_network, prepare_nvidia_devices
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.slot import EngineSlot
from batch_app.registry import ModelEntry
from support.network import has_loopback_up, interfaces_of, network_of
from support.site import REPO

SIM = ModelSpec(name="sim", engine="sim", source="sim")
#: Loads an engine, asks it something, and tells of its network: how many interfaces, capabilities.
SCRIPT = """
import logging, sys
from pathlib import Path
from batch_app.engine.base import ModelSpec
from batch_app.engine.host import EngineHost
from contract.engine_conformance import chat, run
from support.network import has_loopback_up, interfaces_of, network_of
import os
logging.basicConfig(format="%(message)s", stream=sys.stdout)
engine = EngineHost(ModelSpec(name="sim", engine="sim", source="sim"), log_path=Path(sys.argv[1]))
engine.load()
(outcome,) = run(engine, chat(1))
assert outcome.status_code == 200
print("own network:", network_of(engine.pid) != network_of(os.getpid()))
print("interfaces:", *interfaces_of(engine.pid), has_loopback_up(engine.pid))
for line in Path(f"/proc/{engine.pid}/status").read_text().splitlines():
    if line.startswith(("Uid", "CapEff")):
        print(*line.split())
engine.close()
"""
#: The engine process's own way, with a stand-in for NVIDIA's driver.
MODPROBE = """
import os, sys
from pathlib import Path
from batch_app.engine import child, isolation
folder = Path(sys.argv[1]).parent
isolation._NVIDIA_DRIVER = str(folder / "nvidiactl")
outside = os.readlink("/proc/self/ns/net")
print("refused:", child._isolate())
print("has moved:", os.readlink("/proc/self/ns/net") != outside)
for line in (folder / "called").read_text().splitlines():
    words = line.split()
    print("called outside:", words.pop() == outside, *words)
"""
#: What comes after the namespace is refused.
REFUSED_HALFWAY = """
import os
from batch_app.engine import isolation
from support.network import network_of
def refuse(): raise PermissionError(1, "No loopback for you")
isolation._bring_up_loopback = refuse
before = network_of(os.getpid())
try:
    isolation.isolate_network()
except OSError as error:
    print("refused:", error.strerror)
print("as before:", network_of(os.getpid()) == before)
"""


def run_within(tmp_path: Path, *prefix: str, script: str = SCRIPT) -> str:
    """What the script prints, when this command starts it; skips where that isn't allowed."""
    if shutil.which(prefix[0]) is None or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip(f"{' '.join(prefix)} isn't possible here")
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script, str(tmp_path / "engine.log")],
        env=os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_has_a_loopback_and_nothing_else(tmp_path: Path) -> None:
    engine = EngineHost(SIM, log_path=tmp_path / "engine.log")
    engine.load()
    assert engine.pid
    assert network_of(engine.pid) != network_of(os.getpid())
    assert interfaces_of(engine.pid) == ["lo"]
    assert has_loopback_up(engine.pid)
    engine.close()


def test_also_where_the_worker_is_not_root(tmp_path: Path) -> None:
    """Needs a user namespace then, in which it is nobody else, and has no power over anything."""
    said = run_within(tmp_path, "unshare", "--user", "--map-user=1000", "--map-group=1000")
    assert "own network: True\ninterfaces: lo True\n" in said
    assert "Uid: 1000 1000 1000 1000\n" in said
    assert "CapEff: 0000000000000000\n" in said


def test_where_the_kernel_refuses_it_warns_and_runs(tmp_path: Path) -> None:
    """A user namespace in which no network namespace may be made."""
    limit = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    said = run_within(tmp_path, "unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh")
    assert "own network: False\n" in said
    assert "The engine has no network of its own (No space left on device)" in said


def add_modprobe(folder: Path, text: str) -> None:
    (folder / "nvidiactl").touch()
    tool = folder / "bin" / "nvidia-modprobe"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$@" $(readlink /proc/self/ns/net) >> {folder}/called\n{text}\n'
    )
    tool.chmod(0o755)


def test_cudas_module_is_loaded_before_the_isolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the namespace nobody is root, so that nvidia-modprobe could no longer load it."""
    add_modprobe(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    said = run_within(tmp_path, *prefix, script=MODPROBE)
    assert said == "refused: \nhas moved: True\ncalled outside: True -u -c 0\n"


def test_a_module_that_cant_be_loaded_is_logged_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(isolation, "_NVIDIA_DRIVER", str(tmp_path / "nvidiactl"))
    prepare_nvidia_devices()  # neither tool nor driver
    add_modprobe(tmp_path, "echo Operation not permitted >&2; exit 3")
    prepare_nvidia_devices()
    assert [record.message for record in caplog.records] == [
        "nvidia-modprobe failed with 3: Operation not permitted"
    ]
    (tmp_path / "bin" / "nvidia-modprobe").write_text("#!/no/such/interpreter\n")
    prepare_nvidia_devices()
    assert "could not be run" in caplog.records[-1].message
    (tmp_path / "nvidiactl").unlink()
    prepare_nvidia_devices()
    assert len(caplog.records) == 2


def test_a_refusal_halfway_changes_nothing(tmp_path: Path) -> None:
    """There would be no way back."""
    prefix = ("unshare", "--user", "--map-root-user")
    said = run_within(tmp_path, *prefix, script=REFUSED_HALFWAY)
    assert said == "refused: Operation not permitted\nas before: True\n"


@pytest.mark.parametrize(
    ("settings", "is_own"),
    [
        ({}, True),
        ({"engine_network": "host"}, False),
        ({"media_domains": "images.example.com"}, False),
    ],
)
def test_the_slot_takes_the_machines_network_where_it_is_needed(
    tmp_path: Path, settings: dict[str, Any], is_own: bool
) -> None:
    slot = EngineSlot(
        load_settings(data_dir=tmp_path, **settings),
        tmp_path / "engine.log",
        threading.Event().is_set,
        LoweredLimits(tmp_path / "lowered.json"),
    )
    engine, _ = slot.take(ModelEntry(name="sim", source="sim", engine="sim"))
    assert engine.pid
    assert (network_of(engine.pid) != network_of(os.getpid())) is is_own
    slot.unload()


@pytest.mark.parametrize(
    ("engine_args", "is_needed"),
    [
        ({}, False),
        ({"tensor_parallel_size": 4, "distributed_executor_backend": "mp"}, False),
        ({"nnodes": 1}, False),
        ({"nnodes": 2}, True),
        ({"distributed_executor_backend": "ray"}, True),
        ({"data-parallel-backend": "ray"}, True),
        ({"kv_transfer_config": {"kv_connector": "NixlConnector"}}, True),
        ({"master-addr": "10.0.0.1"}, True),
    ],
)
def test_what_reaches_other_machines(engine_args: dict[str, Any], is_needed: bool) -> None:
    assert needs_network("vllm", engine_args) is is_needed
    assert needs_network("openai", engine_args)
