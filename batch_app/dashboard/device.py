"""What the machine says of itself: memory, utilisation, temperature. The GPUs are those that CUDA
would use under the API server's own CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from batch_app import gpus
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
        # Asked every second, by a process that forks no other: the engine is the worker's.
        self._gpus = gpus.list_gpus() if gpus.keep_open() else ()
        self._read: Reading | None = None
        self._read_at = 0.0
        self._cpu = psutil.cpu_times()
        self._busy = 0.0

    def read(self) -> Reading:
        with self._lock:
            if self._read is None or time.monotonic() - self._read_at >= READ_EVERY_S:
                self._read = Reading((*self._cards(), self._machine()))
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

    def _cards(self) -> Iterator[Part]:
        for number, gpu in enumerate(self._gpus):
            yield Part(gpu.name if number == 0 else f"{gpu.name} ({number})", _gauges(number, gpu))


def _gauges(number: int, gpu: gpus.Gpu) -> tuple[Gauge, ...]:
    """What the GPU says of itself; a MIG slice, or one that shares the machine's memory, less."""
    key = f"gpu{number}"
    found = []
    memory = gpus.memory(gpu)
    if memory is not None:
        text = f"{size(memory.used_bytes)} of {size(memory.total_bytes)}"
        share = memory.used_bytes / memory.total_bytes
        found.append(Gauge(f"{key}_memory", "Memory", text, share))
    sensors = gpus.sensors(gpu)
    if sensors.utilization is not None:
        text = f"{sensors.utilization:.0%}"
        found.append(Gauge(f"{key}_busy", "Utilisation", text, sensors.utilization))
    if sensors.temperature_celsius is not None:
        text = f"{sensors.temperature_celsius} °C"
        found.append(Gauge(f"{key}_temperature", "Temperature", text))
    if sensors.power_watts is not None:
        found.append(Gauge(f"{key}_power", "Power", f"{sensors.power_watts:.0f} W"))
    return tuple(found)


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
