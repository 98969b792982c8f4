"""What an engine process, and vLLM in it, get as their environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from batch_app.engine import vllm_setup
from batch_app.engine.process import engine_environment
from batch_app.engine.vllm_setup import set_environment

SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
TOOLS = str(Path(sys.executable).parent)


def test_programs_beside_the_interpreter_are_found_first() -> None:
    """Such as ninja, which FlashInfer starts by its name."""
    path = engine_environment({"PATH": "/usr/bin:/bin"})["PATH"]
    assert path == f"{TOOLS}:/usr/bin:/bin"
    assert engine_environment({"PATH": path})["PATH"] == path
    assert engine_environment({})["PATH"] == f"{TOOLS}:{os.defpath}"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's, without vLLM's variables; restored afterwards."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def install(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_setup, "installed_version", versions.get)


def test_workers_of_vllm_are_spawned(environment: dict[str, str]) -> None:
    set_environment()
    assert environment[START_METHOD] == "spawn"


def test_what_a_user_set_stays(environment: dict[str, str]) -> None:
    environment |= {SAMPLER: "1", START_METHOD: "fork"}
    set_environment()
    assert (environment[SAMPLER], environment[START_METHOD]) == ("1", "fork")


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({}, "0"),
        ({"flashinfer-python": "0.7.0"}, "0"),
        ({"flashinfer-python": "0.7.0", "flashinfer-jit-cache": "0.7.0+cu130"}, None),
        ({"flashinfer-python": "0.7.0", "flashinfer-jit-cache": "0.6.18+cu130"}, "0"),
    ],
)
def test_flashinfer_samples_only_if_it_need_not_compile(
    versions: dict[str, str],
    expected: str | None,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(versions, monkeypatch)
    set_environment()
    assert environment.get(SAMPLER) == expected
