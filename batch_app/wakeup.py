"""How a worker learns at once that the queue has changed: a file in the data folder is touched.

Only a hint. Where worker and API server don't share a folder, the poll interval does.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

LOOK_EVERY_S = 0.1


class WakeupFile:
    """Watches one file's time of change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._read()

    def wait(self, timeout_s: float, stop: threading.Event) -> bool:
        """Wait for a touch, `stop`, or the timeout. True if the file was touched.

        A touch since the last call counts too.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            now = self._read()
            if now != self._seen:
                self._seen = now
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or stop.wait(min(LOOK_EVERY_S, remaining)):
                return False

    def _read(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0
