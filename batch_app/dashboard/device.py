"""What the machine says of itself: memory, utilisation, temperature. GPUs through NVML, where the
library is there (it comes with vLLM for CUDA) and a driver answers; the rest through psutil."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from batch_app.dashboard.formats import size

#: A reading is good for so long, however many ask.
READ_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Gauge:
    """One figure: `share` between 0 and 1, where it has a whole; `text` says it."""

    key: str
    label: str
    text: str
    share: float | None = None
    is_bad_when_full: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A GPU, or the machine around it."""

    name: str
    gauges: tuple[Gauge, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    parts: tuple[Part, ...]

    def as_event(self) -> dict[str, dict[str, Any]]:
        return {
            gauge.key: {"text": gauge.text, "share": gauge.share}
            for part in self.parts
            for gauge in part.gauges
        }


class Device:
    """Reads the machine that the API server runs on. Safe to use from several threads."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._lock = threading.Lock()
        self._nvml = _nvml()
        self._read: Reading | None = None
        self._read_at = 0.0
        self._cpu = psutil.cpu_times()
        self._busy = 0.0

    def read(self) -> Reading:
        with self._lock:
            if self._read is None or time.monotonic() - self._read_at >= READ_EVERY_S:
                self._read = Reading((*self._gpus(), self._machine()))
                self._read_at = time.monotonic()
            return self._read

    def _machine(self) -> Part:
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        disk = shutil.disk_usage(self._data_dir)
        busy = self._busy_share()
        gauges = [
            Gauge(
                "cpu",
                f"CPU, {psutil.cpu_count() or 1} cores",
                f"{100 * busy:.0f}%",
                busy,
            ),
            Gauge(
                "memory",
                "Memory",
                f"{size(used)} of {size(memory.total)}",
                used / memory.total,
                is_bad_when_full=True,
            ),
            Gauge(
                "disk",
                "Disk of the data folder",
                f"{size(disk.free)} free of {size(disk.total)}",
                (disk.total - disk.free) / disk.total,
                is_bad_when_full=True,
            ),
        ]
        temperature = _hottest()
        if temperature is not None:
            gauges.append(Gauge("temperature", "CPU temperature", f"{temperature:.0f} °C"))
        return Part("This machine", tuple(gauges))

    def _busy_share(self) -> float:
        """Of the processors' time since the reading before. Not `psutil.cpu_percent`: that has a
        beginning of its own in each thread, and says 0 at the first call of each."""
        before, self._cpu = self._cpu, psutil.cpu_times()
        # Guests' time is in their host's already.
        passed = {
            name: getattr(self._cpu, name) - getattr(before, name)
            for name in self._cpu._fields
            if not name.startswith("guest")
        }
        whole = sum(passed.values())
        if whole > 0:
            idle = passed["idle"] + passed.get("iowait", 0.0)
            self._busy = min(max(1 - idle / whole, 0.0), 1.0)
        return self._busy

    def _gpus(self) -> Sequence[Part]:
        nvml = self._nvml
        if nvml is None:
            return ()
        try:
            return [_gpu(nvml, number) for number in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError:
            return ()


def _nvml() -> Any:
    """The library, ready to be asked; None where it or its driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpu(nvml: Any, number: int) -> Part:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    name = nvml.nvmlDeviceGetName(handle)
    gauges = []
    with contextlib.suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        gauges.append(
            Gauge(
                f"gpu{number}_memory",
                "Memory",
                f"{size(memory.used)} of {size(memory.total)}",
                memory.used / memory.total,
            )
        )
    with contextlib.suppress(nvml.NVMLError):
        busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        gauges.append(Gauge(f"gpu{number}_busy", "Utilisation", f"{busy}%", busy / 100))
    with contextlib.suppress(nvml.NVMLError):
        celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        gauges.append(Gauge(f"gpu{number}_temperature", "Temperature", f"{celsius} °C"))
    with contextlib.suppress(nvml.NVMLError):
        watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        gauges.append(Gauge(f"gpu{number}_power", "Power", f"{watts:.0f} W"))
    text = name.decode() if isinstance(name, bytes) else str(name)
    return Part(text if number == 0 else f"{text} ({number})", tuple(gauges))


def _hottest() -> float | None:
    """The highest temperature of the processor, in °C; None where the machine doesn't say."""
    read = getattr(psutil, "sensors_temperatures", None)
    if read is None:
        return None
    try:
        found = read()
    except OSError:
        return None
    values = [
        one.current
        for name in ("coretemp", "k10temp", "cpu_thermal", "zenpower")
        for one in found.get(name, ())
        if one.current
    ]
    return max(values, default=None)
