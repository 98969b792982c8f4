"""What the doctor says of GPUs, their driver and the compiler, on machines that aren't here."""

from __future__ import annotations

import sys
from pathlib import Path

import pynvml
import pytest

from batch_app import compiler, gpus
from batch_app.doctor.finding import Finding, State
from batch_app.doctor.gpu import look_at_gpus
from batch_app.machine import Machine
from support.nvml import GIB, Card, UseNvml, mig_slice

MACHINE = Machine("a processor", "cpu", "here")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a driver, card, toolkit or wish of the user's; returns its folder."""
    for name in ("CC", "CUDA_HOME", "CUDA_PATH", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(gpus, "KERNEL_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(gpus, "WSL_DRIVER_FILES", (str(tmp_path / "dxg"),))
    monkeypatch.setattr(gpus, "_PCI_DEVICES", str(tmp_path / "pci"))
    return tmp_path


def add_card(folder: Path) -> None:
    device = folder / "pci" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030000\n")


def load_kernel_driver(folder: Path) -> None:
    (folder / "nvidiactl").touch()


def findings(cuda: str | None = "13.0") -> dict[str, Finding]:
    return {one.subject: one for one in look_at_gpus(MACHINE, cuda)}


def only(cuda: str | None = "13.0") -> Finding:
    [finding] = look_at_gpus(MACHINE, cuda)
    return finding


def test_a_gpu_with_all_it_needs(use_nvml: UseNvml) -> None:
    use_nvml(Card("GPU-1"))
    found = findings()
    assert found["GPU"].message == "NVIDIA GeForce RTX 4080, 16.0 GiB, driver 580.95.05"
    assert found["driver"].state is State.OK
    assert set(found) == {"GPU", "driver", "C compiler"}


def test_each_gpu_is_named_and_one_in_use_is_told(use_nvml: UseNvml) -> None:
    use_nvml(Card("GPU-1"), Card("GPU-2", "NVIDIA L4", 24 * GIB, used=9 * GIB))
    found = list(look_at_gpus(MACHINE, "13.0"))
    assert [one.message.split(",")[0] for one in found if one.subject == "GPU"] == [
        "NVIDIA GeForce RTX 4080",
        "NVIDIA L4",
    ]
    [used] = [one for one in found if one.subject == "GPU memory"]
    assert (used.state, used.message) == (State.WARN, "9.0 GiB of 24.0 GiB are in use now")


def test_of_a_mig_slice_its_own_size_is_told(use_nvml: UseNvml) -> None:
    use_nvml(Card("GPU-1", "NVIDIA H200", 141 * GIB, slices=[mig_slice("MIG-1")]))
    assert findings()["GPU"].message.startswith("NVIDIA H200 MIG 1g.18gb, 16.0 GiB")


def test_unified_memory(use_nvml: UseNvml) -> None:
    use_nvml(Card("GPU-1", "NVIDIA GB10", total=None))
    assert "memory shared with the machine" in findings()["GPU"].message


@pytest.mark.parametrize(
    ("driver", "provided", "cuda", "state"),
    [
        ("580.65.06", 13000, "13.0", State.OK),
        ("595.1", 13020, "13.0", State.OK),
        ("575.64.03", 12090, "13.0", State.FAIL),
        ("575.64.03", None, "13.0", State.FAIL),
        ("550.90.07", 13000, "13.0", State.OK),  # forward-compatibility libraries
        ("550.90.07", 12040, "12.9", State.OK),
        ("520.61", 11080, "12.9", State.FAIL),
        ("575.64.03", 12090, None, State.FAIL),  # the set-up installs CUDA 13
        ("575.64.03", 12090, "14.0", State.OK),  # not known
    ],
)
def test_a_driver_that_is_too_old(
    use_nvml: UseNvml, driver: str, provided: int | None, cuda: str | None, state: State
) -> None:
    use_nvml(Card("GPU-1"), driver=driver, cuda=provided)
    found = findings(cuda)["driver"]
    assert found.state is state
    assert driver in found.message
    if state is State.FAIL:
        assert ("580 or newer" if cuda != "12.9" else "525 or newer") in found.message
        assert "update the NVIDIA driver" in found.fix
        assert "VLLM_BATCH_ENGINE=cpu" in found.fix


NO_LIBRARY = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
NOT_LOADED = pynvml.NVML_ERROR_DRIVER_NOT_LOADED


@pytest.mark.parametrize(
    ("error", "has_card", "is_loaded", "state", "says", "fix"),
    [
        (NO_LIBRARY, False, False, State.OK, "no NVIDIA GPU", ""),
        (NOT_LOADED, False, False, State.OK, "no NVIDIA GPU", ""),
        (NO_LIBRARY, True, False, State.WARN, "no NVIDIA driver", "580 or newer"),
        (NO_LIBRARY, False, True, State.FAIL, "libnvidia-ml.so.1", "--gpus all"),
        (NOT_LOADED, True, False, State.FAIL, "not loaded", "modprobe nvidia"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, True, True, State.FAIL, "updated", "restart"),
        (pynvml.NVML_ERROR_NO_PERMISSION, True, True, State.FAIL, "may not use", "/dev/nvidia"),
        (pynvml.NVML_ERROR_UNKNOWN, False, False, State.FAIL, "doesn't answer", "nvidia-smi"),
    ],
)
def test_says_why_the_driver_does_not_answer(
    use_nvml: UseNvml,
    bare: Path,
    error: int,
    has_card: bool,
    is_loaded: bool,
    state: State,
    says: str,
    fix: str,
) -> None:
    use_nvml(init_error=error)
    if has_card:
        add_card(bare)
    if is_loaded:
        load_kernel_driver(bare)
    found = only()
    assert (found.state, found.subject) == (state, "CPU" if state is State.OK else "GPU")
    assert says in found.message
    assert fix in found.fix


def test_a_hidden_gpu_is_told(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(Card("GPU-1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = only()
    assert found.state is State.WARN
    assert found.message == "CUDA_VISIBLE_DEVICES='3' hides NVIDIA GeForce RTX 4080"


def test_a_driver_without_a_usable_gpu(use_nvml: UseNvml, bare: Path) -> None:
    use_nvml(Card("GPU-1", slices=()))
    assert only().subject == "CPU"
    load_kernel_driver(bare)
    assert (only().state, "MIG" in only().fix) == (State.FAIL, True)


def test_nvidia_ml_py_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (only().state, only().fix) == (State.FAIL, "make setup")


# -- the compiler ----------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def headers(bare: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Python.h belongs; it is there."""
    folder = bare / "include"
    folder.mkdir()
    (folder / "Python.h").touch()
    monkeypatch.setattr(compiler, "python_headers", lambda: folder)
    return folder


@pytest.fixture
def tools(bare: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH."""
    folder = bare / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def problem(use_nvml: UseNvml) -> Finding:
    use_nvml(Card("GPU-1"))
    found = findings()["C compiler"]
    assert bool(found.fix) is (found.state is not State.OK)
    return found


def test_no_compiler(use_nvml: UseNvml, tools: Path, headers: Path) -> None:
    program(tools, "cc", "exit 0")  # which Triton doesn't look for
    found = problem(use_nvml)
    assert found.state is State.FAIL
    assert "neither gcc nor clang" in found.message
    assert "apt install gcc" in found.fix
    assert "dnf install gcc" in found.fix


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_compiler_and_headers(use_nvml: UseNvml, tools: Path, headers: Path, name: str) -> None:
    program(tools, name, "exit 0")
    assert problem(use_nvml).message == f"{tools / name} compiles Python extensions"


def test_no_python_headers(use_nvml: UseNvml, tools: Path, headers: Path) -> None:
    program(tools, "gcc", "exit 0")
    (headers / "Python.h").unlink()
    found = problem(use_nvml)
    assert found.state is State.FAIL
    assert "Python.h is missing" in found.message
    assert "-dev" in found.fix


def test_a_compiler_that_fails_is_quoted(use_nvml: UseNvml, tools: Path, headers: Path) -> None:
    program(tools, "gcc", "echo 'x.c:2: fatal error: stdlib.h: No such file' >&2; exit 1")
    found = problem(use_nvml)
    assert found.state is State.FAIL
    assert "fatal error: stdlib.h" in found.message


@pytest.mark.parametrize(
    ("cc", "state"), [("mine", State.OK), ("gcc", State.FAIL), ("mine -O1", State.FAIL)]
)
def test_cc_is_obeyed_as_triton_does(
    use_nvml: UseNvml,
    tools: Path,
    headers: Path,
    monkeypatch: pytest.MonkeyPatch,
    cc: str,
    state: State,
) -> None:
    program(tools, "mine", "exit 0")
    monkeypatch.setenv("CC", cc)
    assert problem(use_nvml).state is state


def test_this_machines_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the real one, where there is one: it finds an error in what isn't C."""
    if compiler.find_problem() is not None:
        pytest.skip("this machine can't compile a Python extension")
    monkeypatch.setattr(compiler, "_SOURCE", "this is no C;\n")
    found = compiler.find_problem()
    assert found is not None
    assert "error" in found.message


def test_as_a_program(tools: Path, headers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiler.main() == 1
    assert "neither gcc nor clang" in capsys.readouterr().out
    program(tools, "gcc", "exit 0")
    assert compiler.main() == 0
    assert capsys.readouterr().out == ""


# -- the CUDA toolkit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "has_nvcc", "told"),
    [(None, False, False), ("0", False, False), ("1", False, True), ("1", True, False)],
)
def test_nvcc_is_missed_only_by_who_asked_for_it(
    use_nvml: UseNvml,
    bare: Path,
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str | None,
    has_nvcc: bool,
    told: bool,
) -> None:
    use_nvml(Card("GPU-1"))
    if sampler is not None:
        monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", sampler)
    if has_nvcc:
        (bare / "cuda" / "bin").mkdir(parents=True)
        program(bare / "cuda" / "bin", "nvcc", "exit 0")
    assert ("CUDA toolkit" in findings()) is told
