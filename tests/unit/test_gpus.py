"""What GPUs a CUDA program sees, with a stand-in for NVML."""

from __future__ import annotations

import sys
from pathlib import Path

import pynvml
import pytest

from batch_app import gpus
from batch_app.gpus import Gpu, Memory, NvmlFault, Sensors
from support.nvml import GIB, Card, FakeNvml, UseNvml, mig_slice

A, B, C = "GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333"
M1, M2 = "MIG-cccc1111", "MIG-cccc2222"
SLICES = (mig_slice(M1), None, mig_slice(M2, "NVIDIA H200 MIG 2g.35gb", 32 * GIB))


def uuids() -> list[str]:
    return [gpu.uuid for gpu in gpus.list_gpus()]


def test_every_name_of_the_stand_in_is_one_of_the_real_module() -> None:
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 10
    assert [name for name in names if not hasattr(pynvml, name)] == []
    with pytest.raises(AttributeError):
        _ = FakeNvml().nvmlDeviceGetNonsense


def test_without_a_gpu(use_nvml: UseNvml) -> None:
    use_nvml()
    assert gpus.list_gpus() == ()
    assert gpus.why_unavailable() is None


def test_one_gpu(use_nvml: UseNvml) -> None:
    fake = use_nvml(Card(A))
    [gpu] = gpus.list_gpus()
    assert gpu == Gpu(0, A, "NVIDIA GeForce RTX 4080", 16 * GIB, "580.95.05")
    assert gpus.memory(gpu) == Memory(16 * GIB, GIB, 15 * GIB)
    assert gpus.sensors(gpu) == Sensors(0.5, 61, 250.5)
    assert gpus.driver_version() == "580.95.05"
    assert fake.initialisations == 4
    assert fake.initialised == 0, "NVML must be shut down: a process may fork next"


def test_keep_open_leaves_nvml_initialised(use_nvml: UseNvml) -> None:
    fake = use_nvml(Card(A))
    assert gpus.keep_open()
    gpus.list_gpus()
    assert fake.initialised == 1


def test_a_gpu_that_has_gone_is_left_out(use_nvml: UseNvml) -> None:
    use_nvml(Card(A, error=pynvml.NVML_ERROR_GPU_IS_LOST), Card(B))
    [gpu] = gpus.list_gpus()
    assert (gpu.uuid, gpu.index) == (B, 1)
    gone = Gpu(0, A, "x", GIB, "580.1")
    assert gpus.memory(Gpu(2, C, "x", GIB, "580.1")) is None
    assert gpus.sensors(Gpu(2, C, "x", GIB, "580.1")) == Sensors(None, None, None)
    assert gone not in gpus.list_gpus()


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [B]),
        (" 2 , 0", [C, A]),
        ("0,7,1", [A]),  # CUDA stops at the first that isn't there
        ("1,-1,0", [B]),
        ("0,0", []),  # named twice: CUDA fails
        (B, [B]),
        ("GPU-bb,GPU-aaaa1", [C, A]),
        ("GPU-aaaa", []),  # not unique
        ("GPU-ffff,0", []),
        (f"0,{C}", [A, C]),
        (M1, []),
        ("0, ,1", [A]),
    ],
)
def test_cuda_visible_devices(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch, value: str | None, seen: list[str]
) -> None:
    use_nvml(Card(A), Card(B), Card(C))
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert uuids() == seen


def test_cuda_puts_the_fastest_gpu_first_unless_told_otherwise(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml(Card(A, cores=100), Card(B, cores=None), Card(C, cores=900))
    assert uuids() == [C, A, B]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert uuids() == [C]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert uuids() == [A]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert uuids() == [A, B, C]


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (None, [M1]),  # no whole GPU beside a slice, and no second slice
        ("0", [A]),
        ("1", [M1]),
        ("0,1", [M1]),
        (M2, [M2]),
        ("MIG-cccc2", [M2]),
        (f"{M2},{M1}", [M2]),
        ("MIG-cccc", []),
        (B, [M1]),
        ("2", []),  # MIG is on, and there is no slice
    ],
)
def test_a_mig_slice_is_a_gpu_of_its_own(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch, value: str | None, seen: list[str]
) -> None:
    use_nvml(Card(A), Card(B, "NVIDIA H200", 141 * GIB, slices=SLICES), Card(C, slices=()))
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert uuids() == seen


