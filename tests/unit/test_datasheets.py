"""A model's size from its config, and a device's speed from its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_app.datasheets import device_of, local_folder, size_of
from batch_app.machine import Machine
from batch_app.registry import ModelEntry

#: The published shape of a model with 4.0 billion parameters, 3.6 of them outside the table.
CONFIG = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}


def test_the_size_follows_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    size = size_of(ModelEntry(name="m", source=str(tmp_path)))
    assert size is not None
    assert size.num_parameters == pytest.approx(4.0e9, rel=0.02)
    assert size.weight_bytes == 2 * size.num_parameters
    assert size.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2


def test_weights_that_are_there_are_measured_and_experts_counted(tmp_path: Path) -> None:
    sparse = {**CONFIG, "num_experts_per_tok": 2, "moe_intermediate_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sparse}))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 1000)
    size = size_of(ModelEntry(name="m", source=str(tmp_path)))
    assert size is not None
    assert size.weight_bytes == 1000
    assert size.num_parameters < 3e9


def test_without_files_there_is_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    entry = ModelEntry(name="m", source="org/m")
    assert size_of(entry) is None
    snapshot = tmp_path / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert local_folder(entry) == snapshot
    (snapshot / "config.json").write_text("[]")
    assert size_of(entry) is None


def test_devices() -> None:
    def gpu(name: str) -> float:
        return device_of(Machine(name, "gpu", "here", "1", 1 << 34)).bandwidth_bytes_per_s

    assert gpu("NVIDIA H100 80GB HBM3") == 3.35e12
    assert gpu("NVIDIA H100 PCIe") == 2e12
    assert gpu("NVIDIA GeForce RTX 4080") == 0.717e12
    assert gpu("NVIDIA L40S") != gpu("NVIDIA L4")
    assert gpu("something new") > 1e11
    cpu = device_of(Machine("a processor", "cpu", "here"))
    assert 1e9 < cpu.bandwidth_bytes_per_s < 1e12
