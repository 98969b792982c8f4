"""A replica: one engine with the whole model, on some node of a Ray cluster.

It is an actor whose process holds nothing but an `EngineHost`: the engine itself is a child of it,
as it is of a worker that needs no cluster, with a network of its own and without credentials. When
the actor ends, however that comes about, its engine does.

The driver (`engine.ray`) calls one method at a time. What crosses is MessagePack, typed on arrival.
Ray is not imported here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import TypeAlias

import msgspec

from batch_app import __version__
from batch_app.engine.base import EngineRequest, EngineStats, ModelSpec, Outcome
from batch_app.engine.channel import Loaded, LoadFailed
from batch_app.engine.host import EngineHost
from batch_app.engine.memory import says_out_of_memory
from batch_app.errors import (
    BatchAppError,
    EngineError,
    EngineLoadError,
    EngineOutOfMemory,
)

#: After the first answer, others are waited for: a call has its price, and the replica has enough
#: to go on with (`dispatch.window_of`).
LINGER_S = 0.05
_READING_S = 1.0


class Placed(msgspec.Struct, frozen=True, tag=True):
    """The actor runs. `version`: of this package, on that node."""

    version: str
    node: str


class Orders(msgspec.Struct, frozen=True, array_like=True):
    """What the driver sends with a call; first the cancelling."""

    cancel: list[int]
    submit: list[EngineRequest]


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a call brings back. `died`: why the engine ended; then the replica is of no more use.

    What was in flight then has no outcome but those that are here.
    """

    outcomes: list[Outcome]
    stats: EngineStats
    died: str = ""
    out_of_memory: bool = False


FromReplica: TypeAlias = Placed | Loaded | LoadFailed

_encode = msgspec.msgpack.Encoder().encode
encode_orders = _encode
decode_start = msgspec.msgpack.Decoder(FromReplica).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
_decode_spec = msgspec.msgpack.Decoder(ModelSpec).decode
_decode_orders = msgspec.msgpack.Decoder(Orders).decode


def encode_spec(spec: ModelSpec) -> bytes:
    return _encode(spec)


class Replica:
    """The actor. Not thread-safe; the engine ends with the thread that calls `load`."""

    def __init__(self, spec: bytes, start_timeout_s: float, hang_s: float, linger_s: float) -> None:
        self._linger_s = linger_s
        self._host = EngineHost(
            _decode_spec(spec),
            log_path=_log_path(),
            start_timeout_s=start_timeout_s,
            hang_s=hang_s,
        )

    def place(self) -> bytes:
        """A `Placed`. Answers as soon as the actor's process is there."""
        return _encode(Placed(__version__, socket.gethostname()))

    def load(self) -> bytes:
        """A `Loaded` or a `LoadFailed`. Blocks, possibly for minutes."""
        try:
            return _encode(Loaded(self._host.load()))
        except EngineLoadError as error:
            return _encode(LoadFailed(error.message, error.retriable, error.retry))
        except BatchAppError as error:
            return _encode(LoadFailed(error.message, retriable=True))

    def exchange(self, orders: bytes, wait_s: float) -> bytes:
        """Take these orders, and work for `wait_s`, or a moment longer than the first answer.

        Returns a `Report`.
        """
        decoded = _decode_orders(orders)
        outcomes: list[Outcome] = []
        try:
            if decoded.cancel:
                self._host.cancel(decoded.cancel)
            if decoded.submit:
                self._host.submit(decoded.submit)
            outcomes += self._host.collect(wait_s)
            until = time.monotonic() + self._linger_s
            while not self._host.is_idle and (left_s := until - time.monotonic()) > 0:
                outcomes += self._host.collect(left_s)
            if outcomes and self._host.is_idle:
                self._await_reading()
        except EngineError as error:
            self._host.close()
            return _encode(
                Report(
                    outcomes,
                    self._host.stats(),
                    died=error.message,
                    out_of_memory=isinstance(error, EngineOutOfMemory)
                    or says_out_of_memory(error.message),
                )
            )
        return _encode(Report(outcomes, self._host.stats()))

    def _await_reading(self) -> None:
        """The one that follows the last answer: nobody may call for long."""
        before, until = self._host.stats(), time.monotonic() + _READING_S
        while self._host.stats() is before and time.monotonic() < until:
            self._host.collect(0.0)
            time.sleep(0.001)

    def end(self) -> None:
        """Free the device; the actor may be killed after this."""
        self._host.close()


def _log_path() -> Path:
    """Of the engine: beside the actor's own output, among the logs of Ray's session."""
    name = f"vllm-batch-replica-{os.getpid()}.log"
    with contextlib.suppress(OSError):
        own = Path("/proc/self/fd/2").readlink()
        if own.is_absolute() and stat.S_ISREG(own.stat().st_mode):
            return own.parent / name
    return Path(tempfile.gettempdir()) / name
