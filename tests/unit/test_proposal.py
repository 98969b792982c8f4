"""The registry entry that is proposed for a model, from its small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch_app.errors import BadRequest
from batch_app.machine import Machine
from batch_app.model_description import ModelDescription, downloaded_bytes, read_folder
from batch_app.proposal.entry import Proposal, propose

GIB = 1 << 30
GPU = Machine("NVIDIA Test 24", "gpu", "here", "1", 24 * GIB)
CPU = Machine("A processor", "cpu", "here", None, 64 * GIB)
#: 2 (keys, values) × 16 layers × 8 heads × 128 numbers × 2 bytes = 64 KiB per token.
CONFIG = {
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 150_000,
    "max_position_embeddings": 40_960,
}
QWEN3 = (
    "{% if tools %}<tool_call>{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}"
)


def described(
    template: str | None = QWEN3, *, weights: float = 4 * GIB, **config: Any
) -> ModelDescription:
    return ModelDescription("org/m", CONFIG | config, template, {"model.safetensors": int(weights)})


def proposed(
    model: ModelDescription, machine: Machine = GPU, given: dict[str, Any] | None = None
) -> Proposal:
    return propose(model, machine, given or {})


def reason(proposal: Proposal, field: str) -> str:
    return next(one.reason for one in proposal.values if one.field == field)


def test_a_model_with_tools_and_thinking() -> None:
    found = proposed(described())
    assert found.engine_args == {
        "max_model_len": 40_960,
        "dtype": "bfloat16",
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
    }
    assert found.chat_template_kwargs == ["enable_thinking"]
    assert reason(found, "chat_template_kwargs").endswith("without it: on")
    assert found.warnings == ()
    assert all(one.reason for one in found.values)


@pytest.mark.parametrize(
    ("model_type", "template", "tool", "reasoning"),
    [
        ("qwen3_moe", "{{ tools }}<function=x>", "qwen3_coder", None),
        ("qwen2", "{{ tools }}<tool_call>", "hermes", None),
        ("qwen2", "{{ messages }}<think>", None, "deepseek_r1"),
        ("deepseek_v3", "{{ tools }}{{ thinking }}<think>", "deepseek_v31", "deepseek_v3"),
        ("gpt_oss", "{{ tools }}<|channel|>analysis", "openai", "openai_gptoss"),
        ("llama", "{{ tools }}<|python_tag|>", "llama3_json", None),
        ("llama", "{{ messages }}", None, None),
        ("mistral3", "{{ tools }}[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("smollm3", "{{ tools }}{{ enable_thinking }}<tool_call><think>", "hermes", "qwen3"),
        ("never-heard-of", "{{ tools }}", None, None),
    ],
)
def test_parsers(model_type: str, template: str, tool: str | None, reasoning: str | None) -> None:
    found = proposed(described(template, model_type=model_type)).engine_args
    assert (found.get("tool_call_parser"), found.get("reasoning_parser")) == (tool, reasoning)


def test_a_switch_that_is_off_by_default() -> None:
    model = described("{% if thinking %}<think>{% endif %}", model_type="deepseek_v3")
    assert proposed(model).chat_template_kwargs == ["thinking"]
    assert reason(proposed(model), "chat_template_kwargs").endswith("without it: off")


def test_the_context_fits_the_gpu() -> None:
    # 24 GiB × 0.9 − 1 GiB − 20 GiB = 0.6 GiB: 9,830 tokens.
    found = proposed(described(weights=20 * GIB))
    assert found.engine_args["max_model_len"] == 9 * 1024
    assert "fewer than the 40,960" in reason(found, "max_model_len")
    two = proposed(described(weights=20 * GIB), given={"tensor_parallel_size": 2})
    assert two.engine_args["max_model_len"] == 40_960
    assert two.engine_args["tensor_parallel_size"] == 2


def test_the_context_fits_the_cache_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert proposed(described(), CPU).engine_args["max_model_len"] == 16 * 1024
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert proposed(described(), CPU).engine_args["max_model_len"] == 32 * 1024


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_model_that_does_not_fit(machine: Machine) -> None:
    found = proposed(described(weights=100 * GIB), machine)
    assert "max_model_len" not in found.engine_args
    assert "don't fit" in found.warnings[0]


def test_what_is_given_replaces_what_is_proposed() -> None:
    found = proposed(described(), given={"max_model_len": 512, "seed": 1})
    assert found.engine_args["max_model_len"] == 512
    assert found.engine_args["seed"] == 1
    assert reason(found, "max_model_len") == "as given"


@pytest.mark.parametrize(
    ("config", "device", "dtype"),
    [
        ({"dtype": None, "torch_dtype": "float16"}, "NVIDIA L4", "float16"),
        ({"dtype": "float32"}, "NVIDIA L4", "bfloat16"),
        ({}, "Tesla T4", "float16"),
        ({"quantization_config": {"quant_method": "awq"}}, "NVIDIA L4", None),
        ({"dtype": None}, "NVIDIA L4", None),
    ],
)
def test_dtype(config: dict[str, Any], device: str, dtype: str | None) -> None:
    machine = Machine(device, "gpu", "here", "1", 24 * GIB)
    assert proposed(described(**config), machine).engine_args.get("dtype") == dtype


def test_without_a_chat_template_only_completions_work() -> None:
    found = proposed(described(None))
    assert set(found.engine_args) == {"max_model_len", "dtype"}
    assert "only /v1/completions" in found.warnings[0]


def test_reasoning_that_no_parser_is_known_for() -> None:
    found = proposed(described("{{ enable_thinking }}", model_type="other"))
    assert "no reasoning parser is known" in found.warnings[0]


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "chat_template.jinja").write_text(QWEN3)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 900)
    model = read_folder(tmp_path)
    assert (model.template, model.weight_bytes, model.download_bytes) == (QWEN3, 100, 0)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.gguf": b"GGUF"}, "original repository"),
        ({"model.gguf": b"GGUF", "config.json": b"{}"}, "original repository"),
        ({"model.safetensors": b""}, "no config.json"),
        ({"config.json": b"{"}, "can't be read"),
        ({"config.json": b"[]"}, "not a JSON object"),
    ],
)
def test_folders_that_hold_no_usable_model(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest, match=said):
        read_folder(tmp_path)


def test_only_what_the_worker_fetches_is_downloaded() -> None:
    sizes = {
        "config.json": 1,
        "model.safetensors": 20,
        "model.gguf": 300,
        "pytorch_model.bin": 4000,
    }
    assert downloaded_bytes(sizes) == 21
