"""How many tokens of KV cache a model leaves room for on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_app.engine.limits import GIB
from batch_app.forecast.roofline import ModelSize
from batch_app.machine import Machine

#: What a loaded model needs beside weights and cache: activations, graphs, the libraries.
OVERHEAD_BYTES = GIB
#: With room for fewer a model is of little use.
FEWEST_TOKENS = 1024
#: vLLM's own default, and what the engine is told on a machine without a GPU.
_UTILIZATION = 0.9
_CPU_CACHE_GIB = 1


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """The memory that vLLM may use: `share` of each of `devices` GPUs, `num_bytes` in all."""

    num_bytes: float
    share: float
    devices: int


def gpu_budget(memory_bytes: int, arguments: Mapping[str, Any]) -> GpuBudget:
    """Compute the budget of GPUs with `memory_bytes` each, under these engine arguments."""
    devices = _number(arguments, "tensor_parallel_size") * _number(
        arguments, "pipeline_parallel_size"
    )
    share = arguments.get("gpu_memory_utilization", _UTILIZATION)
    share = share if isinstance(share, int | float) else _UTILIZATION
    return GpuBudget(memory_bytes * devices * share, share, devices)


def cpu_cache_bytes() -> int:
    """The KV cache on a machine without a GPU: VLLM_CPU_KVCACHE_SPACE, else 1 GiB."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    return (int(space) if space.isdecimal() else _CPU_CACHE_GIB) * GIB


def cache_tokens(model: ModelSize, machine: Machine, arguments: Mapping[str, Any]) -> int | None:
    """Estimate the tokens that the KV cache has room for; None if it can't be estimated.

    0 or less: the weights alone don't fit.
    """
    total = machine.memory_bytes
    if not total or not model.kv_bytes_per_token:
        return None
    if machine.device_type == "cpu":
        cache = cpu_cache_bytes()
        fits = model.weight_bytes + cache + OVERHEAD_BYTES <= total
        return int(cache / model.kv_bytes_per_token) if fits else 0
    budget = gpu_budget(total, arguments)
    left = budget.num_bytes - model.weight_bytes - OVERHEAD_BYTES * budget.devices
    return int(left / model.kv_bytes_per_token)


def _number(arguments: Mapping[str, Any], name: str) -> int:
    value = arguments.get(name, 1)
    return value if isinstance(value, int) and value > 0 else 1
