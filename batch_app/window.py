"""The window: the requests of a batch that are in flight on the engine.

Bounded at a few times what the engine runs at once, and refilled whenever a request finishes, so
that the engine never waits and memory never grows with the batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import orjson

from batch_app.engine.base import Engine, EngineRequest
from batch_app.errors import EngineError
from batch_app.finalize import read_request_line
from batch_app.index import Index
from batch_app.keeper import Delivery
from batch_app.planner import Numbers

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

    `deliver` gets what has finished (possibly nothing) and how many are still in flight.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        size: int,
        index: Index,
        inputs: BinaryIO,
        deliver: Callable[[list[Delivery], int], None],
        check: Check,
        drain_s: float,
    ) -> None:
        self._engine = engine
        self._size = size
        self._index = index
        self._inputs = inputs
        self._deliver = deliver
        self._check = check
        self._drain_s = drain_s
        self._custom_ids: dict[int, str] = {}  # of the requests in flight, by number

    @property
    def in_flight(self) -> list[int]:
        """The numbers of the requests that the engine has; after `run`: had when it ended."""
        return list(self._custom_ids)

    def run(self, numbers: Numbers) -> None:
        """Run these requests, in this order.

        Raises:
            EngineDied, EngineHung: those in flight have no result; everything else is delivered.
            Stopped: after those in flight had `drain_s` to finish.
            Cancelled, or what else `check` raises: at once.
        """
        upcoming = iter(numbers.tolist())
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

    def _fill(self, upcoming: Iterator[int]) -> None:
        requests: list[EngineRequest] = []
        index = self._index
        while len(self._custom_ids) < self._size:
            number = next(upcoming, None)
            if number is None:
                break
            line = orjson.loads(read_request_line(self._inputs, index, number))
            self._custom_ids[number] = line["custom_id"]
            endpoint = index.endpoints[int(index.records[number]["endpoint"])]
            requests.append(EngineRequest(number, endpoint, orjson.dumps(line["body"])))
        if requests:
            self._engine.submit(requests)

    def _collect(self) -> None:
        outcomes = self._engine.collect(COLLECT_S)
        self._deliver(
            [Delivery(self._custom_ids.pop(outcome.number), outcome) for outcome in outcomes],
            len(self._custom_ids),
        )
