"""A first guess from data sheets: what a model's size and a device's speed allow. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSize:
    """From the model's config.json. `num_parameters`: those that one token passes through.

    `kv_bytes_per_token`: 2 · layers · KV heads · head size · bytes a number. `weight_bytes`: what
    is read in a step.
    """

    num_parameters: float
    weight_bytes: float
    kv_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Device:
    """From its data sheet. `memory_bytes` None where unknown."""

    name: str
    bandwidth_bytes_per_s: float
    flop_per_s: float
    memory_bytes: float | None = None
