"""The NVIDIA GPUs of this machine, asked through NVML. No other module imports pynvml.

Asking starts no CUDA context and imports no engine. Each call initialises NVML and shuts it down
again, because NVML doesn't survive a fork on WSL2; `keep_open` is for a process that asks often
and never forks. Safe to use from several threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

#: There while the kernel part of the driver is loaded.
KERNEL_DRIVER_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version")
#: On WSL2 there are both of these instead; the device alone is there for other makers' GPUs too.
WSL_DRIVER_FILES = ("/dev/dxg", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
#: By CUDA's major version; tools/setup_env.sh has the one of the CUDA that it installs.
OLDEST_DRIVERS = {"12": 525, "13": 580}
_PCI_DEVICES = "/sys/bus/pci/devices"
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_INDEX = re.compile(r"\+?\d+")


class NvmlFault(StrEnum):
    """Why NVML can't be asked."""

    NO_DRIVER = "no_driver"
    """Neither NVIDIA's libraries nor its kernel driver are here."""
    LIBRARY_MISSING = "library_missing"
    """The kernel driver is loaded, but libnvidia-ml.so.1 isn't found, as in some containers."""
    NOT_LOADED = "not_loaded"
    """The libraries are here, but the kernel driver isn't loaded."""
    VERSION_MISMATCH = "version_mismatch"
    """The driver was updated and the old kernel driver is still loaded: needs a restart."""
    NO_PERMISSION = "no_permission"
    NO_PYNVML = "no_pynvml"
    """The Python package nvidia-ml-py isn't installed."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class NvmlProblem:
    """`message` is NVML's own text, without a full stop."""

    fault: NvmlFault
    message: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG slice with the slice's own `uuid`, `name` and `memory_bytes`.

    `index` is NVML's number of the GPU (of a slice: of the GPU that it's part of), not CUDA's:
    CUDA counts in the order of `list_gpus`. `memory_bytes` is None where the device doesn't say,
    as one does that shares the machine's memory.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int | None
    driver: str | None


@dataclass(frozen=True, slots=True)
class Memory:
    total_bytes: int
    used_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Sensors:
    """`utilization` between 0 and 1. None for what the device doesn't say."""

    utilization: float | None
    temperature_celsius: int | None
    power_watts: float | None


def list_gpus(environ: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """List the GPUs that a CUDA program started now would see, in its order.

    Follows CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER of `environ`, by default this process's. A
    program sees one MIG slice at most, and no whole GPU beside it. Empty if there is none or NVML
    can't be asked (`why_unavailable`).
    """
    try:
        with _session() as nvml:
            return _visible(_devices(nvml), os.environ if environ is None else environ)
    except _UnavailableError:
        return ()


def memory(gpu: Gpu) -> Memory | None:
    """Read how much memory is in use now, by everybody. None where the device doesn't say."""
    try:
        with _session() as nvml:
            handle = _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, gpu.uuid)
            return None if handle is None else _memory(nvml, handle)
    except _UnavailableError:
        return None


def sensors(gpu: Gpu) -> Sensors:
    """Read utilisation, temperature and power."""
    try:
        with _session() as nvml:
            handle = _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, gpu.uuid)
            if handle is None:
                return Sensors(None, None, None)
            rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
            celsius = _ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
            milliwatts = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    except _UnavailableError:
        return Sensors(None, None, None)
    return Sensors(
        None if rates is None else rates.gpu / 100,
        None if celsius is None else int(celsius),
        None if milliwatts is None else milliwatts / 1000,
    )


def driver_version() -> str | None:
    """Return the driver's version, `580.95.05`; None if NVML can't be asked."""
    try:
        with _session() as nvml:
            return _driver(nvml)
    except _UnavailableError:
        return None


def oldest_driver(cuda: str) -> int | None:
    """Return the first release of the driver that runs this CUDA version, `13.0`."""
    return OLDEST_DRIVERS.get(cuda.partition(".")[0])


def driver_supports(cuda: str) -> bool | None:
    """Whether the driver runs programs built for this CUDA version; None if that isn't known.

    An older driver does where NVIDIA's forward-compatibility libraries are installed: the driver's
    libcuda then says that it has the newer CUDA.
    """
    oldest = oldest_driver(cuda)
    try:
        with _session() as nvml:
            driver = _driver(nvml)
            provided = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2) or 0
    except _UnavailableError:
        return None
    release = (driver or "").partition(".")[0]
    if oldest is None or not release.isdecimal():
        return None
    return int(release) >= oldest or provided // 1000 >= int(cuda.partition(".")[0])


def why_unavailable() -> NvmlProblem | None:
    """Return why NVML can't be asked; None if it can."""
    try:
        with _session():
            return None
    except _UnavailableError as error:
        return error.problem


def keep_open() -> bool:
    """Keep NVML initialised until this process ends, so that asking is cheap.

    Without it the driver of a GPU that nobody uses is started and stopped by every call, which can
    take a second. Not for a process that forks. Returns whether NVML can be asked.
    """
    try:
        _open()
    except _UnavailableError:
        return False
    return True


def kernel_driver_is_loaded() -> bool:
    """Whether the kernel part of NVIDIA's driver is loaded, even if NVML can't be asked."""
    return any(Path(name).exists() for name in KERNEL_DRIVER_FILES) or all(
        Path(name).exists() for name in WSL_DRIVER_FILES
    )


