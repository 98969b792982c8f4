"""Models that have a real one's shape and no weights, and requests of a set length for them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch_app.core import Endpoint
from batch_app.engine.base import EngineRequest, ModelSpec
from benchmarks.peer import models

#: The special tokens come first.
_FIRST_TOKEN = 3


def shape_spec(kind: str, folder: Path, *, on_gpu: bool, **engine_args: Any) -> ModelSpec:
    """A model of this shape, made in `folder`, for `load_format = "dummy"`."""
    arguments: dict[str, Any] = {"max_model_len": 4096, "load_format": "dummy", **engine_args}
    if not on_gpu:
        arguments["enforce_eager"] = True  # to compile would take longer than to run
    source = models.ready(kind, folder)
    return ModelSpec(name=kind, engine="vllm", source=str(source), engine_args=arguments)


def token_prompts(kind: str, num: int, length: int, seed: int = 1) -> list[list[int]]:
    """Prompts as random token ids, which have nothing in common."""
    rng = random.Random(seed)
    vocabulary = range(_FIRST_TOKEN, models.SHAPES[kind]["vocab_size"])
    return [rng.choices(vocabulary, k=length) for _ in range(num)]


def completions(prompts: list[list[int]], num_tokens: int) -> Iterator[EngineRequest]:
    """A request for each prompt, answered greedily with exactly so many tokens."""
    for number, prompt in enumerate(prompts):
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        yield EngineRequest(number, Endpoint.COMPLETIONS, json.dumps(body).encode())
