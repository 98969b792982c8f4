"""The registry file while a process runs: read again when it changes, kept while it is broken.

An editor saves a typo, or half a file: what runs goes on with the last version that could be read.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from batch_app.errors import ConfigError
from batch_app.registry import ModelRegistry

logger = logging.getLogger(__name__)

_Signature = tuple[int, int, int, int]


class WatchedRegistry:
    """One registry file. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError: there is no earlier version yet."""
        self._path = path
        self._lock = threading.Lock()
        self._seen = _signature(path)
        self._last = ModelRegistry.load(path)
        self._problem: str | None = None

    @property
    def current(self) -> ModelRegistry:
        """The last version that could be read. Looks whether the file has changed."""
        with self._lock:
            self._look()
            return self._last

    @property
    def problem(self) -> str | None:
        """What is wrong with the file as it is now, and that the last good version is in use."""
        with self._lock:
            self._look()
            if self._problem is None:
                return None
            return f"{self._problem} The last version that could be read stays in use."

    def entry_fingerprint(self, model: str) -> str:
        """Of the entry of this name or alias; empty where there is none."""
        registry = self.current
        return registry.get(model).fingerprint if registry.knows(model) else ""

    def _look(self) -> None:
        seen = _signature(self._path)
        if seen == self._seen:
            return
        try:
            self._last = ModelRegistry.load(self._path)
        except ConfigError as error:
            if self._problem is None or self._seen != seen:
                logger.warning(
                    "%s The last version that could be read stays in use.", _sentence(error.message)
                )
            self._problem = _sentence(error.message)
        else:
            logger.info("Read the model registry %s again.", self._path)
            self._problem = None
        self._seen = seen


def _signature(path: Path) -> _Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