def test_a_mig_slice_has_its_own_size(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(Card(A, "NVIDIA H200", 141 * GIB, slices=SLICES))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", M2)
    [gpu] = gpus.list_gpus()
    assert gpu == Gpu(0, M2, "NVIDIA H200 MIG 2g.35gb", 32 * GIB, "580.95.05")
    assert gpus.memory(gpu) == Memory(32 * GIB, GIB, 31 * GIB)
    assert gpus.sensors(gpu) == Sensors(None, None, None)


@pytest.mark.parametrize("total", [None, 0])
def test_unified_memory_has_no_size(use_nvml: UseNvml, total: int | None) -> None:
    use_nvml(Card(A, "NVIDIA GB10", total=total, used=0))
    [gpu] = gpus.list_gpus()
    assert gpu.memory_bytes is None
    assert gpus.memory(gpu) is None
    assert gpus.sensors(gpu).temperature_celsius == 61


@pytest.mark.parametrize(
    ("error", "is_loaded", "fault"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, False, NvmlFault.NO_DRIVER),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, True, NvmlFault.LIBRARY_MISSING),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, False, NvmlFault.NOT_LOADED),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, True, NvmlFault.VERSION_MISMATCH),
        (pynvml.NVML_ERROR_NO_PERMISSION, True, NvmlFault.NO_PERMISSION),
        (pynvml.NVML_ERROR_UNKNOWN, True, NvmlFault.OTHER),
    ],
)
def test_says_why_nvml_cant_be_asked(
    use_nvml: UseNvml,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: int,
    is_loaded: bool,
    fault: NvmlFault,
) -> None:
    use_nvml(Card(A), init_error=error)
    device = tmp_path / "nvidiactl"
    if is_loaded:
        device.touch()
    monkeypatch.setattr(gpus, "KERNEL_DRIVER_FILES", (str(device),))
    monkeypatch.setattr(gpus, "WSL_DRIVER_FILES", (str(tmp_path / "dxg"),))
    problem = gpus.why_unavailable()
    assert problem is not None
    assert problem.fault is fault
    assert problem.message == str(pynvml.NVMLError(error))
    assert gpus.list_gpus() == ()
    assert gpus.driver_version() is None
    assert gpus.memory(Gpu(0, A, "x", GIB, None)) is None
    assert not gpus.keep_open()


def test_on_wsl_the_driver_is_a_device_and_a_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device, library = tmp_path / "dxg", tmp_path / "libnvidia-ml.so.1"
    monkeypatch.setattr(gpus, "KERNEL_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(gpus, "WSL_DRIVER_FILES", (str(device), str(library)))
    device.touch()
    assert not gpus.kernel_driver_is_loaded()
    library.touch()
    assert gpus.kernel_driver_is_loaded()


def test_says_that_pynvml_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    problem = gpus.why_unavailable()
    assert problem is not None
    assert problem.fault is NvmlFault.NO_PYNVML
    assert gpus.list_gpus() == ()


def test_the_real_module_on_this_machine() -> None:
    """Whatever this machine has: NVML says why not, or has a driver."""
    problem = gpus.why_unavailable()
    assert (problem is None) == (gpus.driver_version() is not None)
    for gpu in gpus.list_gpus():
        found = gpus.memory(gpu)
        assert found is None or found.used_bytes + found.free_bytes <= found.total_bytes


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030000", True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),  # its audio device
        ("0x1002", "0x030000", False),
    ],
)
def test_finds_a_card_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, kind: str, found: bool
) -> None:
    (tmp_path / "0000:00:00.0").mkdir()  # a device that can't be read
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(gpus, "_PCI_DEVICES", str(tmp_path))
    assert gpus.has_nvidia_card() is found
