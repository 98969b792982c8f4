"""vLLM's configuration for NVIDIA cards, made on a machine that has none.

`python -m support.cuda_platform` reads cases (`Case`) as JSON and prints what `make_setup` made of
each (`Made`). A process of its own, because vLLM has one platform for the life of a process.

Real: `make_setup`, vLLM's argument parser, configuration classes, CUDA platform (with NVML) and the
inspection of the model. Not real, at the edge:

- NVML: for vLLM, the functions of its pynvml that the platform calls; any other raises. For us,
  `support.nvml`, unless the case says that only vLLM can ask. A card without `memory_gib` answers
  NotSupported, as one does that shares the machine's memory.
- `device_count`, which asks a torch that is built without CUDA.
- vLLM's compiled CUDA modules, which the CPU build lacks: empty modules. Nothing here computes.
- The cache of model inspections: writing it imports layers that need the compiled modules.

Nothing is loaded: capturing graphs, kernels and memory need a card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pynvml as real_pynvml

from batch_app.core import LimitsTried
from batch_app.engine.base import ModelSpec
from support.nvml import Card, FakeNvml

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "models" / "demo"
GIB = 1 << 30


class Case(msgspec.Struct, frozen=True):
    """`cards` of one kind. `memory_gib`: None for a device that shares the machine's memory."""

    name: str
    memory_gib: int | None
    capability: tuple[int, int] = (9, 0)
    cards: int = 1
    only_vllm_asks: bool = False
    engine_args: dict[str, Any] = {}
    lowered: LimitsTried | None = None
    gpu_memory_utilization: float | None = None


class Made(msgspec.Struct, frozen=True):
    """`graph_sizes`: the batch sizes that CUDA graphs are captured for."""

    tried: LimitsTried
    limits_source: str
    on_cpu: bool
    graph_sizes: list[int]
    executor: str
    worker: str
    world_size: int
    start_method: str
    flashinfer_samples: bool


def configure(cases: Sequence[Case]) -> list[Made]:
    """Make the configuration of each case, in a process of its own. Takes about 20 seconds."""
    environment = {name: value for name, value in os.environ.items() if name[:5] != "VLLM_"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.cuda_platform"],
        input=msgspec.json.encode(cases),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(done.stderr.decode(errors="replace")[-3000:])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[Made])


def _stub_compiled_modules() -> None:
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    attention = types.ModuleType("vllm.vllm_flash_attn")
    attention.__dict__.update(
        compile_flash_attn_varlen_func_from_specs=_absent("flash attention"),
        fa_version_unsupported_reason=lambda *_, **__: None,
        flash_attn_varlen_func=_absent("flash attention"),
        get_scheduler_metadata=_absent("flash attention"),
        is_fa_version_supported=lambda version, *_: version == 2,
    )
    sys.modules["vllm.vllm_flash_attn"] = attention


def _absent(name: str) -> Callable[..., Any]:
    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} was called, which this rehearsal has not got")

    return called


def _stub_nvml(case: Case) -> None:
    from vllm.third_party import pynvml

    for name in dir(pynvml):
        if name.startswith("nvml"):
            setattr(pynvml, name, _absent(name))

    def memory_info(_: int, **__: Any) -> Any:
        if case.memory_gib is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        total = case.memory_gib * GIB
        return types.SimpleNamespace(total=total, free=total, used=0)

    def handle(index: int) -> int:
        if index >= case.cards:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    total = case.memory_gib and case.memory_gib * GIB
    cards = [Card(f"GPU-{index}", case.name, total) for index in range(case.cards)]
    ours = (
        FakeNvml((), init_error=real_pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        if case.only_vllm_asks
        else FakeNvml(cards)
    )
    sys.modules["pynvml"] = ours  # type: ignore[assignment]

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: case.cards,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetName": lambda _: case.name,
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlDeviceGetCudaComputeCapability": lambda _: case.capability,
    }
    for name, answer in answers.items():
        setattr(pynvml, name, answer)


def _make_platform(cases: list[Case]) -> Any:
    """`cases`: its first is the one that the platform has the cards of."""
    import torch
    from vllm.platforms.cuda import NvmlCudaPlatform

    class CudaPlatform(NvmlCudaPlatform):  # type: ignore[misc]
        """vLLM's own, which answers None for a name that it hasn't; this one raises."""

        def __getattr__(self, name: str) -> Any:
            if hasattr(torch.cuda, name):  # passed on by vLLM's, too
                return super().__getattr__(name)
            raise AttributeError(f"vLLM's CUDA platform has no {name!r}")

        @classmethod
        def device_count(cls) -> int:
            return cases[0].cards

    return CudaPlatform()


def _make(case: Case) -> Made:
    from vllm import envs
    from vllm.platforms.cuda import NvmlCudaPlatform

    from batch_app.engine.vllm_setup import make_setup, set_environment

    set_environment()
    _stub_nvml(case)
    NvmlCudaPlatform.get_device_capability.__func__.cache_clear()  # of the case before
    spec = ModelSpec(
        name="demo", engine="vllm", source=str(DEMO_MODEL), engine_args=case.engine_args
    )
    for name in ("lowered", "gpu_memory_utilization"):
        if (value := getattr(case, name)) is not None:
            spec = msgspec.structs.replace(spec, **{name: value})
    setup = make_setup(spec)
    parallel = setup.config.parallel_config
    return Made(
        tried=setup.tried,
        limits_source=setup.limits_source,
        on_cpu=setup.on_cpu,
        graph_sizes=list(setup.config.compilation_config.cudagraph_capture_sizes),
        executor=str(parallel.distributed_executor_backend),
        worker=str(parallel.worker_cls),
        world_size=parallel.world_size,
        start_method=str(envs.VLLM_WORKER_MULTIPROC_METHOD),
        flashinfer_samples=bool(envs.VLLM_USE_FLASHINFER_SAMPLER),
    )


def main() -> None:
    _stub_compiled_modules()
    cases = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Case])
    _stub_nvml(cases[0])  # vLLM asks while it is imported
    import vllm.platforms

    vllm.platforms._current_platform = _make_platform(cases)
    from vllm.model_executor.models import registry

    registry._LazyRegisteredModel._save_modelinfo_to_cache = lambda *_: None
    made = []
    while cases:
        made.append(_make(cases[0]))
        del cases[0]
    print("\n" + json.dumps(msgspec.to_builtins(made)))


if __name__ == "__main__":
    main()
