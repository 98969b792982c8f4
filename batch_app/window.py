"""The window: the requests of a batch that are in flight on the engine.

Bounded at a few times what the engine runs at once, and refilled whenever a request finishes, so
that the engine never waits and memory never grows with the batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Protocol

from batch_app.ahead import engine_request
from batch_app.copies import Copies
from batch_app.engine.base import Engine, EngineRequest
from batch_app.errors import EngineError
from batch_app.index import Index
from batch_app.inputs import InputFile
from batch_app.keeper import Delivery
from batch_app.planner import Duplicates, Numbers, shared_marks

COLLECT_S = 0.1


class Stopped(Exception):
    """The worker wants to stop: the batch is to be given back."""


class Cancelled(Exception):
    """Somebody cancelled the batch."""


class Expired(Exception):
    """The batch's completion window is over."""


class Check(Protocol):
    """Raises whatever should end the run; `draining` says that `Stopped` is known already."""

    def __call__(self, *, draining: bool) -> None: ...


class Window:
    """Runs requests on a loaded engine, `size` of them in flight at most.

    `deliver` gets what has finished (possibly nothing) and how many are still in flight. What
    finishes is the answer of those that wait for it, too.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        size: int,
        index: Index,
        inputs: InputFile,
        deliver: Callable[[list[Delivery], int], None],
        check: Check,
        drain_s: float,
    ) -> None:
        self._engine = engine
        self._size = size
        self._index = index
        self._inputs = inputs
        self._waiting = Duplicates()
        self._copies = Copies(index, inputs)
        self._deliver = deliver
        self._check = check
        self._drain_s = drain_s
        self._custom_ids: dict[int, str] = {}  # of the requests in flight, by number

    @property
    def in_flight(self) -> list[int]:
        """The numbers of the requests that the engine has; after `run`: had when it ended."""
        return list(self._custom_ids)

    def run(self, numbers: Numbers, waiting: Duplicates, *, with_shared: bool = False) -> None:
        """Run these requests, in this order, and answer those that wait for them.

        `with_shared`: tell the engine how far each prompt begins like the one before it.

        Raises:
            EngineDied, EngineHung: those in flight have no result; everything else is delivered.
            Stopped: after those in flight had `drain_s` to finish.
            Cancelled, or what else `check` raises: at once.
        """
        self._waiting = waiting
        shared = shared_marks(self._index, numbers).tolist() if with_shared else repeat(0)
        upcoming = zip(numbers.tolist(), shared, strict=False)
        try:
            self._fill(upcoming)
            while self._custom_ids:
                self._check(draining=False)
                self._collect()
                self._fill(upcoming)
        except Stopped:
            deadline = time.monotonic() + self._drain_s
            while self._custom_ids and time.monotonic() < deadline:
                self._check(draining=True)
                self._collect()
            raise
        finally:
            # The engine may stay loaded for the next batch, which must not meet this one's rest.
            if self._custom_ids:
                with contextlib.suppress(EngineError):
                    self._engine.cancel(list(self._custom_ids))

    def _fill(self, upcoming: Iterator[tuple[int, int]]) -> None:
        requests: list[EngineRequest] = []
        while len(self._custom_ids) < self._size:
            if self._copies.refused:
                number, shared = self._copies.refused.pop(), 0
            elif (following := next(upcoming, None)) is not None:
                number, shared = following
            else:
                break
            self._custom_ids[number], request = engine_request(
                self._index, self._inputs, number, shared
            )
            requests.append(request)
        if requests:
            self._engine.submit(requests)

    def _collect(self) -> None:
        outcomes = self._engine.collect(COLLECT_S)
        self._deliver(
            [Delivery(self._custom_ids.pop(outcome.number), outcome) for outcome in outcomes],
            len(self._custom_ids),
        )
        if len(self._waiting):
            for outcome in outcomes:
                followers = self._waiting.of(outcome.number).tolist()
                for deliveries in self._copies.of(outcome, followers):
                    self._deliver(deliveries, len(self._custom_ids))
