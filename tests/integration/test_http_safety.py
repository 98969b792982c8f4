"""What stands before the routes: hosts, origins, headers, limits, slow clients, the audit log."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from batch_app.access import KeyChanges
from batch_app.core import utc_now
from batch_app.dry_run import DryRuns
from batch_app.errors import BadRequest
from batch_app.keys import Scope, new_key
from batch_app.routes.slow_clients import MAX_HEADER_BYTES
from integration.api_fixtures import Api, ServerProcess, input_file, request_line
from support.waiting import wait_for

FORM_HEAD = (
    b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nsim\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)


def make_key(api: Api, *scopes: Scope) -> str:
    key, token = new_key("test", scopes or (Scope.READ, Scope.WRITE), utc_now())
    api.store.add_key(key)
    KeyChanges(api.data.key_changes_file).note()
    return token


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def deeds(api: Api) -> list[dict[str, Any]]:
    path = api.data.audit_file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- hosts and origins -----------------------------------------------------------------------------


def test_with_keys_any_name_will_do(api: Api) -> None:
    answer = api.get("/livez", headers={"host": "gpu.example"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"
    make_key(api)
    assert api.get("/livez", headers={"host": "gpu.example"}).status_code == 200


def test_a_list_of_names_is_the_only_ones(start_api: Callable[..., Api]) -> None:
    api = start_api(allowed_hosts=("gpu.example",))
    for _ in range(2):  # without keys, and with
        for host, status in {
            "gpu.example": 200,
            "GPU.example:8080": 200,
            "localhost": 200,
            "other.example": 403,
            "sub.gpu.example": 403,
        }.items():
            assert api.get("/livez", headers={"host": host}).status_code == status
        make_key(api)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"sec-fetch-site": "same-origin"}, 404),
        ({"sec-fetch-site": "none"}, 404),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({"origin": "{own}"}, 404),
        ({"origin": "{own}", "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_changes_asked_for_by_other_pages(api: Api, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(own=api.url) for name, value in headers.items()}
    absent = "/v1/batches/batch_000000000000000000000000"
    for method, path in [("DELETE", absent), ("POST", f"{absent}/cancel")]:
        assert api.call(method, path, headers=sent).status_code == status
    assert api.get("/v1/batches", headers=sent).status_code == 200  # no other page can read it


# -- headers ---------------------------------------------------------------------------------------


def test_every_answer_has_the_headers(api: Api) -> None:
    batch_id = api.submitted()
    for path in ("/livez", "/v1/batches", "/nothing", f"/v1/batches/{batch_id}/logs", "/docs"):
        headers = api.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    refused = api.get("/livez", headers={"host": "evil.example"})
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_what_is_no_page_may_load_nothing(api: Api) -> None:
    policy = api.get("/v1/models").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "sandbox" in policy


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_a_page_may_run_its_own_scripts_only(api: Api, page: str) -> None:
    answer = api.get(page)
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'self'"
    assert "unsafe-inline" not in policy["script-src"]
    assert "unsafe-eval" not in policy["script-src"]
    inline = re.findall(rb"<script>(.*?)</script>", answer.content, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in inline]
    assert policy["script-src"] == " ".join(["'self'", *(f"'sha256-{h}'" for h in hashes)])
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain.jsonl", "plain.jsonl"),
        ("../../etc/passwd", "passwd"),
        ('a"b.jsonl', "ab.jsonl"),
        ("it's; x=y.jsonl", "it's; x=y.jsonl"),
        ("zwei\r\nset-cookie: a=b", "zweiset-cookie: a=b"),
        ("übung 批.jsonl", "übung 批.jsonl"),
        ("\x00\x1b[2J", "[2J"),
        ("", "upload.jsonl"),
    ],
)
def test_a_file_s_name_on_its_way_out(api: Api, given: str, shown: str) -> None:
    wish = {"filename": given or " ", "purpose": "batch", "bytes": 3, "mime_type": "text/plain"}
    upload_id = api.call("POST", "/v1/uploads", json=wish).json()["id"]
    part = api.call("POST", f"/v1/uploads/{upload_id}/parts", files={"data": ("p", b"{}\n")})
    done = {"part_ids": [part.json()["id"]]}
    file = api.call("POST", f"/v1/uploads/{upload_id}/complete", json=done).json()["file"]
    assert file["filename"] == shown
    answer = api.get(f"/v1/files/{file['id']}/content")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in answer.headers
    kind, _, name = answer.headers["content-disposition"].partition("; filename*=UTF-8''")
    assert kind == "attachment"
    assert re.fullmatch(r"[A-Za-z0-9._~%-]+", name)
    assert requests.utils.unquote(name) == shown  # type: ignore[attr-defined]


def test_results_are_an_attachment(api: Api) -> None:
    batch_id = api.submitted()
    api.call("POST", f"/v1/batches/{batch_id}/cancel")
    api.services.housekeeping.wake()
    wait_for(lambda: api.batch(batch_id).is_terminal)
    answer = api.get(f"/v1/batches/{batch_id}/results")
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "x"])
def test_encoded_bodies_are_refused(api: Api, encoding: str) -> None:
    for path in ("/v1/batches", "/v1/files", "/v1/uploads"):
        sent = {"content-encoding": encoding, "content-type": "application/json"}
        answer = api.call("POST", path, data=b"{}", headers=sent)
        assert answer.status_code == 415
        assert "Content-Encoding" in answer.json()["error"]["message"]


# -- limits ----------------------------------------------------------------------------------------


def test_so_many_batches_and_no_more(start_api: Callable[..., Api]) -> None:
    api = start_api(max_unfinished_batches=2)
    ana, bob = make_key(api), make_key(api)

    def submit(token: str) -> requests.Response:
        form = {"files": {"file": ("in.jsonl", request_line())}, "data": {"model": "sim"}}
        return api.call("POST", "/v1/batches", headers=bearer(token), **form)

    mine = [submit(ana).json()["batch_id"] for _ in range(2)]
    refused = submit(ana)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "too_many_batches"
    assert int(refused.headers["retry-after"]) > 0
    assert refused.headers["x-should-retry"] == "false"
    assert submit(bob).status_code == 200

    file = api.call(
        "POST",
        "/v1/files",
        headers=bearer(ana),
        files={"file": ("in.jsonl", request_line())},
        data={"purpose": "batch"},
    ).json()
    wish = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}
    answer = api.call("POST", "/v1/batches", headers=bearer(ana), json=wish)
    assert answer.status_code == 429
    assert api.call("DELETE", f"/v1/batches/{mine[0]}", headers=bearer(ana)).status_code == 200
    answer = api.call("POST", "/v1/batches", headers=bearer(ana), json=wish)
    assert answer.status_code == 200, "one has ended, so there is room for one"


def test_a_repetition_gets_its_batch_also_where_there_is_no_more_room(
    start_api: Callable[..., Api],
) -> None:
    api = start_api(max_unfinished_batches=1)
    found = set()
    for _ in range(2):
        answer = api.call(
            "POST",
            "/v1/batches",
            headers={"idempotency-key": "run-7"},
            files={"file": ("in.jsonl", request_line())},
            data={"model": "sim"},
        )
        assert answer.status_code == 200, answer.text
        found.add(answer.json()["batch_id"])
    assert len(found) == 1


def test_so_many_uploads_at_once_and_no_more(start_api: Callable[..., Api]) -> None:
    api = start_api(max_open_uploads=1)
    token = make_key(api)
    release = threading.Event()
    answers: list[requests.Response] = []

    def slow() -> Iterator[bytes]:
        yield FORM_HEAD + request_line()
        release.wait(120)
        yield b"\r\n--xyz--\r\n"

    sent = bearer(token) | {"content-type": "multipart/form-data; boundary=xyz"}
    thread = threading.Thread(
        target=lambda: answers.append(api.call("POST", "/v1/batches", data=slow(), headers=sent))
    )
    thread.start()
    try:
        wait_for(lambda: any(api.data.incoming.iterdir()), what="the upload is under way")
        form = {"files": {"file": ("in.jsonl", request_line())}, "data": {"model": "sim"}}
        refused = api.call("POST", "/v1/batches", headers=bearer(token), **form)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_uploads"
        assert "x-should-retry" not in refused.headers  # the SDK may try again shortly
        assert int(refused.headers["retry-after"]) > 0
        other = api.call("POST", "/v1/batches", headers=bearer(make_key(api)), **form)
        assert other.status_code == 200
    finally:
        release.set()
        thread.join(timeout=120)
    assert answers[0].status_code == 200
    assert api.call("POST", "/v1/batches", headers=bearer(token), **form).status_code == 200


def test_looks_at_a_file_count_as_uploads(
    start_api: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a body to send takes as long, and could take all threads there are."""
    api = start_api(max_open_uploads=1)
    ana, bob = make_key(api), make_key(api)
    begun, release = threading.Event(), threading.Event()
    answers: list[requests.Response] = []

    def look(path: Path, *_: Any) -> None:
        begun.set()
        release.wait(120)
        raise BadRequest("Seen.")

    monkeypatch.setattr(DryRuns, "of", lambda self, *given: look(*given))

    def ask(token: str) -> requests.Response:
        form = {"files": {"file": ("in.jsonl", request_line())}, "data": {"purpose": "batch"}}
        file = api.call("POST", "/v1/files", headers=bearer(token), **form)
        if file.status_code != 200:
            return file
        wish = {"input_file_id": file.json()["id"]}
        return api.call("POST", "/v1/estimate", headers=bearer(token), json=wish)

    thread = threading.Thread(target=lambda: answers.append(ask(ana)))
    thread.start()
    try:
        assert begun.wait(120)
        refused = ask(ana)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_uploads")
    finally:
        release.set()
        thread.join(timeout=120)
    assert [answer.status_code for answer in (*answers, ask(bob))] == [400, 400]


