"""`python -m support.s3_server PORT`: moto's S3 server, that can be told to be out of order.

`POST /-/failing/1` has it answer 503 to everything until `POST /-/failing/0`; what it holds stays,
as that of a store that is away for a while. `GET /-/requests` says what was asked, a line each.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

PR_SET_PDEATHSIG = 1
Start = Callable[..., Any]


class Application:
    def __init__(self) -> None:
        self._server = DomainDispatcherApplication(create_backend_app)
        self._is_failing = False
        self._asked: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/-/"):
            if path.startswith("/-/failing/"):
                self._is_failing = path.endswith("1")
            start("200 OK", [("Content-Type", "text/plain")])
            return ["".join(f"{line}\n" for line in self._asked).encode()]
        query = environ.get("QUERY_STRING", "")
        self._asked.append(f"{environ['REQUEST_METHOD']} {path}?{query}")
        if self._is_failing:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Service Unavailable", [("Content-Length", "0")])
            return []
        answer: Iterable[bytes] = self._server(environ, start)
        return answer


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run_simple("127.0.0.1", int(sys.argv[1]), Application(), threaded=True)
