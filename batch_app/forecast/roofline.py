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


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What the parts of a step take, in seconds.

    `step`: any step, above all reading the weights; `running`: a request that gets a token;
    `prefill`: a prompt token computed; `context`: a token in the cache looked at; `attended`: a
    pair of a prompt token and one before it; `started`: a request taken in.
    """

    step: float
    running: float
    prefill: float
    context: float
    attended: float
    started: float


#: Shares of the data sheet's figures that engines reach in practice.
BANDWIDTH_REACHED = 0.7
FLOPS_REACHED = 0.5
#: Work beside the device: launching a step, sampling a token, taking in a request.
HOST_STEP_S, HOST_TOKEN_S, HOST_REQUEST_S = 3e-3, 2e-5, 5e-4

#: Until an engine's libraries are imported and it is set up, and how fast weights come off a disk.
#: On 2 CPU cores a tiny model took 16 to 20 s; the usage guide's, of 8.6 GB on a GPU, 26 s.
START_S, WEIGHT_BYTES_PER_S = 18.0, 1e9

#: A 4B model on a card of the middle: only the proportions between them matter.
TYPICAL = Coefficients(
    step=1.5e-2, running=1.2e-4, prefill=9e-5, context=2e-7, attended=4e-9, started=5e-4
)


def coefficients(size: ModelSize, device: Device) -> Coefficients:
    """What this model can be expected to take on this device.

    A step reads all weights and the context's keys and values; a token costs two operations a
    parameter. Attention between tokens costs as many operations as the keys and values have bytes,
    times a few for the query heads that share them.

    Source: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model",
    2009; Kaplan et al., "Scaling Laws for Neural Language Models", 2020 (operations a token).
    """
    bandwidth = device.bandwidth_bytes_per_s * BANDWIDTH_REACHED
    flops = device.flop_per_s * FLOPS_REACHED
    token_s = 2.0 * size.num_parameters / flops
    return Coefficients(
        step=size.weight_bytes / bandwidth + HOST_STEP_S,
        running=token_s + HOST_TOKEN_S,
        prefill=token_s,
        context=size.kv_bytes_per_token / bandwidth,
        attended=4.0 * size.kv_bytes_per_token / flops,
        started=HOST_REQUEST_S,
    )


def load_s(size: ModelSize) -> float:
    """Seconds until a model of this size answers, roughly."""
    return START_S + size.weight_bytes / WEIGHT_BYTES_PER_S


def kv_cache_tokens(size: ModelSize, device: Device, utilization: float = 0.9) -> int | None:
    """Tokens that fit beside the weights; None where the memory isn't known, or nothing fits."""
    if device.memory_bytes is None or size.kv_bytes_per_token <= 0:
        return None
    free = device.memory_bytes * utilization - 1.1 * size.weight_bytes
    return int(free / size.kv_bytes_per_token) if free > 0 else None
