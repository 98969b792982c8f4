"""`tools/setup_env.sh --check`: which engine the set-up chooses, and what it says is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.site import REPO

TOOLS = ("bash", "cat", "dirname", "grep", "sed", "sha256sum", "timeout")
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
LOST = "Unable to determine the device handle for GPU 0000:01:00.0: Unknown Error"
Check = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the script reads, with an interpreter and without a driver or a compiler."""
    folder = tmp_path / "copy"
    for name in ("tools/setup_env.sh", "batch_app/__init__.py", "batch_app/compiler.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    shutil.copytree(REPO / "requirements", folder / "requirements")
    shutil.copy(REPO / "pyproject.toml", folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / "bin" / tool).symlink_to(found)
    return folder


@pytest.fixture
def check(copy: Path, tmp_path: Path) -> Check:
    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / "bin" / "bash", copy / "tools" / "setup_env.sh", *(words or ("--check",))],
            env={"PATH": str(tmp_path / "bin"), "VLLM_BATCH_SETUP_ROOT": str(tmp_path)} | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def add_file(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_nvidia_smi(
    folder: Path, listing: str = "GPU 0: NVIDIA X (UUID: GPU-1)", driver: str = "580.95.05"
) -> None:
    add_file(
        folder / "nvidia-smi",
        f'#!/bin/sh\ncase $1 in -L) echo "{listing}";; *) echo {driver};; esac\n'
        f'case "{listing}" in GPU*) exit 0;; esac; exit 18\n',
    )
    (folder / "nvidia-smi").chmod(0o755)


def engine_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.partition("would make .venv for ")[2].split()[0]


def test_without_a_driver_it_is_for_the_cpu(check: Check) -> None:
    done = check()
    assert engine_of(done) == "cpu"
    assert len(done.stdout.splitlines()) == 1


def test_a_gpu_that_is_listed_chooses_cuda(check: Check, tmp_path: Path) -> None:
    add_nvidia_smi(tmp_path / "bin")
    done = check()
    assert engine_of(done) == "cuda"
    assert "requirements/cuda.lock" in done.stdout
    assert "neither gcc nor clang" in done.stdout
    assert "apt install gcc" in done.stdout


def test_a_compiler_that_is_there_is_not_missed(check: Check, tmp_path: Path) -> None:
    add_nvidia_smi(tmp_path / "bin")
    add_file(tmp_path / "bin" / "gcc", "#!/bin/sh\nexit 0\n")
    (tmp_path / "bin" / "gcc").chmod(0o755)
    assert "neither gcc nor clang" not in check().stdout


def test_a_driver_that_is_too_old_stops_it(check: Check, tmp_path: Path) -> None:
    add_nvidia_smi(tmp_path / "bin", driver="550.90.07")
    done = check()
    assert done.returncode == 1
    assert "driver is 550.90.07; CUDA 13.0 needs driver 580 or newer" in done.stderr
    assert "VLLM_BATCH_ENGINE=cpu" in done.stderr
    assert engine_of(check(VLLM_BATCH_ENGINE="cpu")) == "cpu"
    chosen = check(VLLM_BATCH_ENGINE="cuda")
    assert engine_of(chosen) == "cuda"
    assert "needs driver 580 or newer" in chosen.stdout


@pytest.mark.parametrize("name", ["dev/nvidiactl", "proc/driver/nvidia/version"])
@pytest.mark.parametrize("said", [MISMATCH, LOST, "No devices were found", None])
def test_a_driver_without_a_gpu_stops_it(
    check: Check, tmp_path: Path, name: str, said: str | None
) -> None:
    """Rather than making the environment for the CPU, and saying nothing."""
    add_file(tmp_path / name)
    if said is not None:
        add_nvidia_smi(tmp_path / "bin", said)
    done = check()
    assert done.returncode == 1
    assert done.stdout == ""
    assert (said or "nvidia-smi is not installed") in done.stderr
    assert "restart" in done.stderr
    assert engine_of(check(VLLM_BATCH_ENGINE="cpu")) == "cpu"


def test_nvidia_smi_without_a_driver_is_no_gpu(check: Check, tmp_path: Path) -> None:
    add_nvidia_smi(tmp_path / "bin", "NVIDIA-SMI has failed")
    assert engine_of(check()) == "cpu"


def test_on_wsl(check: Check, tmp_path: Path) -> None:
    add_file(tmp_path / "dev" / "dxg")  # which is there for GPUs of other makers too
    assert engine_of(check()) == "cpu"
    library = tmp_path / "usr" / "lib" / "wsl" / "lib"
    add_file(library / "libnvidia-ml.so.1")
    assert check().returncode == 1
    add_nvidia_smi(library)  # not on PATH, as under sudo
    assert engine_of(check()) == "cuda"


def test_a_card_without_a_driver_is_told(check: Check, tmp_path: Path) -> None:
    device = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    add_file(device / "vendor", "0x10de\n")
    add_file(device / "class", "0x030000\n")
    done = check()
    assert engine_of(done) == "cpu"
    assert "driver 580 or newer" in done.stdout


def test_it_changes_nothing(check: Check, copy: Path, tmp_path: Path) -> None:
    def files() -> set[Path]:
        return {path for path in copy.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    add_nvidia_smi(tmp_path / "bin")
    check()
    assert files() == before


def test_an_unknown_argument_is_refused(check: Check) -> None:
    done = check("--chek")
    assert done.returncode == 1
    assert "--check" in done.stderr
