"""The real engine, loaded once for all the tests that use it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_app.engine.base import ModelSpec
from batch_app.engine.vllm import VllmEngine

DEMO_MODEL = Path(__file__).parents[2] / "models" / "demo"


def demo_spec(**engine_args: Any) -> ModelSpec:
    """The demo model, without the compilation that takes longer than these tests."""
    return ModelSpec(
        name="demo",
        engine="vllm",
        source=str(DEMO_MODEL),
        engine_args={"max_model_len": 2048, "enforce_eager": True, **engine_args},
    )


@pytest.fixture(scope="session")
def vllm_engine() -> Iterator[VllmEngine]:
    """Shared: whoever uses it leaves it idle. Its tests are marked `engine`."""
    pytest.importorskip("vllm")
    engine = VllmEngine(demo_spec(enable_auto_tool_choice=True, tool_call_parser="hermes"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's own imports
        engine.load()
    yield engine
    engine.close()
    engine.close()
