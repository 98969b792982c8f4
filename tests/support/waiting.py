"""Waiting with a deadline, the only way a test waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
What = str | Callable[[], str]

#: How long a test waits for what is going to happen: far longer than a busy machine needs, for it
#: only ends the wait for what never happens.
PATIENCE_S = 120.0


def wait_for(
    look: Callable[[], T], *, timeout_s: float = PATIENCE_S, every_s: float = 0.02, what: What = ""
) -> T:
    """Look until the answer is true, and return it; fail the test when time runs out.

    `what`: in words. What shall show how things stood at the end, a log for example, is a function.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > deadline:
            told = what() if callable(what) else what
            raise AssertionError(f"not within {timeout_s} s: {told or look}; last: {answer!r}")
        time.sleep(every_s)
