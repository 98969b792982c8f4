"""`vllm-batch doctor`: what it finds on a site that is well, and on ones that aren't."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner, Result

from acceptance.conftest import Running
from batch_app import database, floors
from batch_app.cli import app
from batch_app.core import utc_now
from batch_app.doctor import engine, service
from batch_app.doctor.finding import Finding, State
from batch_app.machine import Machine
from batch_app.store import Store, WorkerRow
from support.site import REPO, Site, echo_line
from support.waiting import wait_for

Findings = dict[str, dict[str, str]]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which nothing was ever started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_BATCH_PORT", "0")
    monkeypatch.setenv("VLLM_BATCH_MIN_FREE_BYTES", "0")
    return tmp_path


@pytest.fixture
def site(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Without any process."""
    made = Site(empty)
    for name in ("data_dir", "models", "benchmarks_dir"):
        monkeypatch.setenv(f"VLLM_BATCH_{name.upper()}", str(getattr(made.settings, name)))
    yield made
    made.close()


def doctor(*words: str) -> Result:
    done = CliRunner().invoke(app, ["doctor", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done


def findings(*words: str) -> Findings:
    """By what was looked at; the worst of each."""
    said = doctor("--json", *words)
    body = json.loads(said.stdout)
    found: Findings = {}
    for row in body["findings"]:
        assert set(row) == {"check", "status", "message", "fix"}
        assert bool(row["fix"]) == (row["status"] != "ok"), row
        if found.get(row["check"], {}).get("status") != "fail":
            found[row["check"]] = row
    fails = [row for row in found.values() if row["status"] == "fail"]
    assert said.exit_code == (11 if fails else 0)
    assert (body["status"] == "fail") == bool(fails)
    return found


def test_a_site_that_is_well(site: Site) -> None:
    found = findings()
    for check in ("settings", "engine network", "data folder", "database"):
        assert found[check]["status"] in ("ok", "warn"), found[check]
    assert found["database"]["message"].endswith("up to date")
    assert found["model"]["status"] == "ok"
    assert {"vllm-batch", "libraries", "vLLM", "torch", "memory"} <= set(found)


def test_in_an_empty_folder_it_makes_nothing(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_DATABASE_URL", f"sqlite:///{empty}/other/x.db")
    findings()
    monkeypatch.delenv("VLLM_BATCH_DATABASE_URL")
    found = findings()
    assert found["models"]["status"] == "fail"
    assert "no model registry" in found["models"]["message"]
    assert "made at the first start" in found["data folder"]["message"]
    assert found["worker"]["status"] == "warn"
    assert list(empty.iterdir()) == []


def test_in_words_each_with_its_fix(empty: Path) -> None:
    said = doctor()
    assert said.exit_code == 11
    assert "\x1b" not in said.output
    lines = said.stdout.splitlines()
    [place] = [n for n, line in enumerate(lines) if line.startswith("  fail  models")]
    assert lines[place + 1].strip().startswith("fix: vllm-batch models add")
    assert "❌" in said.stderr


def test_a_server_that_runs(working: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    address = urlsplit(working.url)
    settings = working.site.settings
    wait_for(working.site.store.list_workers, timeout_s=120, what="the worker shows itself")
    monkeypatch.setenv("VLLM_BATCH_HOST", str(address.hostname))
    monkeypatch.setenv("VLLM_BATCH_PORT", str(address.port))
    monkeypatch.setenv("VLLM_BATCH_HEARTBEAT_S", "1000")  # a slow machine is no finding
    monkeypatch.setattr(service, "_ANSWER_S", 120.0)
    words = ("--data-dir", str(settings.data_dir), "--models", str(settings.models))
    found = findings(*words)
    assert found["API server"]["status"] != "fail"
    assert f"runs at {working.url}" in found["API server"]["message"]
    assert found["worker"]["status"] == "ok"
    assert "(pid " in found["worker"]["message"]


def test_a_port_that_somebody_else_has(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    with listener.accept()[0] as caller:
                        caller.sendall(b"220 not yours\r\n")
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("VLLM_BATCH_PORT", str(listener.getsockname()[1]))
        found = findings()["API server"]
        assert found["status"] == "fail"
        assert "is taken by" in found["message"]
        assert "--port" in found["fix"]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_port_that_gives_no_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("VLLM_BATCH_PORT", str(listener.getsockname()[1]))
        found = findings()["API server"]
    assert (found["status"], "gives no answer" in found["message"]) == ("fail", True)


def test_an_open_address_without_keys(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_HOST", "0.0.0.0")
    assert "keys create" in findings()["API server"]["fix"]
    monkeypatch.setenv("VLLM_BATCH_NO_AUTH", "true")
    assert findings()["API server"]["status"] == "ok"


def test_batches_that_nobody_works_on(site: Site) -> None:
    site.submit([echo_line(0)], "sim")
    found = findings()["worker"]
    assert (found["status"], found["message"]) == (
        "fail",
        "none runs, and 1 unfinished batches wait for one",
    )
    long_ago = utc_now() - timedelta(days=1)
    site.store.report_worker(
        WorkerRow("worker_x", "host", 1, 0.0, long_ago, long_ago, "idle", None, None)
    )
    found = findings()["worker"]
    assert found["status"] == "fail"
    assert found["message"].startswith("gone: the last sign of life is 8")


def test_folders_that_can_t_be_used(site: Site, empty: Path) -> None:
    (empty / "file").write_text("")
    assert "is no folder" in findings("--data-dir", str(empty / "file"))["data folder"]["message"]
    refused = findings("--data-dir", "/proc/nowhere")["data folder"]
    assert (refused["status"], "can't be written" in refused["message"]) == ("fail", True)


def test_a_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_MIN_FREE_BYTES", str(1 << 60))
    found = findings()["data folder"]
    assert found["status"] == "fail"
    assert "uploads are refused" in found["message"]


def test_databases_that_can_t_be_used(site: Site) -> None:
    path = site.settings.sqlite_file
    whole = path.read_bytes()
    with database.sqlite_driver().connect(str(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    found = findings()["database"]
    assert (found["status"], "newer version" in found["message"]) == ("fail", True)
    with database.sqlite_driver().connect(str(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
    connection.close()
    found = findings()["database"]
    assert (found["status"], "older version (0000" in found["message"]) == ("warn", True)
    site.store.close()
    for leftover in path.parent.glob(f"{path.name}*"):
        leftover.unlink()
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    found = findings()["database"]
    assert (found["status"], "restore" in found["fix"]) == ("fail", True)
    path.write_bytes(b"")
    for _ in range(2):  # looked at, not made
        found = findings()["database"]
        assert (found["status"], "is empty" in found["message"]) == ("warn", True)
    path.write_bytes(whole)


def test_a_setting_that_can_t_be_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_LEASES", "1")
    found = findings()["settings"]
    assert found["status"] in ("ok", "warn")
    monkeypatch.setenv("VLLM_BATCH_LEASE_S", "soon")
    found = findings()
    assert found["settings"]["status"] == "fail"
    assert "config show" in found["settings"]["fix"]


def test_a_model_that_can_t_run(site: Site) -> None:
    with site.settings.models.open("a") as registry:
        registry.write('[[model]]\nname = "gone"\nsource = "/nonexistent/gone"\n')
    found = findings()["model"]
    assert found["status"] == "fail"
    assert found["message"].startswith("gone: files: there is no folder")


def test_a_model_is_loaded_and_asked(site: Site) -> None:
    said = doctor("--load", "sim")
    assert "Loading sim" in said.stderr
    assert "  ok    load" in said.stdout
    assert "  ok    ask " in said.stdout
    said = doctor("--load", "unloadable")
    assert said.exit_code == 11
    assert "No such weights." in said.stdout
    assert "models.toml" in said.stdout.splitlines()[-1]
    said = doctor("--load", "nope")
    assert said.exit_code == 4
    assert "nothing speaks against it" not in said.stdout, "it is said before all else is looked at"


def test_it_imports_no_engine(site: Site) -> None:
    code = (
        "import sys\n"
        "from batch_app.doctor.examination import examine\n"
        "assert len(list(examine())) > 10\n"
        "assert not {'vllm', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=240)


@pytest.mark.parametrize("colour", [True, False])
def test_colours_on_a_terminal_unless_unwanted(site: Site, colour: bool) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    environment |= {} if colour else {"NO_COLOR": "1"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batch_app.cli", "models", "check", "sim"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:
        pass  # the terminal is gone
    os.close(ours)
    assert process.wait(timeout=240) == 0
    assert b"simulated" in shown
    assert (b"\x1b[32m" in shown) is colour


# -- the engine, as other machines would have it ---------------------------------------------------

GPU = Machine("NVIDIA Test 24", "gpu", "here", "1", 24 << 30)
CPU = Machine("A processor", "cpu", "here", None, 24 << 30)


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.23.1", State.FAIL), ("0.24.0", State.OK), ("0.33.2+cpu", State.OK), ("0.34", State.WARN)],
)
def test_versions_of_vllm(monkeypatch: pytest.MonkeyPatch, version: str, state: State) -> None:
    monkeypatch.setattr(floors, "installed_version", lambda _: version)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: SimpleNamespace())
    assert engine._vllm().state is state
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: None)
    missing = engine._vllm()
    assert (missing.state, "make setup" in missing.fix) == (State.FAIL, True)


@pytest.mark.parametrize(
    ("cuda", "machine", "state"),
    [
        ("None", CPU, State.OK),
        ("None", GPU, State.FAIL),
        ("'12.9'", GPU, State.OK),
        ("'12.9'", CPU, State.FAIL),
    ],
)
def test_torch_must_fit_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str, machine: Machine, state: State
) -> None:
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
    spec: Any = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: spec)
    found: Finding = engine._torch(machine)
    assert found.state is state
    assert bool(found.fix) is (state is not State.OK)


def test_the_versions_are_those_that_are_asked_for() -> None:
    text = (REPO / "pyproject.toml").read_text()
    first, below = (".".join(map(str, v)) for v in (engine.VLLM_FROM, engine.VLLM_BELOW))
    assert f'"vllm>={first},<{below}"' in text


def test_the_version_of_the_tables_is_told(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    assert store.revisions()[0] is None
    store.migrate()
    present, newest = store.revisions()
    assert present == newest
    store.close()
