"""`vllm-batch models add HUB_ID_OR_FOLDER` as a person types it, against a hub on this machine."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.hub import HubStub

DEMO = Path(__file__).parents[2] / "models" / "demo"
FILES = {name: (DEMO / name).read_bytes() for name in ("config.json", "tokenizer_config.json")} | {
    "model.safetensors": b"\0" * (3 << 20),
    "pytorch_model.bin": b"\0" * (5 << 20),
}
COMMENT = "# my models\n"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[HubStub]:
    stub = HubStub(files=FILES)
    stub.start()
    yield stub
    stub.stop()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(f'{COMMENT}[[model]]\nname = "mine"\nsource = "sim"\nengine = "sim"\n')
    return path


@pytest.fixture
def run(hub: HubStub, registry: Path, tmp_path: Path) -> Run:
    """In a process of its own: huggingface_hub reads its environment once."""

    def invoke(
        *words: str, stdin: int = subprocess.DEVNULL, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        known = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        known |= hub.environment(tmp_path / "cache")
        known |= {"VLLM_BATCH_MODELS": str(registry)}
        return subprocess.run(
            [sys.executable, "-m", "batch_app.cli", "models", "add", *words],
            env=known | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=stdin,
        )

    return invoke


def test_a_model_of_the_hub_is_proposed_before_any_weights(
    run: Run, hub: HubStub, registry: Path, tmp_path: Path
) -> None:
    before = registry.read_text()
    done = run("org/new", "--name", "new", "--alias", "n", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["name"], body["source"], body["aliases"]) == ("new", "org/new", ["n"])
    assert body["engine_args"]["max_model_len"] == 4096
    assert body["engine_args"]["tool_call_parser"] == "hermes"
    assert set(body["reasons"]) >= {"max_model_len", "dtype", "tool_call_parser"}
    assert 3 << 20 < body["download_bytes"] < 4 << 20
    assert "3.0 MiB, when a batch first needs the model" in done.stderr
    after = registry.read_text()
    assert after.startswith(before)
    assert 'source = "org/new"' in after.removeprefix(before)
    assert not any("model.safetensors" in path or ".bin" in path for path in hub.paths)
    # A part of the model there would be taken for the whole.
    assert not (tmp_path / "cache" / "models--org--new").exists()


def test_a_folder_needs_no_hub(run: Run, hub: HubStub, registry: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "own")
    done = run(str(tmp_path / "own"), "-y", "-e", "max_model_len=512")
    assert done.returncode == 0, done.stderr
    text = registry.read_text()
    assert text.startswith(COMMENT)
    assert 'name = "own"\nsource = "own"\n' in text
    assert "max_model_len = 512" in text
    assert hub.paths == []


def test_nothing_is_written_without_consent(run: Run, registry: Path) -> None:
    before = registry.read_text()
    done = run("org/new")
    assert done.returncode == 2
    assert "max_model_len" in done.stderr
    assert "--yes" in done.stderr
    assert registry.read_text() == before


@pytest.mark.parametrize("typed", ["n", "y"])
def test_a_person_is_asked(run: Run, registry: Path, typed: str) -> None:
    person, terminal = pty.openpty()
    try:
        os.write(person, f"{typed}\n".encode())
        done = run("org/new", stdin=terminal)
    finally:
        os.close(person)
        os.close(terminal)
    assert "Add this to" in done.stderr
    assert (done.returncode == 0) is (typed == "y"), done.stderr
    assert ("org/new" in registry.read_text()) is (typed == "y")


def test_a_gated_model(run: Run, hub: HubStub, registry: Path) -> None:
    hub.mood = "gated"
    before = registry.read_text()
    done = run("org/gated", "--yes")
    assert done.returncode == 5
    assert f"Accept its licence at {hub.url}/org/gated" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert registry.read_text() == before
    done = run("org/gated", "--yes", HF_TOKEN="hf_x")
    assert done.returncode == 0, done.stderr
    assert "is gated" in done.stderr


def test_refusals(run: Run, hub: HubStub, registry: Path, tmp_path: Path) -> None:
    before = registry.read_text()
    for name in ("empty", "llama-gguf"):
        (tmp_path / name).mkdir()
    file = tmp_path / "llama-gguf" / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    for words, environment, code, expected in (
        (("mine",), {}, 6, "already"),
        (("org/x", "--name", "mine"), {}, 6, "already"),
        (("org/x", "--name", "../x"), {}, 3, "can't be a model's name"),
        (("../nowhere",), {}, 3, "There is no folder"),
        (("not an id",), {}, 3, "can't be a model's name"),
        ((str(tmp_path / "empty"),), {}, 3, "no config.json"),
        ((str(tmp_path / "llama-gguf"),), {}, 3, "original repository"),
        ((str(file),), {}, 3, "original repository"),
        (("org/x",), {"HF_HUB_OFFLINE": "1"}, 7, "HF_HUB_OFFLINE"),
    ):
        done = run(*words, "--yes", **environment)
        assert (words, done.returncode) == (words, code), done.stderr
        assert expected in done.stderr
        assert done.stdout == ""
    assert hub.paths == []
    hub.mood = "refusing"
    assert run("org/x", "--yes").returncode == 7
    hub.mood, hub.files = "well", {"model.gguf": b"GGUF"}
    done = run("org/x", "--yes")
    assert (done.returncode, "original repository" in done.stderr) == (3, True)
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b""}
    done = run("org/x", "--yes")
    assert (done.returncode, "safetensors" in done.stderr) == (3, True)
    hub.stop()
    done = run("org/x", "--yes")
    assert (done.returncode, "can't be asked" in done.stderr) == (7, True)
    assert registry.read_text() == before
