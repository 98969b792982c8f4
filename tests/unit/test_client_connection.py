"""The client's connection to a server: each call gets its own answer."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator

import pytest

from batch_app.client.connection import Connection


class _Twice(socketserver.StreamRequestHandler):
    """Answers each request twice, as some proxy might."""

    def handle(self) -> None:
        while first := self.rfile.readline():
            while self.rfile.readline().strip():
                pass
            body = json.dumps({"path": first.split()[1].decode()}).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
            try:
                self.wfile.write((head + body) * 2)
            except OSError:
                return


@pytest.fixture
def url() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Twice) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_second_answer_to_a_call_is_not_the_next_ones(url: str) -> None:
    connection = Connection(url, None, timeout_s=60.0)
    paths = [f"/{number}" for number in range(5)]
    assert [connection.json("GET", path)["path"] for path in paths] == paths
    connection.close()
