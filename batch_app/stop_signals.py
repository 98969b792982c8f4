"""SIGINT and SIGTERM: the first asks a process to stop, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, call `on_first` at the first signal and exit with `exit_code` at the second.

    `on_first` runs in a thread of its own. A handler runs in the main thread, in the middle of
    whatever that is doing: it would wait forever for a lock that the main thread holds, such as
    the one within `threading.Event.set` and `wait`, and printing there can fail. Enter it in the
    main thread. Leaving it puts the earlier handlers back.
    """

    def __init__(self, on_first: Callable[[], None], *, exit_code: int) -> None:
        self._on_first = on_first
        self._exit_code = exit_code
        self._num_received = 0
        self._is_stopping: SimpleQueue[bool] = SimpleQueue()  # the only queue safe in a handler
        self._before: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._wait, name="stop-signals", daemon=True)

    def __enter__(self) -> StopSignals:
        self._thread.start()
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._is_stopping.put(False)
        self._thread.join()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._num_received += 1
        if self._num_received > 1:
            os._exit(self._exit_code)
        self._is_stopping.put(True)

    def _wait(self) -> None:
        if self._is_stopping.get():
            self._on_first()
