"""A thread of the API server that works in the background, and survives what can pass."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from batch_app.errors import ObjectsUnavailable, StorageFull, StorageLost, StoreUnavailable

logger = logging.getLogger(__name__)

RETRY_S = 5.0


class BackgroundThread:
    """Calls one piece of work again and again, at once when woken, until it is stopped.

    `work` returns whether there may be more to do right away.
    """

    def __init__(self, name: str, work: Callable[[], bool], every_s: float) -> None:
        self._work = work
        self._every_s = every_s
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Ask it to end, and wait so long at most; what it is at is safe to cut off."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            pause_s = self._every_s
            try:
                while self._work() and not self._stopping:
                    pass
            except (
                StoreUnavailable,
                ObjectsUnavailable,
                StorageFull,
                StorageLost,
                OSError,
            ) as error:
                logger.warning("%s: %s", self._thread.name, error)
                pause_s = max(RETRY_S, self._every_s)
            except Exception:
                # A defect of ours met one batch; the others must not wait for the next start.
                logger.exception("%s failed.", self._thread.name)
                pause_s = max(RETRY_S, self._every_s)
            self._wake.wait(pause_s)
            self._wake.clear()
