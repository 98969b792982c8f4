"""Health, headers, error bodies, the Host check; start and end of the process."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests

from batch_app.errors import StoreUnavailable
from batch_app.store import WorkerRow
from integration.api_fixtures import Api, ServerProcess, input_file


def test_health(api: Api) -> None:
    assert api.get("/livez").json()["status"] == "ok"
    ready = {"database": "ok", "disk": "ok"}
    working = ready | {"worker": "ok", "engine": "ok", "registry": "ok", "batches": "ok"}
    for path, checks in (("/readyz", ready), ("/health", working)):
        answer = api.get(path)
        assert answer.status_code == 200
        assert answer.json()["checks"] == checks


def test_health_notices_that_nobody_works(api: Api) -> None:
    api.submitted()
    answer = api.get("/health")
    assert answer.status_code == 503
    assert answer.json()["checks"]["worker"] == "none runs, and batches wait"
    assert api.get("/readyz").status_code == 200, "uploads are taken all the same"

    def report(age_s: float, silent_s: float = 0.0) -> dict[str, str]:
        now = datetime.now(UTC)
        seen = now - timedelta(seconds=age_s)
        figures = {"silent_s": silent_s}
        row = WorkerRow("w", "host", 1, 0.0, now, seen, "working", "sim", None, figures)
        api.store.report_worker(row)
        checks: dict[str, str] = api.get("/health").json()["checks"]
        return checks

    assert report(0)["worker"] == "ok"
    assert "gone: the last sign of life is 99" in report(99)["worker"]
    hang_s = api.services.settings.engine_hang_s
    assert report(0, hang_s * 0.4)["engine"] == "ok"
    assert "no token for" in report(0, hang_s * 0.9)["engine"]
    assert api.get("/health").status_code == 503
    assert report(99, hang_s)["engine"] == "ok", "what a worker said that is gone"


def test_database_that_does_not_answer(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = api.submitted()

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("password of the database")

    monkeypatch.setattr(api.store, "ping", refuse)
    monkeypatch.setattr(api.store, "get_batch", refuse)

    assert api.get("/readyz").status_code == 503
    assert api.get("/livez").status_code == 200
    answer = api.get(f"/v1/batches/{batch_id}")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "password" not in answer.text


def test_bodies_of_the_framework_s_own_refusals(api: Api) -> None:
    for method, path, status in [
        ("GET", "/nothing/here", 404),
        ("PUT", "/v1/models", 405),
        ("PATCH", "/v1/batches", 405),
    ]:
        answer = api.call(method, path)
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


def test_request_ids(api: Api) -> None:
    made = {api.get("/livez").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert api.get("/livez", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = api.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert re.fullmatch(r"req_[0-9a-f]{24}", odd)


def test_an_unforeseen_exception_shows_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def burst(*_: Any, **__: Any) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(api.store, "get_batch", burst)
    answer = api.get(
        "/v1/batches/batch_000000000000000000000000", headers={"x-request-id": "find-me"}
    )

    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "find-me"
    assert "find-me" in caplog.text
    assert "ValueError" in caplog.text


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1", True),
        ("127.8.9.1:1", True),
        ("[::1]:8080", True),
        ("app.localhost", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.1.2", False),
        ("[::2]", False),
        ("", False),
    ],
)
def test_host_must_be_loopback(api: Api, host: str, allowed: bool) -> None:
    answer = api.get("/livez", headers={"host": host})

    assert answer.status_code == (200 if allowed else 403)
    if not allowed:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert answer.headers["x-request-id"]


def test_documentation_needs_no_network(api: Api) -> None:
    page = api.get("/docs")
    assert page.status_code == 200
    assert not re.findall(r'(?:src|href)="https?://', page.text)
    schema = api.get("/openapi.json").json()
    assert {"/v1/batches", "/v1/batches/{batch_id}", "/v1/models"} <= set(schema["paths"])
    assert "HTTPValidationError" not in json.dumps(schema)


def test_start_and_end_of_the_process(start_server_process: Callable[..., ServerProcess]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        server = start_server_process()
        url = server.url
        assert "✅ Database initialized at sqlite:///" in server.output
        assert "✅ Loaded benchmark for google/gemma-3-4b-it" in server.output
        assert "✅ Batch API Server started" in server.output
        assert re.search(r"INFO: +Uvicorn running on http://127\.0\.0\.1:\d+", server.output)
        assert requests.get(f"{url}/v1/models", timeout=120).json()["count"] == 2
        assert server.end(number) == 0
        assert "Traceback" not in server.output


def test_address_in_use(start_server_process: Callable[..., ServerProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start_server_process("--port", str(taken.getsockname()[1]))
        assert server.process.wait(timeout=120) == 1

    assert "in use" in server.output
    assert len(server.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "--no-auth"),
        (("--models", "/nowhere/models.toml"), "no model registry"),
        (("--host", "no.such.host.invalid", "--no-auth"), "Can't listen"),
        (("--port", "99999"), "port"),
    ],
)
def test_refused_settings(
    start_server_process: Callable[..., ServerProcess], flags: tuple[str, ...], words: str
) -> None:
    server = start_server_process(*flags)

    assert server.process.wait(timeout=120) == 1
    assert words in server.output
    assert "Traceback" not in server.output


def test_open_to_others_when_told_so(start_server_process: Callable[..., ServerProcess]) -> None:
    server = start_server_process("--host", "0.0.0.0", "--no-auth")
    port = server.url.rsplit(":", 1)[1]

    answer = requests.get(
        f"http://127.0.0.1:{port}/livez", headers={"host": "gpu.example"}, timeout=120
    )

    assert answer.status_code == 200
    assert "--no-auth: nobody is asked" in server.output
    assert server.end() == 0


def test_end_during_an_upload_leaves_nothing(
    start_server_process: Callable[..., ServerProcess], api_settings: Any
) -> None:
    server = start_server_process()
    url = server.url
    head = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    def endless() -> Iterator[bytes]:
        yield head
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            yield input_file(1000)
            if incoming.exists() and any(incoming.iterdir()) and server.process.poll() is None:
                server.process.send_signal(signal.SIGTERM)

    incoming = api_settings.data_dir / "batches" / "incoming"
    with pytest.raises(requests.RequestException):
        requests.post(
            f"{url}/v1/batches",
            data=endless(),
            headers={"content-type": "multipart/form-data; boundary=xyz"},
            timeout=120,
        ).raise_for_status()

    assert server.process.wait(timeout=120) == 0
    assert list(incoming.iterdir()) == []
