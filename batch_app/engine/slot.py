"""The place for one engine: which model is loaded, if any, and how it comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from batch_app.config import Settings
from batch_app.engine.base import EngineInfo, ModelSpec
from batch_app.engine.host import EngineHost
from batch_app.registry import ModelEntry


def model_spec(entry: ModelEntry) -> ModelSpec:
    """What the engine needs to know of a registry entry."""
    return ModelSpec(
        name=entry.name,
        engine=entry.engine,
        source=entry.source,
        revision=entry.revision,
        trust_remote_code=entry.trust_remote_code,
        engine_args=entry.engine_args,
    )


class EngineSlot:
    """Holds at most one engine. One thread."""

    def __init__(self, settings: Settings, log_path: Path, interrupted: Callable[[], bool]) -> None:
        self._settings = settings
        self._log_path = log_path
        self._interrupted = interrupted
        self._entry: ModelEntry | None = None
        self._host: EngineHost | None = None

    @property
    def model(self) -> str | None:
        """The registry's name of the model that is loaded."""
        return self._entry.name if self._entry else None

    def holds(self, entry: ModelEntry) -> bool:
        return self._entry == entry and self._host is not None

    def take(self, entry: ModelEntry) -> tuple[EngineHost, EngineInfo]:
        """The engine for this model: the one that is loaded, or a fresh one in its place.

        Raises EngineLoadError, EngineInterrupted; nothing is loaded then.
        """
        host = self._host
        if self.holds(entry) and host is not None and host.info is not None:
            return host, host.info
        self.unload()
        host = EngineHost(
            model_spec(entry),
            log_path=self._log_path,
            start_timeout_s=self._settings.engine_start_timeout_s,
            hang_s=self._settings.engine_hang_s,
            interrupted=self._interrupted,
        )
        info = host.load()
        self._host, self._entry = host, entry
        return host, info

    def unload(self) -> None:
        """End the engine process, which frees all its memory. Nothing happens if there is none."""
        if self._host is not None:
            self._host.close()
        self._host = self._entry = None
