"""A stand-in for the model hub, on 127.0.0.1: it refuses connections until it is started."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONFIG = b'{"model_type": "stub"}'
COMMIT = hashlib.sha1(CONFIG).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Every model is there, with one file."""

    server: _Server

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.paths.append(path)
        if path.startswith("/api/models/") and "/tree/" in path:
            self._send(_tree(), with_body=with_body)
        elif path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").split("/revision/")[0]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            self._send(info, with_body=with_body)
        else:
            self._send(CONFIG, with_body=with_body, etag=f'"{COMMIT}"', x_repo_commit=COMMIT)

    def _send(self, content: Any, *, with_body: bool, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, paths: list[str]) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.paths = paths
        self.server_activate()


def _tree() -> list[dict[str, Any]]:
    return [{"type": "file", "oid": COMMIT, "size": len(CONFIG), "path": "config.json"}]


class HubStub:
    """`paths`: what was asked for. `environment`: for the process that is to ask this one."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))  # bound and not listening: refuses until `start`
        self.port: int = self._socket.getsockname()[1]
        self.paths: list[str] = []
        self._server: _Server | None = None

    def environment(self, cache: object) -> dict[str, str]:
        """With this folder as the local cache."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
        }

    def start(self) -> None:
        self._server = _Server(self._socket, self.paths)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
        self._socket.close()
