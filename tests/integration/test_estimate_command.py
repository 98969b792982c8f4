"""`vllm-batch estimate` and `bench`, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batch_app.benchmarks import BenchmarkFolder
from integration.api_fixtures import request_line

REGISTRY = """
[[model]]
name = "sim"
source = "sim"
engine = "sim"
[model.engine_args]
decode_step_s = 0.0005
max_num_seqs = 32
max_model_len = 2000

[[model]]
name = "unloadable"
source = "sim"
engine = "sim"
[model.engine_args]
fail_load = "No such weights."
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.toml").write_text(REGISTRY)
    (tmp_path / "input.jsonl").write_bytes(b"".join(request_line(f"r{n}") for n in range(30)))
    return tmp_path


def vllm_batch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batch_app.cli", *arguments]
    places = ["--models", "models.toml", "--benchmarks-dir", "records"]
    return subprocess.run(
        [*command, *places], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_estimate_before_and_after_a_bench(folder: Path) -> None:
    before = vllm_batch(folder, "estimate", "input.jsonl")
    assert before.returncode == 0, before.stderr
    assert "nothing measured yet" in before.stdout
    assert "unloadable" in before.stdout

    bench = vllm_batch(folder, "bench", "sim", "--num-requests", "40", "--json")
    assert bench.returncode == 0, bench.stderr
    records = json.loads(bench.stdout)
    assert [record["purpose"] for record in records] == ["bench"] * 3
    lengths = [record["results"]["mean_completion_tokens"] for record in records]
    assert lengths == sorted(lengths)
    assert len(BenchmarkFolder(folder / "records").all("sim")) == 3

    after = vllm_batch(folder, "estimate", "input.jsonl", "--model", "sim")
    assert after.returncode == 0
    assert any(record["test_id"] in after.stdout for record in records)
    told = json.loads(vllm_batch(folder, "estimate", "input.jsonl", "--json").stdout)
    assert told["models"][0]["estimate"]["prompt_tokens"] == 30 * 5
    assert told["models"][0]["estimate"]["prompt_basis"] == "counted"


def test_a_bad_file_is_told_line_by_line(folder: Path) -> None:
    with (folder / "input.jsonl").open("ab") as file:
        file.write(b"{}\n")
        file.write(request_line("long", body={"prompt": "w " * 3000}, url="/v1/completions"))
    done = vllm_batch(folder, "estimate", "input.jsonl", "--model", "sim")
    assert done.returncode == 3
    assert "line 31: " in done.stderr
    assert "would fail: lines 32" in done.stderr


def test_what_cannot_be_found_is_said(folder: Path) -> None:
    done = vllm_batch(folder, "estimate", "nothing.jsonl")
    assert "nothing.jsonl can't be read: No such file" in done.stderr
    assert vllm_batch(folder, "estimate", "input.jsonl", "--model", "nobody").returncode == 4
    done = vllm_batch(folder, "bench", "unloadable")
    assert done.returncode == 1
    assert "No such weights." in done.stderr
