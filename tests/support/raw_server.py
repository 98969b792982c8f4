"""A model server that writes its answers byte by byte as a test says: also what is no proper HTTP.

Each request is for a chat, and each proper answer says its last message back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.waiting import PATIENCE_S

MODELS = json.dumps({"data": [{"id": "served-name"}]}).encode()


def http_answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; `content_length` and others may be set by hand."""
    fields = {"content-type": "application/json", "content-length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@dataclass
class RawRequest:
    """`number`: of the connection's requests, from 1."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    def said(self, text: str | None = None, **fields: Any) -> bytes:
        """The body of a good answer."""
        message = {"role": "assistant", "content": self.prompt if text is None else text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "model": "served-name"}
        return json.dumps({**answer, "choices": choices, **fields}).encode()

    async def write(self, data: bytes) -> None:
        """Raises OSError once the other side is gone."""
        if self.writer.is_closing():
            raise ConnectionResetError
        self.writer.write(data)
        await self.writer.drain()
        await asyncio.sleep(0)


#: Writes what this request gets.
Answer = Callable[[RawRequest], Awaitable[None]]


@dataclass
class RawServer:
    """`greeting`: what a connection gets before it has asked for anything."""

    answer: Answer
    tls: ssl.SSLContext | None = None
    greeting: bytes = b""
    num_connections: int = 0
    num_requests: int = 0
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def base_url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        writer.write(self.greeting)
        try:
            number = 0
            async for path, headers, body in _requests(reader):
                if path.endswith("/models"):
                    writer.write(http_answer(MODELS, connection="close"))
                    break
                if body is None:
                    writer.write(http_answer(b"", "404 Not Found", connection="close"))
                    break
                number += 1
                self.num_requests += 1
                await self.answer(RawRequest(number, path, headers, body, writer))
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _requests(
    reader: asyncio.StreamReader,
) -> AsyncIterator[tuple[str, dict[str, str], dict[str, Any] | None]]:
    while head := await reader.readuntil(b"\r\n\r\n"):
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        yield first.split()[1], headers, json.loads(content) if content else None


@contextmanager
def raw_serving(
    answer: Answer, tls: ssl.SSLContext | None = None, greeting: bytes = b""
) -> Iterator[RawServer]:
    """On a free port of 127.0.0.1, in a thread of its own, until the end of the block."""
    server = RawServer(answer, tls, greeting)
    loop = asyncio.new_event_loop()
    listening, stopped = threading.Event(), asyncio.Event()

    async def serve() -> None:
        listener = await asyncio.start_server(server.connected, "127.0.0.1", 0, ssl=tls)
        server.port = listener.sockets[0].getsockname()[1]
        listening.set()
        await stopped.wait()
        listener.close()
        await server.end()

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert listening.wait(PATIENCE_S)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(PATIENCE_S)
