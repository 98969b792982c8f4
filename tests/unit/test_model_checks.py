"""What `models check` says of a model's files, before an engine meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_app.core import EngineLimits, LimitsTried
from batch_app.doctor.finding import Finding, State
from batch_app.doctor.models import ModelCheck, check_model
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.slot import model_spec
from batch_app.machine import Machine
from batch_app.registry import ModelEntry

DEMO = Path(__file__).parents[2] / "models" / "demo"
GIB = 1 << 30
GPU = Machine("NVIDIA Test 24", "gpu", "here", "1", 24 * GIB)
CPU = Machine("A processor", "cpu", "here", None, 64 * GIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def looked_at(folder: Path | str, machine: Machine = GPU, **fields: Any) -> ModelCheck:
    entry = ModelEntry(name="m", source=str(folder), **fields)
    return check_model(entry, machine, Path("/nonexistent/lowered-limits.json"))


def finding(check: ModelCheck, subject: str) -> Finding:
    return next(one for one in check.findings if one.subject == subject)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("machine", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_demo_model_is_well(machine: Machine) -> None:
    check = looked_at(DEMO, machine, engine_args={"max_model_len": 2048})
    assert check.state is State.OK, check.findings
    subjects = [one.subject for one in check.findings]
    assert subjects == ["files", "config", "tokenizer", "memory", "arguments"]
    assert check.folder == DEMO
    assert check.engine_args["max_model_len"] == 2048
    assert check.engine_args["max_num_seqs"] == (256 if machine is GPU else 512)


def damaged(folder: Path, how: str) -> Mapping[str, Any]:
    """Break the model. Returns fields of its entry."""
    weights = folder / "model.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "no safetensors":
        weights.write_bytes(b"\xff" * 100)
    elif how == "no weights":
        weights.unlink()
    elif how == "link to nothing":
        weights.unlink()
        weights.symlink_to("nowhere")
    elif how == "part is missing":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "gguf":
        for path in (weights, folder / "config.json"):
            path.unlink()
        (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    elif how == "gguf beside a config":
        weights.rename(folder / "model.gguf")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "torn config":
        (folder / "config.json").write_text("{")
    elif how == "torn tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "too long":
        return {"engine_args": {"max_model_len": 4097}}
    elif how == "no such engine":
        return {"engine": "other"}
    return {}


@pytest.mark.parametrize(
    ("how", "subject", "said"),
    [
        ("cut short", "files", "cut short"),
        ("no safetensors", "files", "damaged"),
        ("no weights", "files", "no weights"),
        ("link to nothing", "files", "lacks model.safetensors"),
        ("part is missing", "files", "lacks model-2.safetensors"),
        ("gguf", "files", "GGUF file model-Q4_K_M.gguf, which vLLM can't load"),
        ("gguf beside a config", "files", "GGUF file model.gguf, which vLLM can't load"),
        ("no config", "files", "no config.json"),
        ("torn config", "config", "can't be read"),
        ("torn tokenizer", "tokenizer", "tokenizer.json"),
        ("too long", "config", "4,097 is more than the 4,096"),
        ("no such engine", "engine", "'other'"),
    ],
)
def test_what_keeps_it_from_running(folder: Path, how: str, subject: str, said: str) -> None:
    check = looked_at(folder, **damaged(folder, how))
    found = finding(check, subject)
    assert (found.state, check.state) == (State.FAIL, State.FAIL)
    assert said in found.message
    assert found.fix


def test_gguf_has_its_own_advice(folder: Path) -> None:
    fix = finding(looked_at(folder, **damaged(folder, "gguf")), "files").fix
    assert "original repository" in fix
    assert "convert" in fix
    file = finding(looked_at(folder / "model-Q4_K_M.gguf"), "files")
    assert (file.state, file.fix) == (State.FAIL, fix)


def test_gguf_beside_safetensors_is_no_problem(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert looked_at(folder).state is State.OK


def test_what_is_not_here_is_fetched_or_a_mistake() -> None:
    check = looked_at("org/name")
    assert (check.state, check.folder) == (State.WARN, None)
    assert "fetches it" in finding(check, "files").message
    assert looked_at("/nonexistent/model").state is State.FAIL


def test_stretched_positions_may_be_longer(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert looked_at(folder, engine_args={"max_model_len": 16384}).state is State.OK


def test_code_of_its_own_is_named(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModel": "modeling.Own"})
    assert "trust_remote_code" in finding(looked_at(folder), "config").fix
    assert looked_at(folder, trust_remote_code=True).state is State.OK


def test_without_a_tokenizer_or_a_template_it_runs_with_a_warning(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "chat template" in finding(looked_at(folder), "tokenizer").message
    given = looked_at(folder, engine_args={"chat_template": "{{ messages[0].content }}"})
    assert finding(given, "tokenizer").state is State.OK
    (folder / "tokenizer.json").unlink()
    assert finding(looked_at(folder), "tokenizer").state is State.WARN


def test_a_model_that_reasons_needs_a_parser(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{{ enable_thinking }}<think>"
    )
    found = finding(looked_at(folder), "reasoning")
    assert (found.state, found.fix) == (
        State.WARN,
        'reasoning_parser = "qwen3" among its engine_args',
    )
    given = looked_at(folder, engine_args={"reasoning_parser": "qwen3"})
    assert [one for one in given.findings if one.subject == "reasoning"] == []


def sparse_weights(folder: Path, num_bytes: int) -> None:
    """A file of this length that takes no room."""
    head = json.dumps({"a": {"data_offsets": [0, num_bytes]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + num_bytes)


def test_memory_of_a_gpu(folder: Path) -> None:
    # Bytes a token: 2 (keys, values) × 3 layers × 2 heads × 64 numbers × 2 = 1536.
    def found(**engine_args: Any) -> Finding:
        return finding(looked_at(folder, engine_args=engine_args), "memory")

    sparse_weights(folder, 20 * GIB)
    assert found().state is State.OK
    assert f"{int((24 * 0.9 - 21) * GIB / 1536) // 1000:,}," in found().message
    assert found(gpu_memory_utilization=0.85).state is State.FAIL
    assert found(gpu_memory_utilization=0.85, tensor_parallel_size=2).state is State.OK
    change_config(folder, num_hidden_layers=300)  # 0.6 GiB hold 4,194 tokens
    assert found(max_model_len=4096).state is State.OK
    tight = found(max_model_len=4096, gpu_memory_utilization=0.895)
    assert tight.state is State.WARN
    assert "less than one request" in tight.message
    assert tight.fix.startswith("max_model_len = 3072 ")
    assert found(max_model_len=4096, gpu_memory_utilization=0.876).state is State.FAIL


def test_memory_of_a_cpu(folder: Path) -> None:
    sparse_weights(folder, 70 * GIB)
    assert finding(looked_at(folder, CPU), "memory").state is State.FAIL
    small = replace(CPU, memory_bytes=10_000 * GIB)
    assert finding(looked_at(folder, small), "memory").state in (State.OK, State.WARN)


def test_limits_that_were_lowered_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_app.doctor.models.installed_version", lambda _: "9.9")
    entry = ModelEntry(name="m", source=str(DEMO), engine_args={"max_model_len": 1024})
    path = tmp_path / "lowered-limits.json"
    limits = EngineLimits(max_num_seqs=7, max_num_batched_tokens=777, gpu_memory_utilization=0.5)
    LoweredLimits(path).set(model_spec(entry), LimitsTried(limits, GPU.device, "9.9"))
    check = check_model(entry, GPU, path)
    assert check.engine_args == {
        "max_num_seqs": 7,
        "max_num_batched_tokens": 777,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 1024,
    }
    assert str(path) in finding(check, "arguments").message
    other = check_model(entry, replace(GPU, device="another"), path)
    assert other.engine_args["max_num_seqs"] == 256


def test_the_simulated_engine_needs_nothing() -> None:
    check = looked_at("sim", engine="sim")
    assert (check.state, len(check.findings)) == (State.OK, 1)
