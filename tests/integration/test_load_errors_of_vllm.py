"""The memory errors of the installed vLLM, raised by its own functions, as we read them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_app.core import EngineLimits, LimitsTried
from batch_app.engine.base import ModelSpec
from batch_app.engine.limits import GIB
from batch_app.engine.vllm_load_errors import _MEASURED_WRONG, LogPosition, load_error
from batch_app.errors import EngineLoadError

# vLLM's own imports warn.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SPEC = ModelSpec(name="m", engine="vllm", source="/")
TRIED = LimitsTried(EngineLimits(256, 8192, 0.92), "a GPU", "0.32.0")


def said_of(call: Callable[[], Any]) -> EngineLoadError:
    with pytest.raises(ValueError) as caught:
        call()
    return load_error(SPEC, caught.value, TRIED)


def test_memory_in_use() -> None:
    import torch
    from vllm.v1.worker.utils import request_memory

    snapshot = SimpleNamespace(
        free_memory=4 * GIB, total_memory=16 * GIB, device_=torch.device("cuda:0")
    )
    said = said_of(lambda: request_memory(snapshot, SimpleNamespace(gpu_memory_utilization=0.92)))
    assert said.retry is not None
    assert said.retry.in_use is not None
    assert (said.retry.in_use.free_bytes, said.retry.in_use.total_bytes) == (4 * GIB, 16 * GIB)


def check_cache(available: int, longest: int) -> Callable[[], Any]:
    for name in ("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if check := getattr(module, "_check_enough_kv_cache_memory", None):
            return lambda: check(available, lambda: 2 * GIB, 8192, lambda _: longest)
    raise AssertionError("vLLM's check of the cache's memory is elsewhere")


def test_no_memory_for_the_cache() -> None:
    said = said_of(check_cache(0, 0))
    assert said.retry is not None
    assert said.retry.too_large is not None
    assert said.retry.too_large.limits.gpu_memory_utilization is None


@pytest.mark.parametrize(
    ("longest", "proposal"), [(4096, "max_model_len = 4096"), (0, "a smaller max_model_len")]
)
def test_a_context_that_is_too_long(longest: int, proposal: str) -> None:
    said = said_of(check_cache(GIB, longest))
    assert (said.retriable, said.retry) == (False, None)
    assert proposal in said.message


def test_memory_that_changed_while_it_was_measured() -> None:
    """Raised in the midst of a method that needs a GPU: only its text can be looked for."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    worker = Path(spec.submodule_search_locations[0], "v1", "worker", "gpu_worker.py")
    assert f'"{_MEASURED_WRONG}' in worker.read_text(encoding="utf-8")


def test_a_worker_process_that_failed(tmp_path: Path) -> None:
    from multiprocessing import Pipe

    from vllm.v1.executor.multiproc_executor import WorkerProc

    ours, theirs = Pipe(duplex=False)
    theirs.close()  # it ended before it was ready
    log = tmp_path / "engine.log"
    log.write_text("ERROR RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    with pytest.raises(Exception, match="WorkerProc") as caught:
        WorkerProc.wait_for_ready([SimpleNamespace(ready_pipe=ours, death_writer=None)])
    said = load_error(SPEC, caught.value, TRIED, LogPosition(str(log), 0))
    assert said.retry is not None
    assert said.retry.too_large == TRIED