def sent_without_end(api: Api, begin: bytes) -> bytes:
    """What the server says to this, and a header that goes on as long as it listens."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(120)
        sent = 0
        with suppress(OSError):
            connection.sendall(begin)
            while sent < 64 << 20:
                connection.sendall(b"x" * 65536)
                sent += 65536
        assert sent < 64 << 20, "it listened for ever"
        with suppress(OSError):
            return connection.recv(65536)
    return b""


@pytest.mark.skipif(
    find_spec("httptools") is None, reason="the other parser has a bound of its own"
)
@pytest.mark.parametrize(
    "begin",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: ",
        b"GET /",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
    ],
    ids=["header", "address", "trailer"],
)
def test_headers_without_end_are_cut(api: Api, begin: bytes) -> None:
    said = sent_without_end(api, begin)
    statuses = {answer[:3] for answer in said.split(b"HTTP/1.1 ")[1:]}
    # A request whose own headers have ended may be answered before its trailer is refused.
    early = {b"405"} if b"chunked" in begin else set()
    assert statuses - early <= {b"431", b"400"}
    api.assert_nothing_left()


def test_a_body_in_many_small_pieces_is_no_header(api: Api) -> None:
    """Frames of five bytes around each byte of it."""
    content = b"".join(request_line(f"r{number}", x="y" * 900) for number in range(40))
    body = FORM_HEAD + content + b"\r\n--xyz--\r\n"
    assert len(body) > MAX_HEADER_BYTES / 2
    sent = {"content-type": "multipart/form-data; boundary=xyz"}
    pieces = (body[at : at + 1] for at in range(len(body)))
    assert api.call("POST", "/v1/batches", data=pieces, headers=sent).status_code == 200


# -- slow clients ----------------------------------------------------------------------------------


#: A client that is quick keeps below it also on a busy machine.
IMPATIENCE_S = 3.0


@pytest.fixture
def impatient(start_server_process: Callable[..., ServerProcess]) -> Iterator[tuple[str, int]]:
    """Host and port of a server that waits for so long only."""
    server = start_server_process(environment={"VLLM_BATCH_CLIENT_TIMEOUT_S": str(IMPATIENCE_S)})
    yield "127.0.0.1", int(server.url.rsplit(":", 1)[1])
    assert server.end() == 0
    assert "Traceback" not in server.output


def said_until_closed(connection: socket.socket) -> bytes:
    connection.settimeout(120)
    said = b""
    try:
        while piece := connection.recv(65536):
            said += piece
    except ConnectionResetError:
        pass
    return said


def test_slow_clients_are_given_up_on(impatient: tuple[str, int], api_settings: Any) -> None:
    head = b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\n"
    form = b"Content-Type: multipart/form-data; boundary=xyz\r\n"
    cases = {
        "says nothing": b"",
        "half of its headers": head,
        "half of its body": head + form + b"Content-Length: 1000\r\n\r\n" + FORM_HEAD,
        "half of its JSON": head
        + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
    }
    connections = {case: socket.create_connection(impatient) for case in cases}
    for case, sent in cases.items():
        connections[case].sendall(sent)
    answered = requests.get(f"http://127.0.0.1:{impatient[1]}/livez", timeout=120)
    assert answered.status_code == 200, "the others are served meanwhile"
    for case, connection in connections.items():
        said = said_until_closed(connection)
        if "body" in case or "JSON" in case:
            assert said.startswith(b"HTTP/1.1 408 "), case
            assert b"request_timeout" in said
        else:
            assert said == b"", case
        connection.close()
    assert list((api_settings.data_dir / "batches" / "incoming").iterdir()) == []


def test_a_byte_now_and_then_is_too_slow(impatient: tuple[str, int]) -> None:
    """Each piece comes in time; the whole never would."""
    head = (
        b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=xyz\r\n\r\n"
    )
    for begin in (head + FORM_HEAD, b"GET /livez HTTP/1.1\r\n"):
        with socket.create_connection(impatient) as connection:
            connection.sendall(begin)
            connection.settimeout(0.05)
            deadline = time.monotonic() + 120
            while True:
                assert time.monotonic() < deadline, "it was never given up on"
                try:
                    connection.sendall(b"x")
                    if connection.recv(65536):
                        continue
                    break
                except TimeoutError:
                    continue
                except OSError:
                    break


def test_who_is_quick_is_not_disturbed(impatient: tuple[str, int]) -> None:
    url = f"http://127.0.0.1:{impatient[1]}"
    with requests.Session() as session:
        form = {"files": {"file": ("in.jsonl", input_file(20))}, "data": {"model": "sim"}}
        batch_id = session.post(f"{url}/v1/batches", timeout=120, **form).json()["batch_id"]
        began = time.monotonic()
        followed = session.get(
            f"{url}/v1/batches/{batch_id}/logs?follow=true", timeout=120, stream=True
        )
        lines = followed.iter_lines()
        assert next(lines)
        cancelled = requests.delete(f"{url}/v1/batches/{batch_id}", timeout=120)
        wait_for(
            lambda: time.monotonic() - began > 1.2 * IMPATIENCE_S,
            what="longer than the server waits",
        )
        assert cancelled.status_code == 200
        assert b"cancelled" in b"".join(lines)


# -- revoked while under way -----------------------------------------------------------------------


def test_a_revoked_key_ends_an_upload(api: Api) -> None:
    token = make_key(api)
    [key] = api.store.list_keys()

    def pieces() -> Iterator[bytes]:
        yield FORM_HEAD
        wait_for(lambda: any(api.data.incoming.iterdir()), what="the upload is under way")
        api.store.revoke_key(key.id, utc_now())
        KeyChanges(api.data.key_changes_file).note()
        yield request_line()
        yield b"\r\n--xyz--\r\n"

    answer = api.call(
        "POST",
        "/v1/batches",
        data=pieces(),
        headers=bearer(token) | {"content-type": "multipart/form-data; boundary=xyz"},
    )
    assert answer.status_code == 401
    assert "revoked" in answer.json()["error"]["message"]
    api.assert_nothing_left()


def test_a_revoked_key_ends_a_download(api: Api) -> None:
    token = make_key(api)
    [key] = api.store.list_keys()
    form = {"files": {"file": ("in.jsonl", request_line())}, "data": {"model": "sim"}}
    made = api.call("POST", "/v1/batches", headers=bearer(token), **form).json()
    path = f"/v1/batches/{made['batch_id']}/logs"
    followed = api.get(f"{path}?follow=true", headers=bearer(token), stream=True)
    pieces = followed.iter_content(None)
    assert next(pieces)
    api.store.revoke_key(key.id, utc_now())
    KeyChanges(api.data.key_changes_file).note()
    with api.data.log_file(made["batch_id"]).open("ab") as log:
        log.write(b"more\n")
    rest: list[bytes] = []
    with pytest.raises(requests.exceptions.RequestException):
        rest.extend(pieces)
    assert b"more" not in b"".join(rest)


def test_a_revoked_key_ends_a_page_s_events_without_a_broken_connection(api: Api) -> None:
    token = make_key(api)
    [key] = api.store.list_keys()
    with api.get("/events", headers=bearer(token), stream=True) as events:
        pieces = events.iter_content(None)
        assert next(pieces)
        api.store.revoke_key(key.id, utc_now())
        KeyChanges(api.data.key_changes_file).note()
        assert b"event: end" not in b"".join(pieces)  # that would be the server's


# -- the OpenAI SDK --------------------------------------------------------------------------------


def test_the_sdk_understands_and_does_not_repeat(start_api: Callable[..., Api]) -> None:
    api = start_api(max_unfinished_batches=1)
    sent: list[str] = []
    hooks = {"request": [lambda request: sent.append(request.method)]}

    def client(token: str) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(event_hooks=hooks)
        return openai.OpenAI(base_url=f"{api.url}/v1", api_key=token, http_client=http)

    reader, writer = make_key(api, Scope.READ), make_key(api)
    with client("none") as stranger, pytest.raises(openai.AuthenticationError) as unknown:
        stranger.batches.list()
    assert unknown.value.code == "invalid_api_key"
    assert len(sent) == 1
    with client(reader) as reads:
        assert list(reads.batches.list()) == []
        sent.clear()
        with pytest.raises(openai.PermissionDeniedError) as denied:
            reads.files.create(file=("in.jsonl", request_line()), purpose="batch")
        assert denied.value.code == "insufficient_scope"
        assert len(sent) == 1
    with client(writer) as writes:
        # It names a model: a batch that the check refuses has finished, and is in nobody's way.
        line = json.loads(request_line())
        line["body"]["model"] = "sim"
        file = writes.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        wish: Any = {
            "input_file_id": file.id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        writes.batches.create(**wish)
        sent.clear()
        with pytest.raises(openai.RateLimitError):
            writes.batches.create(**wish)
        assert len(sent) == 1


# -- the audit log ---------------------------------------------------------------------------------


def test_who_did_what_is_written_down(api: Api) -> None:
    ana, bob = make_key(api), make_key(api)
    admin = make_key(api, Scope.READ, Scope.ADMIN)
    tokens = {"ana": ana, "bob": bob, "admin": admin}
    keys = {name: f"key_{token.split('_')[1]}" for name, token in tokens.items()}

    form = {
        "files": {"file": ("secret-name.jsonl", request_line())},
        "data": {"model": "sim"},
    }
    sent = bearer(ana) | {"x-request-id": "find-me"}
    batch_id = api.call("POST", "/v1/batches", headers=sent, **form).json()["batch_id"]
    path = f"/v1/batches/{batch_id}"
    api.get(path, headers=bearer(ana))  # not worth a line
    api.get("/v1/batches", headers=bearer(admin))  # nor that
    api.get(path, headers=bearer(bob))
    api.get(path, headers=bearer(admin))
    api.call("DELETE", path, headers=bearer(admin))
    api.get(path)
    api.get(path, headers=bearer("vbk_000000000000_" + "0" * 56))
    api.call("DELETE", path, headers=bearer(ana))
    api.store.revoke_key(keys["bob"], utc_now())
    KeyChanges(api.data.key_changes_file).note()
    api.get(path, headers=bearer(bob))

    found = [
        (deed["action"], deed["object_id"], deed["outcome"], deed["key_id"]) for deed in deeds(api)
    ]
    assert found == [
        ("create_batch", batch_id, 200, keys["ana"]),
        ("get_batch", batch_id, 404, keys["bob"]),
        ("get_batch", batch_id, 200, keys["admin"]),
        (f"DELETE {path}", None, 403, keys["admin"]),
        (f"GET {path}", None, 401, None),
        (f"GET {path}", None, 401, None),
        ("cancel_pending_batch", batch_id, 200, keys["ana"]),
        (f"GET {path}", None, 401, keys["bob"]),
    ]
    first = deeds(api)[0]
    assert first["client"] == "127.0.0.1"
    assert first["request_id"] == "find-me"
    text = api.data.audit_file.read_text()
    for secret in (ana, bob, "2 + 2", "secret-name"):
        assert secret not in text


def test_what_was_cut_off_is_written_down(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=xyz\r\n\r\n" + FORM_HEAD
        )
        wait_for(lambda: any(api.data.incoming.iterdir()), what="the upload is under way")
    wait_for(lambda: bool(deeds(api)), what="a line of the audit log")
    assert deeds(api)[0]["action"] == "create_batch"
    assert deeds(api)[0]["outcome"] is None


# -- the address -----------------------------------------------------------------------------------


def test_others_are_let_in_once_there_is_a_key(
    start_server_process: Callable[..., ServerProcess], api_settings: Any
) -> None:
    refused = start_server_process("--host", "0.0.0.0")
    assert refused.process.wait(timeout=120) == 1
    assert "vllm-batch keys create" in refused.output
    assert not Path(api_settings.data_dir).exists()

    from typer.testing import CliRunner

    from batch_app.cli import app

    made = CliRunner().invoke(
        app, ["keys", "create", "a", "--data-dir", str(api_settings.data_dir)]
    )
    token = made.stdout.strip()
    server = start_server_process("--host", "0.0.0.0")
    url = f"http://127.0.0.1:{server.url.rsplit(':', 1)[1]}"
    sent = {"host": "gpu.example"}
    assert requests.get(f"{url}/v1/models", headers=sent, timeout=120).status_code == 401
    sent |= bearer(token)
    assert requests.get(f"{url}/v1/models", headers=sent, timeout=120).status_code == 200
    key_id = f"key_{token.split('_')[1]}"
    CliRunner().invoke(app, ["keys", "revoke", key_id, "--data-dir", str(api_settings.data_dir)])
    assert requests.get(f"{url}/v1/models", headers=sent, timeout=120).status_code == 401
    assert server.end() == 0


def test_no_auth_is_said_aloud_and_asks_for_no_key(
    start_server_process: Callable[..., ServerProcess],
) -> None:
    server = start_server_process("--no-auth")
    assert requests.get(f"{server.url}/v1/models", timeout=120).status_code == 200
    assert "--no-auth: nobody is asked for an API key" in server.output
    assert server.end() == 0
