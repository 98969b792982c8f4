"""What vLLM says when it finds too little memory: the class of the error, and what is tried next.

The texts are those of vLLM's sources, with numbers filled in. `test_load_errors_of_vllm` has the
installed version say them.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from batch_app.core import EngineLimits, GpuMemory, LimitsTried, LoadRetry
from batch_app.engine.base import ModelSpec
from batch_app.engine.channel import LoadFailed, from_engine_decoder
from batch_app.engine.limits import GIB
from batch_app.engine.vllm_load_errors import LogPosition, load_error

SPEC = ModelSpec(name="m", engine="vllm", source="/")
TRIED = LimitsTried(EngineLimits(256, 8192, 0.92), "NVIDIA GeForce RTX 4080", "0.32.0")
KEEPS_SHARE = LimitsTried(EngineLimits(256, 8192, None), "NVIDIA GeForce RTX 4080", "0.32.0")

# 0.24 to 0.33 alike.
IN_USE = (
    "Free memory on device cuda:0 (11.35/15.57 GiB) on startup is less than desired GPU memory "
    "utilization (0.92, 14.33 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
    "other processes."
)
# From 0.32 on, with weights that another process holds.
IN_USE_WEIGHTS = (
    "Free memory on device cuda:1 (3.0/23.5 GiB) on startup is less than the engine's budget after "
    "excluding external process's weights (0.92, 14.33 GiB). Decrease GPU memory utilization or "
    "reduce GPU memory used by other processes."
)
MEASURED_WRONG = (
    "Error in memory profiling. Initial free memory 11.35 GiB, current free memory 12.5 GiB. This "
    "happens when other processes sharing the same container release GPU memory while vLLM is "
    "profiling during initialization. To fix this, ensure consistent GPU memory allocation or "
    "isolate vLLM in its own container."
)
NO_CACHE_24 = (
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
    "initializing the engine. See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ "
    "for more details."
)
NO_CACHE_32 = (
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
    "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, "
    "despite its name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for "
    "more details."
)
TOO_LONG_24 = (
    "To serve at least one request with the model's max seq len (131072), (14.0 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (4.32 GiB). Based on the available "
    "memory, the estimated maximum model length is 40448. Try increasing `gpu_memory_utilization` "
    "or decreasing `max_model_len` when initializing the engine. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
TOO_LONG_32 = (
    "To serve at least one request with the model's max seq len (131072), (14.0 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (0.01 GiB). Try increasing "
    "`gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing "
    "`max_model_len` when initializing the engine. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
IN_A_WORKER = (
    "WorkerProc initialization failed due to an exception in a background process. See stack trace "
    "for root cause."
)
RPC = "Worker failed with error '{}', please check the stack trace above for the root cause"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
SAMPLER = (
    "CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try "
    "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
)

LOWER = LoadRetry(too_large=TRIED)
BESIDE = LoadRetry(in_use=GpuMemory(int(11.35 * GIB), int(15.57 * GIB)))


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (ValueError(IN_USE), BESIDE),
        (ValueError(IN_USE_WEIGHTS), LoadRetry(in_use=GpuMemory(3 * GIB, int(23.5 * GIB)))),
        (AssertionError(MEASURED_WRONG), LoadRetry()),
        (RuntimeError(RPC.format(MEASURED_WRONG)), LoadRetry()),
        (ValueError(NO_CACHE_24), LoadRetry(too_large=KEEPS_SHARE)),
        (ValueError(NO_CACHE_32), LoadRetry(too_large=KEEPS_SHARE)),
        (RuntimeError(CUBLAS), LOWER),
        (RuntimeError(SAMPLER), LOWER),
        (RuntimeError(RPC.format(CUBLAS)), LOWER),
        (RuntimeError("CUDA driver error: out of memory"), LOWER),
        (MemoryError(), LOWER),
    ],
)
def test_memory_errors_are_retried(error: Exception, retry: LoadRetry) -> None:
    said = load_error(SPEC, error, TRIED)
    assert said.retry == retry
    assert said.retriable
    crossed = from_engine_decoder.decode(
        msgspec.msgpack.encode(LoadFailed(said.message, said.retriable, said.retry))
    )
    assert crossed == LoadFailed(said.message, True, retry)


@pytest.mark.parametrize("error", [OSError("no such file"), RuntimeError(IN_A_WORKER)])
def test_other_errors_are_not(error: Exception) -> None:
    said = load_error(SPEC, error, TRIED)
    assert (said.retriable, said.retry) == (False, None)
    assert str(error) in said.message


def test_the_cause_behind_an_error_counts() -> None:
    outer = RuntimeError("Engine core initialization failed.")
    outer.__cause__ = ValueError(IN_USE)
    assert load_error(SPEC, outer, TRIED).retry == BESIDE


@pytest.mark.parametrize(
    ("text", "proposal"),
    [(TOO_LONG_24, "max_model_len = 40448 or less"), (TOO_LONG_32, "a smaller max_model_len")],
)
def test_a_model_that_is_too_long_is_given_up_with_a_proposal(text: str, proposal: str) -> None:
    said = load_error(SPEC, ValueError(text), TRIED)
    assert (said.retriable, said.retry) == (False, None)
    assert "max_model_len 131072 doesn't fit" in said.message
    assert f"Set {proposal} for this model in the registry" in said.message


def test_other_processes_are_named_as_the_reason() -> None:
    said = load_error(SPEC, ValueError(IN_USE), TRIED).message
    assert "other processes use GPU memory, and only 11.3 of 15.6 GiB are free" in said


def worker_log(*errors: str) -> str:
    head = "(Worker_TP{} pid=71) ERROR 12-01 10:00:00 [multiproc_executor.py:953] "
    lines = []
    for number, error in enumerate(errors):
        mark = head.format(number)
        lines += [f"{mark}WorkerProc failed to start.", f"{mark}Traceback (most recent call last):"]
        lines += [f'{mark}  File "gpu_worker.py", line 1, in init_device', f"{mark}{error}"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("logged", "retry"),
    [
        # The fuller of two GPUs counts.
        ((f"ValueError: {IN_USE}", f"ValueError: {IN_USE_WEIGHTS}"), 3.0),
        ((f"RuntimeError: {CUBLAS}",), LOWER),
        (("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",), LOWER),
        (("OSError: [Errno 28] No space left on device",), None),
    ],
)
def test_the_cause_in_a_worker_process_is_read_from_its_log(
    logged: tuple[str, ...],
    retry: LoadRetry | float | None,
    tmp_path: Path,
) -> None:
    path = tmp_path / "engine.log"
    path.write_text(worker_log("RuntimeError: CUDA out of memory, of the load before"))
    position = LogPosition(str(path), path.stat().st_size)
    with path.open("a") as file:
        file.write(worker_log(*logged))
    said = load_error(SPEC, Exception(IN_A_WORKER), TRIED, position)
    if isinstance(retry, float):
        assert said.retry is not None
        assert said.retry.in_use is not None
        assert said.retry.in_use.free_bytes == retry * GIB
    else:
        assert said.retry == retry
        assert logged[-1].rpartition(".")[2] in said.message
        assert "in a worker process" in said.message


def test_a_log_that_is_gone_is_no_error(tmp_path: Path) -> None:
    gone = LogPosition(str(tmp_path / "none"), 0)
    assert load_error(SPEC, Exception(IN_A_WORKER), TRIED, gone).retry is None
