"""On what a batch ran: what is kept, and what isn't."""

from __future__ import annotations

from pathlib import Path

from batch_app.engine.base import EngineInfo
from batch_app.machine import Machine
from batch_app.provenance import model_revision, run_facts, with_run
from batch_app.registry import ModelEntry

MACHINE = Machine("a GPU", "gpu", "here", "570.1", 1 << 34)
INFO = EngineInfo(
    engine="vllm",
    engine_version="0.32.0",
    model="m",
    device="a GPU",
    device_type="gpu",
    load_s=1.0,
    max_model_len=2048,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
)


def test_neither_secrets_nor_paths_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "secret-folder" / "my-model"
    folder.mkdir(parents=True)
    arguments = {"hf_token": "abc", "chat_template": "/home/ana/t.jinja", "seed": 7}
    entry = ModelEntry(name="m", source=str(folder), engine_args=arguments)

    facts = run_facts(entry, INFO, "rev", MACHINE)

    assert facts["source"] == "my-model"
    assert facts["engine_args"] == {"hf_token": "…", "chat_template": "t.jinja", "seed": 7}
    assert facts["seed"] == 7
    assert facts["driver"] == "570.1"
    assert "secret" not in str(facts)
    assert "abc" not in str(facts)


def test_a_run_like_one_before_is_told_once() -> None:
    entry = ModelEntry(name="m", source="org/m")
    facts = run_facts(entry, INFO, "rev", MACHINE)
    once = with_run(None, facts)
    assert with_run(once, facts) == once
    assert len(with_run(once, {**facts, "engine_version": "0.33"})["runs"]) == 2


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    entry = ModelEntry(name="m", source=str(tmp_path), revision="main")
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0" * (3 << 20))
    before = model_revision(str(tmp_path), entry)
    assert before is not None
    assert before.startswith("sha256:")
    assert model_revision(str(tmp_path), entry) == before
    weights.write_bytes(b"\0" * ((3 << 20) - 1) + b"\1")
    assert model_revision(str(tmp_path), entry) != before


def test_a_snapshot_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    entry = ModelEntry(name="m", source="org/m", revision="main")
    assert model_revision(str(folder), entry) == "0123456789" * 4
    assert model_revision(str(tmp_path / "nothing"), entry) == "main"
