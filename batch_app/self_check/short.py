"""The short steps: what `vllm-batch doctor --run` runs, and `python -m benchmarks.gpu` first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from batch_app.config import Settings
from batch_app.engine.base import ModelSpec
from batch_app.engine.slot import model_spec
from batch_app.errors import ConfigError, ModelNotFound
from batch_app.registry import ModelRegistry
from batch_app.self_check.step import Step

#: The model that comes with the project; its answers are known.
DEMO = "demo"
_NUM_REQUESTS = 200
#: Seconds for all of them. About a minute is what they take; a slow machine gets more.
BUDGET_S = 600.0


def short_steps(*, num_requests: int = _NUM_REQUESTS, doctor: bool = False) -> tuple[Step, ...]:
    """`doctor`: with its findings on the engine among the facts of the device."""
    package = __package__
    return (
        Step(
            "device",
            "What NVML, the driver, torch and vLLM say of this machine",
            f"{package}.facts:device_facts",
            budget_s=90,
            options={"doctor": doctor},
        ),
        Step(
            "before-fork",
            "Importing the engine's libraries doesn't initialize CUDA",
            f"{package}.forking:before_the_fork",
            budget_s=60,
        ),
        Step(
            "compute",
            "A process started as the engine's core computes on the device, without a network",
            f"{package}.forking:compute_in_isolation",
            budget_s=90,
        ),
        Step(
            "answers",
            "A model answers right: seeds, stop strings, n = 2, JSON schema, aborts, token counts, "
            "and as LLM.chat does",
            f"{package}.correctness:check_answers",
            budget_s=240,
            least_s=30,
            options={"num_requests": num_requests},
        ),
    )


def options_for(spec: ModelSpec | None, *, on_gpu: bool) -> dict[str, Any]:
    """The options that all steps share. `spec`: the model to load, if there is one."""
    return {
        "on_gpu": on_gpu,
        "spec": None if spec is None else msgspec.to_builtins(spec),
        "is_demo": spec is not None and spec.name == DEMO,
    }


def registered(name: str | None, settings: Settings) -> ModelSpec | None:
    """The registry's model of this name, else its `demo`; None where it has neither.

    Raises ModelNotFound if `name` is given and unknown.
    """
    try:
        return model_spec(ModelRegistry.load(settings.models).get(name or DEMO))
    except ModelNotFound:
        if name is not None:
            raise
    except ConfigError:
        pass  # `doctor` says what is wrong with the registry
    return None


@contextmanager
def step_folder() -> Iterator[Path]:
    """A folder for the files of steps, gone with the block."""
    with TemporaryDirectory(prefix="vllm-batch-self-check-") as name:
        yield Path(name)
