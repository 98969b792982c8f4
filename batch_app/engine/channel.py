"""The line between a worker and its engine process: typed messages over a socket pair.

Each message is a MessagePack array with a tag, after four bytes of length. Nothing that arrives is
ever executed, so that an engine taken over by a hostile prompt can't take over the worker too.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TypeAlias

import msgspec

from batch_app.core import LoadRetry
from batch_app.engine.base import EngineInfo, EngineRequest, EngineStats, ModelSpec, Outcome

_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 20


class Load(msgspec.Struct, frozen=True, tag=True):
    """`api_key`: for the server that has the model. It travels here and nowhere else.

    `ahead`: as of `Engine.load`.
    """

    spec: ModelSpec
    api_key: str = ""
    ahead: list[EngineRequest] = []


class Submit(msgspec.Struct, frozen=True, tag=True):
    requests: list[EngineRequest]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    numbers: list[int]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """`not_isolated`: why the process has no network of its own, although it should."""

    info: EngineInfo
    not_isolated: str = ""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    message: str
    retriable: bool
    retry: LoadRetry | None = None


class Unavailable(msgspec.Struct, frozen=True, tag=True):
    """The server that has the model doesn't work at the moment; the process ends after this."""

    message: str
    retry_after_s: float = 0.0


class Finished(msgspec.Struct, frozen=True, tag=True):
    outcomes: list[Outcome]


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Cancel`: whatever comes after this is of what was submitted later."""


class Reading(msgspec.Struct, frozen=True, tag=True):
    stats: EngineStats


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine can't go on; the process ends after this.

    `exit_code`: of the process in which it ran, where that was another, negative for a signal.
    """

    message: str
    exit_code: int | None = None


ToEngine: TypeAlias = Load | Submit | Cancel
FromEngine: TypeAlias = Loaded | LoadFailed | Unavailable | Finished | Cancelled | Reading | Fatal

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


class Channel:
    """One end. Sending and receiving may happen in two different threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = bytearray()

    def send(self, message: ToEngine | FromEngine) -> None:
        """Blocks until the bytes are handed over. Raises OSError when the other end is gone."""
        data = _encoder.encode(message)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> bytes | None:
        """The next message's bytes, for one of the decoders; None when the other end is gone."""
        while True:
            if len(self._received) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._received)
                end = _LENGTH.size + length
                if len(self._received) >= end:
                    message = bytes(memoryview(self._received)[_LENGTH.size : end])
                    del self._received[:end]
                    return message
            try:
                chunk = self._socket.recv(_RECEIVE_BYTES)
            except OSError:
                return None
            if not chunk:
                return None
            self._received += chunk

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
