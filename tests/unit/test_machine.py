"""The machine as estimates and provenance name it."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from batch_app.machine import this_machine
from support.nvml import GIB, Card, UseNvml, mig_slice


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    this_machine.cache_clear()
    yield
    this_machine.cache_clear()


def test_the_device_is_the_first_gpu_that_is_visible(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml(Card("GPU-1"), Card("GPU-2", "NVIDIA L4", 24 * GIB))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine = this_machine()
    assert (machine.device, machine.device_type) == ("NVIDIA L4", "gpu")
    assert (machine.driver, machine.memory_bytes) == ("580.95.05", 24 * GIB)


def test_a_mig_slice_has_its_own_size(use_nvml: UseNvml) -> None:
    use_nvml(Card("GPU-1", "NVIDIA H200", 141 * GIB, slices=[mig_slice("MIG-1")]))
    machine = this_machine()
    assert (machine.device, machine.memory_bytes) == ("NVIDIA H200 MIG 1g.18gb", 16 * GIB)


def test_a_gpu_that_shares_the_memory_has_the_machines(use_nvml: UseNvml) -> None:
    use_nvml(Card("GPU-1", "NVIDIA GB10", total=None))
    assert this_machine().memory_bytes == psutil.virtual_memory().total


def test_hidden_gpus_leave_the_cpu(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(Card("GPU-1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = this_machine()
    assert (machine.device_type, machine.driver) == ("cpu", None)
