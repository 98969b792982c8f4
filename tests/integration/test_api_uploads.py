"""Uploads that are cut, malformed, too large, or meet a full disk; and their memory."""

from __future__ import annotations

import errno
import io
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from batch_app.config import MIB
from batch_app.files import DataDir
from batch_app.incoming import Incoming
from integration.api_fixtures import (
    GUIDE_MODEL,
    Api,
    ServerProcess,
    input_file,
    leftovers,
    request_line,
)
from support.waiting import wait_for

FORM = {"content-type": "multipart/form-data; boundary=xyz"}


def part(name: str, content: bytes, *, extra: str = "") -> bytes:
    return (
        f'--xyz\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode()
        + content
        + b"\r\n"
    )


END = b"--xyz--\r\n"
FILE = part("file", input_file(2), extra='; filename="a.jsonl"')
MODEL = part("model", GUIDE_MODEL.encode())


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (MODEL + END, FORM, 400, '"file"'),
        (FILE + END, FORM, 400, '"model"'),
        (FILE + part("model", b"") + END, FORM, 400, '"model"'),
        (FILE + MODEL + FILE + END, FORM, 400, 'several "file"'),
        (FILE + MODEL + MODEL + END, FORM, 400, '"model" twice'),
        (FILE + part("model", b"\xff") + END, FORM, 400, "UTF-8"),
        (part("model", b"m" * 70_000) + FILE + END, FORM, 400, "65536"),
        (b"".join(part(f"p{n}", b"") for n in range(40)) + END, FORM, 400, "parts"),
        (FILE + MODEL, FORM, 400, "last boundary"),
        (FILE[:-40], FORM, 400, "last boundary"),
        (b"", FORM, 400, "last boundary"),
        (b"not a form at all", FORM, 400, "multipart"),
        (b"--xyz\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, FORM, 400, "no name"),
        (b"--xyz\r\nBad\x00Header: 1\r\n\r\nx\r\n" + END, FORM, 400, "multipart"),
        (b"--xyz\r\nA: " + b"a" * 100_000 + b"\r\n\r\nx\r\n" + END, FORM, 400, "multipart"),
        (FILE + MODEL + END, {"content-type": "multipart/form-data"}, 400, "boundary"),
        (
            FILE + MODEL + END,
            {"content-type": f"multipart/form-data; boundary={'b' * 1000}"},
            400,
            "boundary",
        ),
        (b"{}", {"content-type": "text/plain"}, 415, "multipart/form-data"),
        (b"", {}, 415, "multipart/form-data"),
        (FILE + MODEL + END, FORM | {"content-encoding": "gzip"}, 415, "Content-Encoding"),
    ],
)
def test_malformed_forms(
    api: Api, body: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    answer = api.call("POST", "/v1/batches", data=body, headers=headers)

    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    api.assert_nothing_left()


def test_unknown_fields_and_odd_file_names_do_no_harm(api: Api) -> None:
    odd = part("file", input_file(2), extra='; filename="../../etc/p\x1b[2Jass\u202ewd\r"')
    body = part("note", b"hello") + odd + MODEL + END

    answer = api.call("POST", "/v1/batches", data=body, headers=FORM)

    if answer.status_code == 200:
        batch = api.batch(answer.json()["batch_id"])
        name = api.store.get_file(batch.input_file_id).filename
        assert name.isprintable()
        assert "/" not in name
    else:  # the carriage return in a header may be refused
        assert answer.status_code == 400


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
@pytest.mark.parametrize("chunked", [True, False])
def test_too_large(start_api: Callable[..., Api], model_first: bool, chunked: bool) -> None:
    api = start_api(max_upload_bytes=3 * MIB)
    content = request_line("a" * 500) * 20_000
    assert len(content) > 10 * MIB
    pieces = [content[at : at + 50_000] for at in range(0, len(content), 50_000)]

    answer = api.submit(iter(pieces) if chunked else content, model_first=model_first)

    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "file_too_large"
    assert "max_upload_bytes" in answer.json()["error"]["message"]
    api.assert_nothing_left()


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_a_client_that_goes_away(api: Api, model_first: bool) -> None:
    address = urlsplit(api.url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            "POST /v1/batches HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: {FORM['content-type']}\r\nContent-Length: 100000000\r\n\r\n"
        ).encode()
        connection.sendall(head + (MODEL if model_first else b"") + FILE[:-2])
        connection.sendall(input_file(20_000))
        wait_for(lambda: leftovers(api.data), what="the upload's first bytes")

    api.assert_nothing_left()
    assert api.get("/livez").status_code == 200


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_full_disk(
    api: Api, monkeypatch: pytest.MonkeyPatch, model_first: bool, error: int
) -> None:
    class FullDisk(io.RawIOBase):
        def write(self, data: Any) -> int:
            raise OSError(error, "No space left on device")

    begin_file = Incoming._begin_file

    def begin_on_a_full_disk(self: Any, fields: dict[str, str]) -> None:
        begin_file(self, fields)
        self._file.close()
        self._file = FullDisk()

    monkeypatch.setattr(Incoming, "_begin_file", begin_on_a_full_disk)
    answer = api.submit(input_file(100_000), model_first=model_first)

    assert answer.status_code == 507
    assert answer.headers["x-should-retry"] == "false"
    assert "space" in answer.json()["error"]["message"]
    api.assert_nothing_left()


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_file_size_limit_of_the_system(
    start_server_process: Callable[..., ServerProcess],
    api_settings: Any,
    model_first: bool,
) -> None:
    """The kernel's own refusal: RLIMIT_FSIZE lets no file grow beyond 5 MiB."""
    server = start_server_process(prefix=("prlimit", f"--fsize={5 * MIB}"))
    address = server.url
    parts = [MODEL, part("file", input_file(100_000), extra='; filename="a"')]
    body = b"".join(parts if model_first else parts[::-1]) + END

    answer = requests.post(f"{address}/v1/batches", data=body, headers=FORM, timeout=120)

    assert answer.status_code == 507, answer.text
    wait_for(lambda: not leftovers(DataDir(api_settings.data_dir)), what="a clean folder")
    again = requests.post(
        f"{address}/v1/batches", data=MODEL + FILE + END, headers=FORM, timeout=120
    )
    assert again.status_code == 200
    assert server.end() == 0


def test_no_room_is_refused_at_once(start_api: Callable[..., Api]) -> None:
    api = start_api(min_free_bytes=1 << 60)

    answer = api.submit(input_file(3))

    assert answer.status_code == 507
    assert "min_free_bytes" in answer.json()["error"]["message"]
    api.assert_nothing_left()
    assert api.get("/livez").status_code == 200
    ready = api.get("/readyz")
    assert ready.status_code == 503
    assert "min_free_bytes" in ready.json()["checks"]["disk"]


def test_failed_insert_leaves_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("a bug with a secret in it")

    monkeypatch.setattr(api.store, "add_batch", refuse)
    answer = api.submit(input_file(3))

    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    api.assert_nothing_left()


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_memory_does_not_grow_with_the_upload(
    start_server_process: Callable[..., ServerProcess], model_first: bool
) -> None:
    server = start_server_process()
    url = server.url
    process = psutil.Process(server.process.pid)
    requests.post(f"{url}/v1/batches", data=FILE + MODEL + END, headers=FORM, timeout=120)
    before = process.memory_info().rss
    peak = before
    size = 200 * MIB
    filling = "x" * 2000

    def body() -> Iterator[bytes]:
        nonlocal peak
        if model_first:
            yield MODEL
        yield FILE.split(b"\r\n\r\n")[0] + b"\r\n\r\n"
        sent, number = 0, 0
        while sent < size:
            lines = b"".join(
                b'{"custom_id":"r%d","body":{"messages":[{"role":"user","content":"%s"}]}}\n'
                % (at, filling.encode())
                for at in range(number, number + 100)
            )
            number += 100
            sent += len(lines)
            peak = max(peak, process.memory_info().rss)
            yield lines
        yield b"\r\n"
        if not model_first:
            yield MODEL
        yield END

    answer = requests.post(f"{url}/v1/batches", data=body(), headers=FORM, timeout=120)

    assert answer.status_code == 200, answer.text
    peak = max(peak, process.memory_info().rss)
    assert peak - before < 100 * MIB
    assert server.end() == 0
