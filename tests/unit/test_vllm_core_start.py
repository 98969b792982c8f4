"""Whether the engine core is forked or spawned, and how a GPU lost in a fork is recognized."""

from __future__ import annotations

import pytest

from batch_app.engine.vllm_core_start import (
    StartFacts,
    choose_core_start,
    is_lost_in_fork,
)
from batch_app.errors import EngineLoadError

WSL = "5.15.153.1-microsoft-standard-WSL2"


@pytest.mark.parametrize(
    ("facts", "method", "words"),
    [
        (StartFacts(), "fork", "not initialized"),
        (StartFacts(device_count_result=3), "fork", "not initialized"),
        (StartFacts(device_count_result=0), "spawn", "cuDeviceGetCount returned 0"),
        (StartFacts(device_count_result=34), "spawn", "cuDeviceGetCount returned 34"),
        (StartFacts(kernel_release=WSL, device_count_result=3), "spawn", "WSL"),
        (StartFacts(kernel_release="4.4.0-19041-Microsoft"), "spawn", "WSL"),
        (StartFacts(is_cuda_initialized=True, device_count_result=3), "spawn", "initialized"),
        (StartFacts(visible_devices="0,1", device_count_result=3), "fork", "not initialized"),
        (StartFacts(visible_devices="GPU-8932f937", device_count_result=3), "fork", ""),
        (StartFacts(visible_devices="0,MIG-3f1a-77", device_count_result=3), "spawn", "MIG"),
        (StartFacts(is_on_cpu=True, kernel_release=WSL), "fork", "CPU"),
        (StartFacts(is_on_cpu=True, chosen="spawn"), "spawn", "VLLM_BATCH_CORE_START"),
        (StartFacts(kernel_release=WSL, chosen="fork"), "fork", "VLLM_BATCH_CORE_START"),
    ],
)
def test_what_decides_how_the_core_starts(facts: StartFacts, method: str, words: str) -> None:
    start = choose_core_start(facts)
    assert start.method == method
    assert words in start.reason


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(EngineLoadError, match='"fork" or "spawn"'):
        choose_core_start(StartFacts(chosen="thread"))


def test_a_gpu_lost_in_a_fork_is_recognized_by_its_cause() -> None:
    cause = RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with …")
    error = RuntimeError("Engine core initialization failed")
    error.__cause__ = cause
    assert is_lost_in_fork(error)
    assert is_lost_in_fork(RuntimeError("CUDA driver initialization failed, you might not have …"))
    assert not is_lost_in_fork(RuntimeError("CUDA out of memory"))
