"""A stand-in for pynvml on a machine without an NVIDIA driver.

It has the functions that `batch_app.gpus` calls and no others: an unknown name raises, and every
name it has is one of the real module's. Errors and constants are the real module's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

GIB = 1 << 30
_CONSTANTS = (
    "NVMLError",
    "NVML_CLOCK_SM",
    "NVML_DEVICE_MIG_ENABLE",
    "NVML_ERROR_DRIVER_NOT_LOADED",
    "NVML_ERROR_LIBRARY_NOT_FOUND",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_TEMPERATURE_GPU",
)


@dataclass
class Card:
    """A device that the stand-in has. None: the device answers NotSupported for it.

    `slices` is None while MIG is off; `error` is what asking for the device's handle raises.
    """

    uuid: str = "GPU-11111111-aaaa"
    name: str = "NVIDIA GeForce RTX 4080"
    total: int | None = 16 * GIB
    used: int = GIB
    busy: int | None = 50
    celsius: int | None = 61
    milliwatts: int | None = 250_500
    cores: int | None = 9728
    clock: int | None = 3105
    slices: Sequence[Card | None] | None = None
    error: int | None = None


def mig_slice(uuid: str, name: str = "NVIDIA H200 MIG 1g.18gb", total: int = 16 * GIB) -> Card:
    """A slice: its utilisation and power are the whole GPU's, so it doesn't say them."""
    return Card(uuid, name, total, GIB, None, None, None, None, None)


@dataclass
class FakeNvml:
    cards: Sequence[Card] = ()
    driver: str = "580.95.05"
    cuda: int | None = 13000
    init_error: int | None = None
    initialised: int = field(default=0, init=False)
    initialisations: int = field(default=0, init=False)

    def __getattr__(self, name: str) -> Any:
        if name in _CONSTANTS:
            return getattr(pynvml, name)
        raise AttributeError(f"the stand-in for pynvml has no {name}")

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.initialised += 1
        self.initialisations += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._check()
        self.initialised -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._check()
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return self._said(self.cuda)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._check()
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        self._check()
        card = self.cards[index]
        if card.error is not None:
            raise pynvml.NVMLError(card.error)
        return card

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:  # noqa: N802
        self._check()
        every = [*self.cards, *(one for card in self.cards for one in card.slices or () if one)]
        for card in every:
            if card.uuid == uuid:
                return card
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802
        return card.name

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802
        return card.uuid

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> SimpleNamespace:  # noqa: N802
        total = self._said(card.total)
        return SimpleNamespace(total=total, used=card.used, free=total - card.used)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=self._said(card.busy))

    def nvmlDeviceGetTemperature(self, card: Card, sensor: int) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._said(card.celsius)

    def nvmlDeviceGetPowerUsage(self, card: Card) -> int:  # noqa: N802
        return self._said(card.milliwatts)

    def nvmlDeviceGetNumGpuCores(self, card: Card) -> int:  # noqa: N802
        return self._said(card.cores)

    def nvmlDeviceGetMaxClockInfo(self, card: Card, clock: int) -> int:  # noqa: N802
        assert clock == pynvml.NVML_CLOCK_SM
        return self._said(card.clock)

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:  # noqa: N802
        if card.slices is None:
            return self._said(None)
        return [pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:  # noqa: N802
        return len(card.slices or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:  # noqa: N802
        found = (card.slices or ())[index]
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found

    def _check(self) -> None:
        if not self.initialised:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def _said(self, value: Any) -> Any:
        self._check()
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value


UseNvml = Callable[..., FakeNvml]


@pytest.fixture
def use_nvml(monkeypatch: pytest.MonkeyPatch) -> UseNvml:
    """`use_nvml(*cards, init_error=...)` replaces pynvml, with no CUDA variable set."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def use(*cards: Card, **options: Any) -> FakeNvml:
        fake = FakeNvml(cards, **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return use
