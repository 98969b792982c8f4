"""Idempotency-Key on a form: a repeated submission is one batch, and leaves nothing else."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import requests

from batch_app.core import Batch
from integration.api_fixtures import GUIDE_MODEL, Api, input_file, leftovers
from support.sdk import Sdk
from support.waiting import wait_for

KEY = {"Idempotency-Key": "k-1"}


def submit(
    api: Api,
    content: bytes,
    headers: dict[str, str] | None = None,
    filename: str = "a.jsonl",
    **fields: str,
) -> requests.Response:
    return api.call(
        "POST",
        "/v1/batches",
        files={"file": (filename, content)},
        data={"model": GUIDE_MODEL, **fields},
        headers=headers or KEY,
    )


def batch_id(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["batch_id"])


def resting(answer: requests.Response) -> dict[str, Any]:
    """A batch but for its estimate, which is made anew for each answer: it holds a clock time."""
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert body.pop("estimate") is not None
    return body


def num_batches(api: Api) -> int:
    return len(api.store.list_batches(limit=100)[0])


def settled(api: Api) -> list[Path]:
    """What lies on the disk once no upload is under way."""
    wait_for(lambda: not list(api.data.incoming.iterdir()), what="no upload is under way")
    return leftovers(api.data)


def test_the_same_form_is_the_same_batch(api: Api) -> None:
    first = submit(api, input_file(50))
    before = settled(api)
    again = submit(api, input_file(50), filename="b.jsonl")  # with a boundary of its own
    assert resting(again) == resting(first)
    assert num_batches(api) == 1
    assert settled(api) == before
    assert len(api.store.list_files(limit=10)[0]) == 1


def test_fields_in_another_order_say_the_same(api: Api) -> None:
    content = input_file(5)
    boundary = "xyz"
    model = f'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\n{GUIDE_MODEL}\r\n'
    file = '--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    note = '--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\nx\r\n'
    parts = [model.encode(), note.encode(), file.encode() + content + b"\r\n"]
    found = [
        batch_id(
            api.call(
                "POST",
                "/v1/batches",
                data=b"".join(order) + b"--xyz--\r\n",
                headers={"content-type": f"multipart/form-data; boundary={boundary}", **KEY},
            )
        )
        for order in (parts, parts[::-1])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (input_file(51), {}),
        (input_file(50).replace(b"2 + 2", b"2 + 3", 1), {}),
        (input_file(50), {"model": "sim"}),
        (input_file(50), {"note": "x"}),
        (b"no JSON\n", {}),
    ],
)
def test_another_form_under_the_key_is_refused(
    api: Api, content: bytes, fields: dict[str, str]
) -> None:
    batch_id(submit(api, input_file(50)))
    before = settled(api)
    answer = submit(api, content, **fields)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "idempotency_key_reused"
    assert settled(api) == before


def test_a_key_is_one_act_in_both_dialects(api: Api) -> None:
    submit(api, input_file(2))
    file_id = api.store.list_files(limit=1)[0][0].id
    wish = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
    assert api.call("POST", "/v1/batches", json=wish, headers=KEY).status_code == 422


def test_without_a_key_each_form_is_a_batch(api: Api) -> None:
    first, second = (api.submitted() for _ in range(2))
    assert first != second


def test_a_refused_form_leaves_its_key_free(api: Api) -> None:
    assert submit(api, b"no JSON\n").status_code == 400
    api.assert_nothing_left()
    batch_id(submit(api, input_file(3)))


@pytest.mark.parametrize("length", [255, 256])
def test_a_key_has_a_longest_length(api: Api, length: int) -> None:
    answer = submit(api, input_file(1), {"Idempotency-Key": "k" * length})
    assert answer.status_code == (200 if length == 255 else 400)


@contextmanager
def half_sent(api: Api, content: bytes) -> Iterator[Callable[[], bytes]]:
    """A form under the key of which only a part has arrived; a call sends the rest, and returns
    the answer."""
    address = urlsplit(api.url)
    assert address.hostname
    assert address.port
    prepared = requests.Request(
        "POST",
        f"{api.url}/v1/batches",
        files={"file": ("a.jsonl", content)},
        data={"model": GUIDE_MODEL},
        headers=KEY,
    ).prepare()
    assert isinstance(prepared.body, bytes)
    body = prepared.body
    head = (
        f"POST /v1/batches HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in prepared.headers.items())
    )
    with socket.create_connection((address.hostname, address.port), timeout=120) as connection:
        connection.sendall(head.encode() + b"\r\n" + body[: len(body) // 2])
        wait_for(lambda: list(api.data.incoming.iterdir()), what="the upload has begun")

        def rest() -> bytes:
            connection.sendall(body[len(body) // 2 :])
            return b"".join(iter(lambda: connection.recv(65536), b""))

        yield rest


def test_a_repetition_while_the_first_is_under_way_may_be_repeated(api: Api) -> None:
    with half_sent(api, input_file(50)) as send_the_rest:
        early = submit(api, input_file(50))
        assert early.status_code == 409
        assert early.json()["error"]["code"] == "idempotency_key_in_use"
        assert early.headers["x-should-retry"] == "true"
        assert int(early.headers["retry-after"]) > 0
        free = submit(api, input_file(50), {"Idempotency-Key": "k-2"})
        assert send_the_rest().startswith(b"HTTP/1.1 200")
    late = batch_id(submit(api, input_file(50)))
    assert late != batch_id(free)
    assert num_batches(api) == 2


def test_the_sdk_repeats_it_by_itself(api: Api) -> None:
    sdk = Sdk(api.url)
    answers: list[bytes] = []
    with half_sent(api, input_file(50)) as send_the_rest:

        def when_refused() -> None:
            wait_for(lambda: sdk.received, what="the first refusal")
            answers.append(send_the_rest())

        finishing = Thread(target=when_refused)
        finishing.start()
        made = sdk.client.post(
            "/batches",
            cast_to=httpx.Response,
            body={"model": GUIDE_MODEL},
            files=[("file", ("a.jsonl", input_file(50)))],
            options={"headers": {"Content-Type": "multipart/form-data", **KEY}},
        )
        finishing.join()
    assert [answer.status_code for answer in sdk.received] == [409, 200]
    assert made.json()["batch_id"].encode() in answers[0]
    assert num_batches(api) == 1
    sdk.close()


def test_a_client_that_goes_away_frees_the_key(api: Api) -> None:
    with half_sent(api, input_file(50)):
        pass
    wait_for(lambda: submit(api, input_file(50)).status_code == 200, what="the key is free")
    assert num_batches(api) == 1


def test_two_servers_make_one_batch(
    start_api: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same form through both at once: the second one to tell the store yields."""
    api, other = start_api(), start_api()
    add_batch = api.store.add_batch
    found: list[str] = []

    def add_later(*rest: Any, **values: Any) -> Batch:
        found.append(batch_id(submit(other, input_file(50))))
        return add_batch(*rest, **values)

    monkeypatch.setattr(api.store, "add_batch", add_later)
    assert batch_id(submit(api, input_file(50))) == found[0]
    settled(api)
    assert num_batches(api) == 1
    assert [path.name for path in (api.data.batches / "active").iterdir()] == found
    assert len(list((api.data.batches / "input").iterdir())) == 1
    assert [path.stem for path in (api.data.batches / "logs").iterdir()] == found