def has_nvidia_card() -> bool:
    """Whether the PCI bus has an NVIDIA display device, with or without a driver."""
    for device in Path(_PCI_DEVICES).glob("*"):
        try:
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


# --- NVML ---------------------------------------------------------------------------------------


class _UnavailableError(Exception):
    def __init__(self, problem: NvmlProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _open() -> Any:
    """Initialise NVML once more (it counts) and return pynvml. Raises _UnavailableError."""
    try:
        import pynvml
    except ImportError as error:
        raise _UnavailableError(NvmlProblem(NvmlFault.NO_PYNVML, str(error))) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _UnavailableError(_problem(pynvml, error)) from error
    return pynvml


@contextmanager
def _session() -> Iterator[Any]:
    """NVML, initialised; what it refuses inside ends the session as unavailable."""
    nvml = _open()
    try:
        yield nvml
    except nvml.NVMLError as error:
        raise _UnavailableError(_problem(nvml, error)) from error
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _problem(nvml: Any, error: Any) -> NvmlProblem:
    faults = {
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: NvmlFault.NOT_LOADED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: NvmlFault.VERSION_MISMATCH,
        nvml.NVML_ERROR_NO_PERMISSION: NvmlFault.NO_PERMISSION,
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
            NvmlFault.LIBRARY_MISSING if kernel_driver_is_loaded() else NvmlFault.NO_DRIVER
        ),
    }
    return NvmlProblem(faults.get(error.value, NvmlFault.OTHER), str(error))


def _ask(nvml: Any, function: Callable[..., Any], *args: Any) -> Any:
    """What the function answers; None where the device can't or won't say."""
    try:
        return function(*args)
    except nvml.NVMLError:
        return None


def _driver(nvml: Any) -> str | None:
    version = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
    return None if version is None else str(version)


def _memory(nvml: Any, handle: Any) -> Memory | None:
    found = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    if found is None or not found.total:
        return None
    return Memory(int(found.total), int(found.used), int(found.free))


# --- What CUDA makes of it ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU of the machine. `slices` is None while MIG is off. `speed` compares with others'."""

    gpu: Gpu
    slices: tuple[Gpu, ...] | None
    speed: float

    @property
    def usable(self) -> tuple[Gpu, ...]:
        """With MIG on, only the slices can be used, and there may be none yet."""
        return (self.gpu,) if self.slices is None else self.slices


def _devices(nvml: Any) -> list[_Device]:
    """All GPUs that this process may ask for, in the order of the PCI bus, which is NVML's."""
    driver = _driver(nvml)
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:  # it has fallen off the bus, or isn't this container's
            continue
        gpu = _gpu(nvml, handle, index, driver)
        cores = _ask(nvml, nvml.nvmlDeviceGetNumGpuCores, handle) or 0
        clock = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM) or 0
        found.append(_Device(gpu, _slices(nvml, handle, index, driver), cores * clock))
    return found


def _gpu(nvml: Any, handle: Any, index: int, driver: str | None) -> Gpu:
    in_use = _memory(nvml, handle)
    return Gpu(
        index,
        str(nvml.nvmlDeviceGetUUID(handle)),
        str(nvml.nvmlDeviceGetName(handle)),
        None if in_use is None else in_use.total_bytes,
        driver,
    )


def _slices(nvml: Any, handle: Any, index: int, driver: str | None) -> tuple[Gpu, ...] | None:
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    count = _ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    found = (
        _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        for number in range(count)  # not all of them exist
    )
    return tuple(_gpu(nvml, one, index, driver) for one in found if one is not None)


def _visible(devices: Sequence[_Device], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    ordered = _cuda_order(devices, environ)
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        chosen = [device.usable for device in ordered]
    else:
        chosen = []
        for entry in wanted.split(","):
            found = _named(entry.strip(), ordered)
            if found is None:  # CUDA takes what stands before it
                break
            if found and found in chosen:  # and nothing at all if one is named twice
                return ()
            chosen.append(found)
    sliced = {one.uuid for device in devices for one in device.slices or ()}
    visible = tuple(gpu for usable in chosen for gpu in usable)
    first_slice = next((gpu for gpu in visible if gpu.uuid in sliced), None)
    return visible if first_slice is None else (first_slice,)


def _cuda_order(devices: Sequence[_Device], environ: Mapping[str, str]) -> list[_Device]:
    """CUDA puts the fastest first and leaves the others, unless it's told to keep to the bus."""
    if environ.get("CUDA_DEVICE_ORDER", "").strip().upper() == "PCI_BUS_ID" or not devices:
        return list(devices)
    fastest = max(devices, key=lambda device: device.speed)  # the first of equal ones
    return [fastest, *(device for device in devices if device is not fastest)]


def _named(entry: str, devices: Sequence[_Device]) -> tuple[Gpu, ...] | None:
    """What an entry of CUDA_VISIBLE_DEVICES names; None if that is nothing, or not one thing."""
    if number := _INDEX.match(entry):
        index = int(number[0])
        return devices[index].usable if index < len(devices) else None
    if entry.startswith("GPU-"):
        matches = [device.usable for device in devices if device.gpu.uuid.startswith(entry)]
    elif entry.startswith("MIG-"):
        matches = [
            (one,)
            for device in devices
            for one in device.slices or ()
            if one.uuid.startswith(entry)
        ]
    else:
        return None
    return matches[0] if len(matches) == 1 else None
