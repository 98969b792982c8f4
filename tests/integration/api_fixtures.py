"""A real API server on a port of its own, with a real SQLite file, for the tests of the API."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

from batch_app.api_server import create_app
from batch_app.config import Settings
from batch_app.core import Batch
from batch_app.files import DataDir
from batch_app.routes.services import Services
from batch_app.routes.slow_clients import bounded_headers
from batch_app.store import Store
from support.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
GUIDE_MODEL = "google/gemma-3-4b-it"
SEED_BENCHMARK = "vllm-native-gemma3-4b-5000-2025-10-28"

REGISTRY = """
[[model]]
name = "google/gemma-3-4b-it"
source = "google/gemma-3-4b-it"
aliases = ["gemma"]
[model.engine_args]
max_model_len = 4096
gpu_memory_utilization = 0.9

[[model]]
name = "sim"
source = "sim"
engine = "sim"
"""


def request_line(custom_id: str = "req-1", **changes: Any) -> bytes:
    """One good line of an input file, with a line feed; `changes` replace its fields."""
    line: dict[str, Any] = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "max_tokens": 16},
    }
    line |= changes
    kept = {name: value for name, value in line.items() if value is not ...}
    return json.dumps(kept).encode() + b"\n"


def input_file(num_requests: int) -> bytes:
    return b"".join(request_line(f"req-{number}") for number in range(num_requests))


@dataclass(frozen=True)
class Api:
    """A running server, as its clients see it, and what it works with."""

    url: str
    services: Services

    @property
    def store(self) -> Store:
        return self.services.store

    @property
    def data(self) -> DataDir:
        return self.services.data

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(method, f"{self.url}{path}", timeout=120, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.call("GET", path, **options)

    def submit(
        self,
        content: bytes | Iterable[bytes],
        *,
        model: str = GUIDE_MODEL,
        model_first: bool = False,
    ) -> requests.Response:
        """A submission with the fields in this order; `content` may be an iterable: chunked."""
        boundary = "a-boundary-of-our-own"
        model_part = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
        ).encode()
        file_head = (
            f"--{boundary}\r\n"
            'Content-Disposition: form-data; name="file"; filename="batch.jsonl"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        end = f"--{boundary}--\r\n".encode()
        before, after = (model_part, b"") if model_first else (b"", model_part)
        if isinstance(content, bytes):
            body: Any = before + file_head + content + b"\r\n" + after + end
        else:
            body = _joined(before + file_head, content, b"\r\n" + after + end)
        return self.call(
            "POST",
            "/v1/batches",
            data=body,
            headers={"content-type": f"multipart/form-data; boundary={boundary}"},
        )

    def submitted(self, num_requests: int = 3, **options: Any) -> str:
        """A queued batch's id."""
        response = self.submit(input_file(num_requests), **options)
        assert response.status_code == 200, response.text
        batch_id = response.json()["batch_id"]
        assert isinstance(batch_id, str)
        return batch_id

    def batch(self, batch_id: str) -> Batch:
        return self.store.get_batch(batch_id)

    def assert_nothing_left(self) -> None:
        """No batch, and no trace of an upload on the disk."""
        wait_for(lambda: not leftovers(self.data), what=f"left: {leftovers(self.data)}")
        assert self.store.list_batches(limit=1) == ([], False)


def _joined(head: bytes, content: Iterable[bytes], tail: bytes) -> Iterator[bytes]:
    yield head
    yield from content
    yield tail


def leftovers(data: DataDir) -> list[Path]:
    """What lies in the folders that hold batches."""
    return sorted(path for path in data.batches.rglob("*") if path.parent != data.batches)


@pytest.fixture
def api_settings(tmp_path: Path) -> Settings:
    """Settings with the guide's model, its seed benchmark, and all folders under tmp_path."""
    models = tmp_path / "models.toml"
    models.write_text(REGISTRY)
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    shutil.copy(REPOSITORY / "benchmarks" / "metadata" / f"{SEED_BENCHMARK}.json", benchmarks)
    return Settings(
        data_dir=tmp_path / "data", models=models, benchmarks_dir=benchmarks, min_free_bytes=0
    )


@pytest.fixture
def start_api(api_settings: Settings) -> Iterator[Callable[..., Api]]:
    """Starts servers in threads; settings may be changed by name."""
    running: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def start(**changes: Any) -> Api:
        settings = api_settings.model_copy(update=changes)
        app = create_app(settings)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            log_level="warning",
            ws="none",
            http=bounded_headers(settings.client_timeout_s),
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread, listener))
        wait_for(lambda: server.started, what="the server's start")
        return Api(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.services)

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join(timeout=120)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture
def api(start_api: Callable[..., Api]) -> Api:
    return start_api()


@dataclass
class ServerProcess:
    """`python -m batch_app.api_server` as a process of its own."""

    process: subprocess.Popen[bytes]
    output_path: Path

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    @property
    def url(self) -> str:
        marker = "Uvicorn running on "
        wait_for(lambda: marker in self.output or self.process.poll() is not None)
        assert marker in self.output, self.output
        return self.output.split(marker, 1)[1].split()[0]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=120)


@pytest.fixture
def start_server_process(
    api_settings: Settings, tmp_path: Path
) -> Iterator[Callable[..., ServerProcess]]:
    """Starts server processes; `environment` adds to the settings, `prefix` goes before python."""
    started: list[ServerProcess] = []

    def start(
        *flags: str, environment: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> ServerProcess:
        settings = {
            "VLLM_BATCH_DATA_DIR": str(api_settings.data_dir),
            "VLLM_BATCH_MODELS": str(api_settings.models),
            "VLLM_BATCH_BENCHMARKS_DIR": str(api_settings.benchmarks_dir),
            "VLLM_BATCH_MIN_FREE_BYTES": "0",
            "VLLM_BATCH_PORT": "0",
        }
        output_path = tmp_path / f"server-{len(started)}.log"
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "batch_app.api_server", *flags],
                cwd=REPOSITORY,
                env=os.environ | settings | (environment or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        server = ServerProcess(process, output_path)
        started.append(server)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(timeout=120)
