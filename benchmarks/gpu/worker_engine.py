"""Engines as the worker takes them: one at a time, with its retries and its remembered limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batch_app.config import Settings
from batch_app.core import Endpoint
from batch_app.engine.base import EngineInfo, EngineRequest
from batch_app.engine.host import EngineHost
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.slot import EngineSlot
from batch_app.registry import ModelEntry
from batch_app.self_check.loaded_engine import LoadedEngine
from batch_app.self_check.step import StepFailed

_PROMPT = "What is 27 + 58?"
_ANSWER_S = 60.0


@contextmanager
def engine_slot(folder: Path, timeout_s: float) -> Iterator[tuple[EngineSlot, Path]]:
    """A slot without an engine, and the file in which it remembers lowered limits."""
    remembered = folder / "lowered-limits.json"
    settings = Settings(engine_start_timeout_s=timeout_s)
    slot = EngineSlot(settings, folder / "engine.log", lambda: False, LoweredLimits(remembered))
    try:
        yield slot, remembered
    finally:
        slot.close()


def entry(spec: dict[str, Any] | None, *, name: str | None = None, **more: Any) -> ModelEntry:
    """The registry entry that `spec` describes, a `ModelSpec` as a dict."""
    if not spec:
        raise StepFailed("there is no demo model here: run this from the repository")
    return ModelEntry(
        name=name or spec["name"],
        source=spec["source"],
        engine_args={**spec["engine_args"], **more},
    )


def ask_one(host: EngineHost, info: EngineInfo) -> int:
    """Have one request answered. Returns its tokens; raises StepFailed if it fails."""
    body = {"messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 8}
    request = EngineRequest(0, Endpoint.CHAT_COMPLETIONS, json.dumps(body).encode())
    outcome = LoadedEngine(host, info).answer([request], timeout_s=_ANSWER_S)[0]
    if outcome.status_code != 200:
        raise StepFailed(f"{info.model} answered with status {outcome.status_code}")
    return outcome.completion_tokens
