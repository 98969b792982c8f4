"""The Python client on real servers."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from acceptance.conftest import Running
from batch_app.client import Batch, BatchClient
from batch_app.client.client import WaitTimedOut
from batch_app.errors import (
    BadLines,
    BadRequest,
    Conflict,
    ModelNotFound,
    NotFound,
    ServerFailed,
    ServerUnreachable,
    Unauthenticated,
)
from support.sdk import jsonl, line, lines
from support.site import Site


@pytest.fixture
def client(working: Running) -> Iterator[BatchClient]:
    with BatchClient(working.url) as client:
        yield client


@pytest.fixture
def idle(waiting: Running) -> Iterator[BatchClient]:
    with BatchClient(waiting.url) as client:
        yield client


def test_the_whole_way(client: BatchClient, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(lines(300)))
    seen: list[Batch] = []
    batch = client.submit(path, model="sim")
    assert batch.progress.total == 300
    ended = client.wait(batch, on_progress=seen.append, poll_s=0.1)
    assert (ended.status, ended.progress.completed) == ("completed", 300)
    assert seen[-1] == ended
    assert [one.progress.done for one in seen] == sorted(one.progress.done for one in seen)
    assert ended.usage
    assert ended.usage.total_tokens > 0
    results = list(client.results(ended))
    assert [result.custom_id for result in results] == [f"r{n}" for n in range(300)]
    assert all(
        result.ok and result.text == result.custom_id.join(["say ", ""]) for result in results
    )
    assert results[0].request is None
    assert ended in list(client.list(limit=50))
    assert "sim" in [model.name for model in client.models()]
    assert any("submitted" in said for said in client.logs(ended))


def test_results_stand_beside_their_requests(client: BatchClient, tmp_path: Path) -> None:
    asked = [
        line(f"r{n}", "tiny-context", "one two three four five six" if n % 3 == 0 else "one two")
        for n in range(30)
    ]
    batch = client.wait(client.submit(asked, model="tiny-context"), poll_s=0.1)
    assert batch.progress.failed == 10
    for requests in (None, jsonl(asked)):
        got = list(client.results(batch, with_requests=True, requests=requests))
        assert [(one.request or {})["custom_id"] for one in got] == [a["custom_id"] for a in asked]
        assert [one.request for one in got] == asked
    failed = list(client.results(batch, status="failed", with_requests=True))
    assert [one.custom_id for one in failed] == [f"r{n}" for n in range(0, 30, 3)]
    assert all(one.error and one.error.status_code == 400 and one.text is None for one in failed)
    assert failed[0].request == asked[0]
    again = client.retry(batch)
    assert again.progress.total == 10
    with pytest.raises(BadRequest, match="is it the file"):
        list(client.results(batch, requests=jsonl(asked[1:])))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, lambda raw: raw])
def test_packed_files(idle: BatchClient, tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "in"
    path.write_bytes(pack(jsonl(lines(1000))))
    assert idle.submit(path, model="sim").progress.total == 1000


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_torn_packed_file_is_said_to_be_one(idle: BatchClient, tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "in.gz"
    path.write_bytes(pack(jsonl(lines(1000)))[:-20])
    before = [batch.id for batch in idle.list()]
    with pytest.raises(BadRequest, match=r"in\.gz can't be (unpacked|read)"):
        idle.submit(path, model="sim")
    assert [batch.id for batch in idle.list()] == before


def test_lines_that_name_their_models(client: BatchClient) -> None:
    asked = [*lines(5, "sim"), line("other", "tiny-context", "one two")]
    batch = client.submit(asked, priority=3, metadata={"run": "7"})
    assert client.wait(batch, poll_s=0.1).progress.completed == 6
    with pytest.raises(BadLines, match=r"requests\.jsonl") as refusal:
        client.submit([line("a", "sim"), line("a", "sim"), line("b", "nope")])
    assert [(bad.line, bad.code) for bad in refusal.value.errors] == [
        (2, "duplicate_custom_id"),
        (3, "model_not_found"),
    ]


def test_refusals_are_typed(idle: BatchClient) -> None:
    with pytest.raises(ModelNotFound, match="Models there"):
        idle.submit(lines(1), model="nope")
    with pytest.raises(BadLines) as refusal:
        idle.submit(b'{"custom_id": "a"}\nnot json\n', model="sim")
    assert [bad.line for bad in refusal.value.errors] == [1, 2]
    with pytest.raises(NotFound):
        idle.get("batch_000000000000000000000000")
    batch = idle.submit(lines(1), model="sim")
    with pytest.raises(Conflict):
        idle.retry(batch)
    with pytest.raises(Conflict):
        list(idle.results(batch))
    idle.cancel(batch)
    assert idle.wait(batch, poll_s=0.1, timeout_s=120).status == "cancelled"
    with pytest.raises(BadRequest, match="No such file"):
        idle.submit("/no/such/file.jsonl", model="sim")


def test_the_same_key_gets_the_same_batch(idle: BatchClient) -> None:
    first = idle.submit(lines(3), model="sim", idempotency_key="client-7")
    assert idle.submit(lines(3), model="sim", idempotency_key="client-7").id == first.id
    assert idle.submit(lines(3), model="sim").id != first.id


def test_waiting_can_end_early(idle: BatchClient) -> None:
    batch = idle.submit(lines(1), model="sim")
    with pytest.raises(WaitTimedOut) as late:
        idle.wait(batch, timeout_s=0.3, poll_s=0.1)
    assert late.value.batch.status == "pending"


def test_nobody_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    slept: list[float] = []
    with BatchClient(f"127.0.0.1:{port}", sleep=slept.append) as client:
        with pytest.raises(ServerUnreachable, match="vllm-batch up"):
            client.models()
        with pytest.raises(ServerUnreachable):
            client.submit(lines(1), model="sim")
    assert slept == []
    with pytest.raises(BadRequest, match="HOST:PORT"):
        BatchClient("http://")


def test_keys(tmp_path: Path) -> None:
    site = Site(tmp_path, min_free_bytes=0)
    try:
        made = subprocess.run(
            [sys.executable, "-m", "batch_app.cli", "keys", "create", "ana"],
            env={
                "VLLM_BATCH_DATA_DIR": str(site.settings.data_dir),
                "PYTHONPATH": ":".join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        url = site.start_server()
        with BatchClient(url) as client, pytest.raises(Unauthenticated, match="VLLM_BATCH_API_KEY"):
            list(client.list())
        with BatchClient(url, made.stdout.strip()) as client:
            assert list(client.list()) == []
    finally:
        site.close()


def test_a_server_that_is_started_anew_is_waited_for(tmp_path: Path) -> None:
    site = Site(tmp_path, min_free_bytes=0, poll_interval_s=0.2, commit_interval_s=0.05)
    try:
        url = site.start_server()
        server = site.last_process
        with BatchClient(url) as client:
            batch = client.submit(lines(20), model="sim")
            dead = threading.Event()

            def kill_once(seen: Batch) -> None:
                if not dead.is_set():
                    server.send_signal(signal.SIGKILL)
                    server.wait(timeout=120)
                    dead.set()
                    site.start_server(int(url.rsplit(":", 1)[1]))
                    site.start_worker()

            ended = client.wait(batch, on_progress=kill_once, poll_s=0.1, timeout_s=120)
            assert ended.status == "completed"
            assert dead.is_set()
    finally:
        site.close()


class Flaky:
    """A server whose connections break: it answers what it is told to, piece by piece."""

    def __init__(self, *answers: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        self._answers = answers
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                self.asked.append(head.decode().lower())
                connection.sendall(answer)
        self._listener.close()

    def end(self) -> None:
        self._thread.join(timeout=120)
        assert not self._thread.is_alive()


def answer(status: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}"]
    return "\r\n".join([*head, *headers, "connection: close", "", ""]).encode() + body


def test_a_download_goes_on_where_it_broke() -> None:
    whole = b"".join(
        json.dumps(
            {"custom_id": f"r{n}", "response": None, "error": {"code": "c", "message": "m"}}
        ).encode()
        + b"\n"
        for n in range(100)
    )
    tag = 'etag: "1"'
    server = Flaky(
        answer("200 OK", whole[:1234], tag, length=len(whole)),
        answer("503 Unavailable", b'{"error": {"message": "m"}}'),
        answer("206 Partial Content", whole[1234:2000], tag, length=len(whole) - 1234),
        answer("200 OK", whole, 'etag: "2"'),  # has no ranges any more: what was had is skipped
    )
    slept: list[float] = []
    with BatchClient(server.url, sleep=slept.append) as client:
        assert b"".join(client.result_blocks("batch_x")) == whole
    server.end()
    assert "range: bytes=1234-" in server.asked[2]
    assert 'if-range: "1"' in server.asked[2]
    assert "range: bytes=2000-" in server.asked[3]
    assert len(slept) == 3


def test_what_is_transient_is_tried_again() -> None:
    busy = answer("429 Too Many", b'{"error": {"message": "m"}}', "retry-after: 3")
    server = Flaky(busy, answer("200 OK", b'{"models": []}'))
    slept: list[float] = []
    with BatchClient(server.url, sleep=slept.append) as client:
        assert client.models() == ()
    server.end()
    assert slept == [3.0]


def test_somebody_elses_server_is_noticed() -> None:
    server = Flaky(answer("200 OK", b"<html>"), answer("404 Not Found", b"<html>"))
    with BatchClient(server.url) as client:
        for _ in range(2):
            with pytest.raises(ServerFailed, match="Is the address right"):
                client.models()
    server.end()


def test_imports_neither_engine_nor_server() -> None:
    found = "import sys, batch_app.client; print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", found], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(said.stdout.split())
    assert not loaded & {"fastapi", "starlette", "sqlalchemy", "vllm", "torch", "pydantic", "typer"}
