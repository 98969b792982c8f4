"""What vLLM loads a model with: its arguments and configuration from an entry of the registry.

vllm is imported by `make_setup`, not before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from batch_app.core import EngineLimits, LimitsTried
from batch_app.engine.base import ModelSpec
from batch_app.engine.limits import LEAST_BATCHED_TOKENS, lowered_for, table_limits
from batch_app.errors import EngineLoadError
from batch_app.floors import installed_version
from batch_app.gpus import list_gpus

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # torch.distributed's gloo listens even where a process is alone, and on the address of the
    # host's name unless told otherwise.
    "GLOO_SOCKET_IFNAME": "lo",
    # With tensor parallelism vLLM starts a process per GPU; forked ones inherit threads and locks.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # GiB. vLLM's own default takes half of a machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # On a CPU the engine's threads hold every core, and between two operators they turn in a loop
    # for up to a millisecond, each time, while whoever prepares requests waits for one. So many
    # turns, and then they sleep: docs/decisions/0010-the-engine-steps-in-a-process-of-its-own.md.
    "GOMP_SPINCOUNT": "1000",
}


def set_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not _has_compiled_flashinfer():
        # vLLM's warm-up samples with it, so it would compile: fails without nvcc and ninja.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # The core is a process of its own already; vLLM's would be one more, started slowly.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # A prompt that takes long to render holds up those behind it in the same thread, and a limit
    # would fail these, too: it counts their waiting. One that never ends is the hang watch's.
    os.environ["VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT"] = "0"


def _has_compiled_flashinfer() -> bool:
    """Whether flashinfer-jit-cache, FlashInfer's kernels ready-made, fits its version."""
    used, compiled = (
        installed_version("flashinfer-python"),
        installed_version("flashinfer-jit-cache"),
    )
    return used is not None and compiled is not None and _public(used) == _public(compiled)


def _public(version: str) -> str:
    return version.partition("+")[0]


class Setup(NamedTuple):
    """`args`: as `vllm serve` would parse them. `config`: vLLM's own, made of them.

    `limits_source`: where they come from, for people.
    """

    args: Namespace
    config: Any
    on_cpu: bool
    tried: LimitsTried
    limits_source: str


def make_setup(spec: ModelSpec) -> Setup:
    """Raises EngineLoadError of arguments that vLLM doesn't know, and whatever vLLM raises."""
    from vllm import __version__ as vllm_version
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    from batch_app.engine import vllm_kernels
    from batch_app.engine.vllm_serving import ArgumentError, serve_args

    arguments = dict(spec.engine_args)
    if spec.revision is not None:
        arguments.setdefault("revision", spec.revision)
    if spec.trust_remote_code:
        arguments["trust_remote_code"] = True
    arguments["disable_log_stats"] = False  # `stats` reads them
    on_cpu = bool(current_platform.is_cpu())
    device = find_device(current_platform)
    if on_cpu and emulates_bfloat16():
        arguments.setdefault("dtype", "float32")
    lowered = lowered_for(spec, device.name, str(vllm_version))
    if lowered is not None:
        arguments |= arguments_for(lowered)
    if spec.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
    try:
        args = serve_args(_model_path(spec.source), spec.name, arguments)
    except (ArgumentError, TypeError) as error:
        raise EngineLoadError(f"model {spec.name!r}: {error}") from error

    seqs, tokens, row = table_limits(device.memory_bytes, device.name)

    class TableArgs(EngineArgs):  # type: ignore[misc]
        @classmethod
        def get_batch_defaults(cls, world_size: int) -> Any:
            # As defaults, so that vLLM fits them to the model's length.
            return {UsageContext.LLM_CLASS: tokens}, {UsageContext.LLM_CLASS: seqs}

    # LLM_CLASS: the defaults of offline inference, larger than a server's.
    context = UsageContext.LLM_CLASS
    config = TableArgs.from_cli_args(args).create_engine_config(context)
    # The application asks nothing of the memory that holds what it is sent: leave the images
    # to the process that prepares them.
    config.parallel_config._api_process_count = 2
    if vllm_kernels.register():
        vllm_kernels.prefer(config)
    return Setup(
        args,
        config,
        on_cpu,
        LimitsTried(limits_of(config, on_cpu), device.name, str(vllm_version)),
        limits_source(spec, row, lowered is not None),
    )


def _model_path(source: str) -> str:
    """`source` with its `~` expanded; hub ids pass unchanged."""
    return str(Path(source).expanduser())


def check_source(source: str) -> None:
    """Refuse at once what is plainly a path to nothing; vLLM would ask the hub about it."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "params.json").is_file():
            raise EngineLoadError(f"{source!r} holds no model: it has no config.json")
    elif source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise EngineLoadError(f"there is no model at {source!r}")


def limits_of(config: Any, on_cpu: bool) -> EngineLimits:
    """What this configuration of vLLM's will run with."""
    scheduler = config.scheduler_config
    whole_prompts = not scheduler.enable_chunked_prefill
    return EngineLimits(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        gpu_memory_utilization=None if on_cpu else config.cache_config.gpu_memory_utilization,
        least_batched_tokens=(
            config.model_config.max_model_len if whole_prompts else LEAST_BATCHED_TOKENS
        ),
    )


def arguments_for(limits: EngineLimits) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
    }
    if limits.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = limits.gpu_memory_utilization
    return arguments


def limits_source(spec: ModelSpec, row: str, lowered: bool) -> str:
    named = [
        name for name in ("max_num_seqs", "max_num_batched_tokens") if name in spec.engine_args
    ]
    if lowered:
        source = "lowered after it ran out of memory"
    elif len(named) == 2:
        source = "from the registry"
    else:
        source = f"{named[0]} from the registry, else for {row}" if named else f"for {row}"
    if spec.gpu_memory_utilization is not None:
        source += "; other processes use GPU memory"
    return source


def emulates_bfloat16() -> bool:
    """Whether this processor lacks the vector instructions that bfloat16 is computed with.

    Measured on one with AVX2 only: a matrix product is 12 times slower in bfloat16 than in float32,
    and a tiny model answers 22 requests/s instead of 110.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512f" not in flags


class Device(NamedTuple):
    """`memory_bytes`: of one GPU; None on a CPU, 0 where the driver doesn't say."""

    name: str
    memory_bytes: int | None


def find_device(current_platform: Any) -> Device:
    """Find what vLLM is going to compute on: the first GPU, or a slice of one, or the processor."""
    if current_platform.is_cpu():
        return Device(_processor_name(), None)
    gpus = list_gpus() if current_platform.is_cuda() else ()
    if gpus:
        return Device(gpus[0].name, gpus[0].memory_bytes or 0)
    return Device(
        str(_ask_driver(current_platform.get_device_name, "GPU")),
        int(_ask_driver(current_platform.get_device_total_memory, 0)),
    )


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def _ask_driver(question: Callable[[], Any], unknown: Any) -> Any:
    try:
        return question()
    except TypeError:
        raise  # vLLM's platforms answer None for a name that they haven't
    except Exception as error:  # noqa: BLE001 - each platform's driver has exceptions of its own
        logger.warning("The GPU's driver doesn't answer: %s: %s", type(error).__name__, error)
        return unknown
