"""An application on a port of 127.0.0.1, in a thread of its own, that can go away and come back."""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn
from starlette.applications import Starlette

from support.waiting import wait_for


class HttpServer:
    """What derives from it says what is served (`app`). The port stays the same for ever."""

    _port: int | None = None
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None
    _socket: socket.socket | None = None

    def app(self) -> Starlette:
        raise NotImplementedError

    @property
    def port(self) -> int:
        """Nobody listens there before `start`, nor after `stop`."""
        if self._port is None:
            self._bind()
        assert self._port is not None
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _bind(self) -> socket.socket:
        """Bound and not listening: it refuses."""
        if self._socket is None:
            self._socket = socket.socket()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", self._port or 0))
            self._port = self._socket.getsockname()[1]
        return self._socket

    def start(self) -> None:
        config = uvicorn.Config(
            self.app(), log_config=None, log_level="critical", ws="none", lifespan="off"
        )
        server = self._server = uvicorn.Server(config)
        run = server.serve(sockets=[self._bind()])
        self._thread = threading.Thread(target=lambda: asyncio.run(run), daemon=True)
        self._thread.start()
        wait_for(lambda: server.started, timeout_s=60, what="the server listens")

    def stop(self) -> None:
        """Close every connection; `start` may follow."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(timeout=30)
        self._server = self._thread = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
