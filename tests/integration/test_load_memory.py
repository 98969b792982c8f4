"""Loads that find too little GPU memory: what the slot does, with a real engine process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batch_app.config import Settings
from batch_app.core import GpuMemory
from batch_app.engine.gpu_memory import GpuMemoryWait
from batch_app.engine.limits import GIB, LoweredLimits
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineLoadError
from batch_app.registry import ModelEntry
from support.waiting import PATIENCE_S, wait_for

IN_USE = (
    "Free memory on device cuda:0 ({free}/15.57 GiB) on startup is less than desired GPU memory "
    "utilization (0.92, 14.33 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
    "other processes."
)
MEASURED_WRONG = "Error in memory profiling. Initial free memory 1.0 GiB, current free memory 2 GiB"
NO_CACHE = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
TOO_LONG = (
    "To serve at least one request with the model's max seq len (8192), (1.0 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (0.5 GiB). Based on the available "
    "memory, the estimated maximum model length is 4096."
)


class Loads:
    """A slot whose loads fail with these texts in turn, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.lowered_path = folder / "lowered-limits.json"
        self._texts = folder / "errors.txt"
        self.failed: list[str] = []
        self.said: list[str] = []
        self.num_waits = 0
        self.slot = EngineSlot(
            Settings(),
            folder / "engine.log",
            lambda: False,
            LoweredLimits(self.lowered_path),
            on_load=lambda name, load_s: None if load_s else self.failed.append(name),
            gpu_memory=GpuMemoryWait(self._read),
        )
        self.entry = ModelEntry(
            name="m",
            source="sim",
            engine="sim",
            engine_args={"max_num_seqs": 256, "load_errors": str(self._texts)},
        )

    def _read(self) -> GpuMemory | None:
        self.num_waits += 1
        return None

    def take(self, *texts: str) -> tuple[int, float | None]:
        """Load; then the requests side by side, and the share of the GPU's memory."""
        self._texts.write_text("\n".join(texts))
        _, info = self.slot.take(self.entry, self.said.append)
        return info.max_num_seqs, info.gpu_memory_utilization


@pytest.fixture
def loads(tmp_path: Path) -> Iterator[Loads]:
    loads = Loads(tmp_path)
    yield loads
    loads.slot.close()


def test_memory_that_others_use_is_left_to_them_once(loads: Loads) -> None:
    assert loads.take(IN_USE.format(free=11.35)) == (256, 0.708)
    assert len(loads.failed) == 1
    [said] = loads.said
    assert "only 11.3 of 15.6 GiB are free. Trying again with 70.8%" in said
    assert not loads.lowered_path.exists()
    loads.slot.unload()
    assert loads.take() == (256, None)  # the next load asks for all of it again
    assert loads.num_waits == 3  # before each start


@pytest.mark.parametrize("free", [["11.35", "6.0"], ["1.2"], ["0.0"]])
def test_it_is_refused_where_they_leave_too_little(free: list[str], loads: Loads) -> None:
    with pytest.raises(EngineLoadError) as caught:
        loads.take(*(IN_USE.format(free=each) for each in free))
    assert len(loads.failed) == len(free)
    assert caught.value.retriable
    assert (
        f"only {float(free[-1]):.1f} of 15.6 GiB are free. End the others" in caught.value.message
    )
    assert not loads.lowered_path.exists()
    assert loads.slot.model is None


def test_memory_that_changed_while_it_was_measured_is_measured_again(loads: Loads) -> None:
    assert loads.take(MEASURED_WRONG) == (256, None)
    assert not loads.lowered_path.exists()
    loads.slot.unload()
    with pytest.raises(EngineLoadError) as caught:
        loads.take(MEASURED_WRONG, MEASURED_WRONG)
    assert caught.value.retriable


def test_no_room_for_the_cache_lowers_the_limits(loads: Loads, tmp_path: Path) -> None:
    assert loads.take(NO_CACHE, NO_CACHE) == (64, None)
    loads.slot.unload()
    assert loads.take() == (64, None)
    assert '"gpu_memory_utilization": null' in loads.lowered_path.read_text()


def test_limits_lowered_beside_others_are_not_remembered(loads: Loads) -> None:
    seqs, share = loads.take(IN_USE.format(free=11.35), OUT_OF_MEMORY)
    assert (seqs, share) == (128, 0.658)
    assert not loads.lowered_path.exists()
    # One that dies of it at work is remembered, but not the share.
    assert loads.slot.lower() is not None
    loads.slot.unload()
    assert loads.take() == (64, None)


def test_too_long_a_context_is_final_unless_others_use_the_memory(loads: Loads) -> None:
    with pytest.raises(EngineLoadError, match="max_model_len = 4096 or less") as caught:
        loads.take(TOO_LONG)
    assert not caught.value.retriable
    with pytest.raises(EngineLoadError, match="max_model_len = 4096 or less") as caught:
        loads.take(IN_USE.format(free=11.35), TOO_LONG)
    assert caught.value.retriable
    assert "only 11.3 of 15.6 GiB were free" in caught.value.message


# -- waiting for memory ------------------------------------------------------------------------


class Gpu:
    """A GPU of 16 GiB whose free memory is what `free_gib` says after so many looks."""

    def __init__(self, free_gib: Callable[[int], float]) -> None:
        self._free_gib = free_gib
        self.looks = 0

    def read(self) -> GpuMemory:
        self.looks += 1
        return GpuMemory(int(self._free_gib(self.looks) * GIB), 16 * GIB)


def test_a_load_waits_until_the_last_engines_memory_is_free() -> None:
    free = {"gib": 15.8}
    gpu = Gpu(lambda _: free["gib"])
    wait = GpuMemoryWait(gpu.read, timeout_s=PATIENCE_S, settled_s=PATIENCE_S)
    wait.wait()
    assert gpu.looks == 1  # nothing to wait for
    free["gib"] = 2.0  # an engine ran, and has just ended

    def release() -> None:
        for gib in (5.0, 9.0, 13.0, 15.8):
            looks = gpu.looks
            wait_for(lambda: gpu.looks > looks)  # noqa: B023 - called at once
            free["gib"] = gib

    thread = threading.Thread(target=release)
    thread.start()
    wait.wait()
    assert free["gib"] == 15.8
    thread.join()


def test_it_does_not_wait_for_what_others_hold() -> None:
    gpu = Gpu(lambda _: 9.0)
    wait = GpuMemoryWait(gpu.read)
    started = time.monotonic()
    wait.wait()
    assert time.monotonic() - started < 15.0
    assert gpu.looks > 1  # it looked whether more becomes free
    gpu.looks = 0
    wait.wait()
    assert gpu.looks == 1  # as much as before the last load


def test_it_ends_at_some_time() -> None:
    gpu = Gpu(lambda look: 0.1 * look)
    started = time.monotonic()
    GpuMemoryWait(gpu.read, timeout_s=0.5, settled_s=PATIENCE_S).wait()
    assert 0.5 <= time.monotonic() - started < PATIENCE_S
    assert 1 < gpu.looks < 150


def test_it_ends_when_the_worker_is_to_stop() -> None:
    gpu = Gpu(lambda look: 0.1 * look)
    GpuMemoryWait(gpu.read).wait(lambda: gpu.looks >= 3)
    assert gpu.looks == 3
