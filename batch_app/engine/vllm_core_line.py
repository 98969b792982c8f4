"""The core's end of the socket between it and the process that prepares requests (`vllm_client`).

A frame that carries tensors (an image of 19 MB) is received by a thread, so that the stepping
thread goes on stepping; frames of text requests are received where they are needed: handing them
over would cost more than receiving them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

import numpy

from batch_app.engine.vllm_messages import (
    HEADER,
    RECEIVE_BYTES,
    Configure,
    ToCore,
    decoded,
    unframed,
)

#: What one call to the kernel gives at most; a smaller frame is here before a thread has started.
LARGE_FRAME_BYTES = 256 << 10


class CoreLine:
    """Sending never waits for the other side to read, except in `flush`. One thread only."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._received = bytearray()
        self._unsent = bytearray()
        self._large: _LargeFrame | None = None

    def put(self, data: bytes) -> None:
        self._unsent += data
        self._send()

    def flush(self) -> None:
        """Wait until all is sent, or nobody is there to read it."""
        with contextlib.suppress(OSError):
            while self._unsent:
                select.select((), (self._socket,), ())
                self._send()

    def receive_first(self) -> Configure | None:
        """Wait for what to load. None when the line has ended before."""
        for message in self.exchange(None) or ():
            if isinstance(message, Configure):
                return message
        return None

    def exchange(self, timeout_s: float | None) -> list[ToCore] | None:
        """What has come, without waiting for more; None when the line has ended.

        Where nothing has, it waits for a message: `timeout_s` at most, or for ever if that is None.
        Sends meanwhile what couldn't be sent before.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        messages: list[ToCore] = []
        while True:
            reading = self._socket if self._large is None else self._large.done
            writing = (self._socket,) if self._unsent else ()
            if messages or timeout_s == 0:
                remaining_s: float | None = 0.0
            else:
                remaining_s = deadline and max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select((reading,), writing, (), remaining_s)
            if writable:
                self._send()
            if readable:
                received = self._receive() if self._large is None else self._receive_large()
                if received is None:
                    return None
                messages += received
            elif messages or remaining_s == 0:
                return messages

    def _receive(self) -> list[ToCore] | None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._received += data
        messages: list[ToCore] = []
        for batch in unframed(self._received):
            messages += batch
        if len(self._received) >= HEADER.size:
            length, num_buffers = HEADER.unpack_from(self._received)
            if num_buffers and length >= LARGE_FRAME_BYTES:
                begun = self._received[HEADER.size :]
                self._received.clear()
                self._large = _LargeFrame(self._socket, length, num_buffers, begun)
        return messages

    def _receive_large(self) -> list[ToCore] | None:
        large, self._large = self._large, None
        assert large is not None
        return large.take()

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]


class _LargeFrame:
    """A frame on its way. A thread of its own receives it, the only one to do so meanwhile.

    `done` becomes readable when it is here, or when the line has ended.
    """

    def __init__(
        self, sock: socket.socket, length: int, num_buffers: int, begun: bytearray
    ) -> None:
        self._socket = sock
        self._length = length
        self._num_buffers = num_buffers
        self._messages: list[ToCore] | None = None
        self._error: Exception | None = None
        self.done, self._wakeup = os.pipe()
        self._thread = threading.Thread(
            target=self._receive, args=(begun,), name="receive-large-frame", daemon=True
        )
        self._thread.start()

    def take(self) -> list[ToCore] | None:
        """What was in it, None when the line has ended. Raises what unpickling it raised."""
        self._thread.join()
        os.close(self.done)
        if self._error is not None:
            raise self._error
        return self._messages

    def _receive(self, begun: bytearray) -> None:
        try:
            # Not a bytearray: nothing else could run while that is filled with zeros.
            payload = numpy.empty(self._length, numpy.uint8).data
            payload[: len(begun)] = begun
            position = len(begun)
            while position < self._length:
                select.select((self._socket,), (), ())
                with contextlib.suppress(BlockingIOError):
                    num_bytes = self._socket.recv_into(payload[position:])
                    if not num_bytes:
                        return
                    position += num_bytes
            self._messages = decoded(payload, self._num_buffers)
        except OSError:
            return
        except Exception as error:  # noqa: BLE001 - it is the stepping thread's
            self._error = error
        finally:
            os.close(self._wakeup)
