"""What vLLM loads a model with: its arguments and configuration from an entry of the registry, and
why it couldn't, in words.

vllm is imported by `make_setup`, not before.
"""

from __future__ import annotations

import contextlib
import os
import platform
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from batch_app.core import EngineLimits, LimitsTried
from batch_app.engine.base import ModelSpec
from batch_app.engine.limits import LEAST_BATCHED_TOKENS, lowered_for, table_limits
from batch_app.errors import EngineLoadError

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # torch.distributed's gloo listens even where a process is alone, and on the address of the
    # host's name unless told otherwise.
    "GLOO_SOCKET_IFNAME": "lo",
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
    # The core is a process of its own already; vLLM's would be one more, started slowly.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # A prompt that takes long to render holds up those behind it in the same thread, and a limit
    # would fail these, too: it counts their waiting. One that never ends is the hang watch's.
    os.environ["VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT"] = "0"


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
    device = device_name(current_platform)
    if on_cpu and emulates_bfloat16():
        arguments.setdefault("dtype", "float32")
    lowered = lowered_for(spec, device, str(vllm_version))
    if lowered is not None:
        arguments |= arguments_for(lowered)
    try:
        args = serve_args(_model_path(spec.source), spec.name, arguments)
    except (ArgumentError, TypeError) as error:
        raise EngineLoadError(f"model {spec.name!r}: {error}") from error

    seqs, tokens, row = table_limits(
        None if on_cpu else int(current_platform.get_device_total_memory()), device
    )

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
        LimitsTried(limits_of(config, on_cpu), device, str(vllm_version)),
        limits_source(spec.engine_args, row, lowered is not None),
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


def limits_source(registry: Mapping[str, Any], row: str, lowered: bool) -> str:
    if lowered:
        return "lowered after it ran out of memory"
    named = [name for name in ("max_num_seqs", "max_num_batched_tokens") if name in registry]
    if len(named) == 2:
        return "from the registry"
    return f"{named[0]} from the registry, else for {row}" if named else f"for {row}"


def load_error(
    spec: ModelSpec, error: BaseException, started_with: LimitsTried | None
) -> EngineLoadError:
    """Put into words why vLLM could not load this model."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    said = " ".join(str(link) for link in chain).lower()
    names = {type(link).__name__ for link in chain}
    prefix = f"model {spec.name!r} could not be loaded"
    first = f"{type(error).__name__}: {error}"[:1000]
    if (
        "OutOfMemoryError" in names
        or isinstance(error, MemoryError)
        or "out of memory" in said
        or "free memory on device" in said
    ):
        return EngineLoadError(
            f"{prefix}: out of memory ({first})", retriable=True, too_large=started_with
        )
    if not Path(spec.source).expanduser().is_dir() and (
        names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "RepositoryNotFoundError"}
        or "couldn't connect" in said
        or "not a local folder" in said
        or "offline mode" in said
    ):
        return EngineLoadError(
            f"{prefix}: there is no folder {spec.source!r}, and no such model in the hub's cache "
            f"or on the hub ({first})"
        )
    return EngineLoadError(f"{prefix}: {first}")


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


def device_name(current_platform: Any) -> str:
    """The processor's or the GPU's own name."""
    if current_platform.is_cpu():
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.processor() or "CPU"
    return str(current_platform.getdevice_name())
