"""Data sheets: a model's size and a device's speed, for a guess where nothing was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from batch_app.forecast.roofline import Device, ModelSize
from batch_app.machine import Machine, hub_folder
from batch_app.registry import ModelEntry

#: What a product's name contains: bandwidth in GB/s and dense 16-bit TFLOP/s. The first that fits.
#: Source: the makers' data sheets.
_GPUS: tuple[tuple[str, float, float], ...] = (
    ("B200", 8000, 2250),
    ("H200", 4800, 989),
    ("H100 PCIe", 2000, 756),
    ("H100", 3350, 989),
    ("A100-SXM4-40GB", 1555, 312),
    ("A100", 2039, 312),
    ("L40S", 864, 362),
    ("L40", 864, 181),
    ("L4", 300, 121),
    ("A40", 696, 150),
    ("A10", 600, 125),
    ("RTX 6000 Ada", 960, 182),
    ("RTX A6000", 768, 155),
    ("RTX 5090", 1792, 210),
    ("RTX 5080", 960, 113),
    ("RTX 4090", 1008, 165),
    ("RTX 4080", 717, 97),
    ("RTX 4070", 504, 58),
    ("RTX 3090", 936, 71),
    ("V100", 900, 125),
    ("T4", 320, 65),
)
#: Of a GPU that isn't listed: a card of the middle.
_OTHER_GPU = (600.0, 80.0)
#: Of a processor's core, up to as many as fill its memory's channels.
_GB_PER_S_A_CORE, _MOST_CORES, _GFLOP_PER_S_A_CORE = 8.0, 16, 40.0
_BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


def device_of(machine: Machine) -> Device:
    """The machine's device, as its data sheet has it; roughly, where that isn't known."""
    if machine.device_type == "gpu":
        fits = (row[1:] for row in _GPUS if row[0].lower() in machine.device.lower())
        gigabytes, teraflops = next(fits, _OTHER_GPU)
        return Device(machine.device, gigabytes * 1e9, teraflops * 1e12, machine.memory_bytes)
    cores = len(os.sched_getaffinity(0))
    return Device(
        machine.device,
        min(cores, _MOST_CORES) * _GB_PER_S_A_CORE * 1e9,
        cores * _GFLOP_PER_S_A_CORE * 1e9,
        machine.memory_bytes,
    )


def size_of(entry: ModelEntry) -> ModelSize | None:
    """From the model's config.json, where its files are on this machine, and it runs here."""
    folder = None if entry.runs_elsewhere else local_folder(entry)
    if folder is None:
        return None
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
        weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except (OSError, orjson.JSONDecodeError):
        return None
    return size_of_config(config, weight_bytes)


def size_of_config(config: Mapping[str, Any], weight_bytes: int) -> ModelSize | None:
    """Compute a model's size from its config.json; None for a kind that isn't known here.

    `weight_bytes`: of the files of its weights; 0 to compute them too.
    """
    try:
        return _size(config, weight_bytes)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError):
        return None


def local_folder(entry: ModelEntry) -> Path | None:
    """Where its files lie: a folder, or a snapshot in the model hub's cache."""
    folder = Path(entry.source).expanduser()
    if folder.is_dir():
        return folder
    own = hub_folder(entry.source)
    revision = entry.revision or "main"
    with suppress(OSError, ValueError):
        revision = (own / "refs" / revision).read_text(encoding="ascii").strip()
    snapshot = own / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def _size(config: Mapping[str, Any], weight_bytes: int) -> ModelSize:
    config = config.get("text_config") or config  # of a model that also sees
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or hidden // heads
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    number_bytes = _BYTES_OF.get(str(dtype), 2)
    attention = hidden * head_size * (2 * heads + 2 * kv_heads)
    experts = config.get("num_experts_per_tok")
    inner = config.get("moe_intermediate_size") if experts else None
    feed_forward = 3 * hidden * (inner or config["intermediate_size"]) * (experts or 1)
    # The table of words is looked up, not multiplied; the last layer is.
    num_parameters = layers * (attention + feed_forward) + hidden * config["vocab_size"]
    return ModelSize(
        num_parameters=num_parameters,
        weight_bytes=weight_bytes or num_parameters * number_bytes,
        kv_bytes_per_token=2 * layers * kv_heads * head_size * min(number_bytes, 2),
    )
