"""Files and uploads through the OpenAI SDK, against a real server."""

from __future__ import annotations

import hashlib
import secrets
import time
from pathlib import Path

import httpx
import openai
import pytest

from acceptance.conftest import Running
from support.sdk import CHAT, Sdk, jsonl, line, lines


def test_a_file_comes_back_byte_for_byte(idle_sdk: Sdk) -> None:
    content = "\ufeff{“a”: 1}\r\n\r\n\x00 no JSON at all".encode() + secrets.token_bytes(300_000)
    before = int(time.time())

    file = idle_sdk.client.files.create(file=("my file ü.jsonl", content), purpose="batch")

    assert file.id.startswith("file-")
    assert (file.object, file.purpose, file.status) == ("file", "batch", "processed")
    assert (file.filename, file.bytes) == ("my file ü.jsonl", len(content))
    assert before <= file.created_at <= time.time()
    assert file.expires_at is None
    assert idle_sdk.client.files.retrieve(file.id) == file
    assert idle_sdk.client.files.content(file.id).content == content


def test_a_part_of_a_file(idle_sdk: Sdk) -> None:
    content = secrets.token_bytes(1000)
    file_id = idle_sdk.upload(content)

    def ask(wanted: str) -> httpx.Response:
        headers = {"Range": wanted}
        return idle_sdk.client.files.content(file_id, extra_headers=headers).response

    some = ask("bytes=200-299")
    assert (some.status_code, some.content) == (206, content[200:300])
    assert some.headers["content-range"] == "bytes 200-299/1000"
    assert ask("bytes=-10").content == content[-10:]
    for meaningless in ("lines=1-2", "bytes=9-2", "nonsense"):
        whole = ask(meaningless)
        assert (whole.status_code, whole.content) == (200, content)

    sent = len(idle_sdk.sent)
    with pytest.raises(openai.APIStatusError) as refusal:
        ask("bytes=1000-")
    assert len(idle_sdk.sent) == sent + 1
    assert (refusal.value.status_code, refusal.value.code) == (416, "range_not_satisfiable")
    assert refusal.value.response.headers["content-range"] == "bytes */1000"
    assert refusal.value.request_id


def test_an_empty_file_is_a_file(idle_sdk: Sdk) -> None:
    file = idle_sdk.client.files.create(file=("empty.jsonl", b""), purpose="batch")
    assert file.bytes == 0
    assert idle_sdk.client.files.content(file.id).content == b""


def test_a_file_may_be_given_an_end(idle_sdk: Sdk) -> None:
    file = idle_sdk.client.files.create(
        file=("in.jsonl", b"{}\n"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600


@pytest.mark.parametrize("seconds", [3599, 2592001])
def test_a_life_outside_the_bounds_is_refused(idle_sdk: Sdk, seconds: int) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.client.files.create(
            file=("in.jsonl", b"{}\n"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": seconds},
        )
    assert refusal.value.param == "expires_after.seconds"


def test_a_file_of_another_purpose_is_refused(idle_sdk: Sdk) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.client.files.create(file=("in.jsonl", b"{}\n"), purpose="fine-tune")
    assert refusal.value.param == "purpose"


def test_files_are_listed_in_pages_of_either_order(idle_sdk: Sdk) -> None:
    made = [idle_sdk.upload(b"{}\n", f"{number}.jsonl") for number in range(7)]
    client = idle_sdk.client

    newest_first = [file.id for file in client.files.list(limit=3, purpose="batch")]
    assert newest_first[:7] == made[::-1]
    oldest_first = [file.id for file in client.files.list(limit=3, order="asc", purpose="batch")]
    assert oldest_first[-7:] == made
    assert sorted(newest_first) == sorted(oldest_first)

    page = client.files.list(limit=2, after=made[3])
    assert [file.id for file in page.data] == [made[2], made[1]]
    assert page.has_more
    # Other tests' results may be there.
    results = list(client.files.list(purpose="batch_output"))
    assert {file.purpose for file in results} <= {"batch_output"}
    assert not {file.id for file in results} & set(made)
    assert client.files.list(purpose="assistants").data == []


@pytest.mark.parametrize("limit", [0, 10_001])
def test_a_limit_outside_the_bounds_is_refused(idle_sdk: Sdk, limit: int) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.client.files.list(limit=limit)
    assert refusal.value.param == "limit"


def test_a_page_after_an_unknown_file_is_refused(idle_sdk: Sdk) -> None:
    with pytest.raises(openai.NotFoundError):
        idle_sdk.client.files.list(after="file-" + "0" * 24)


def test_a_deleted_file_is_gone(idle_sdk: Sdk, waiting: Running) -> None:
    file_id = idle_sdk.upload(b"{}\n")
    deleted = idle_sdk.client.files.delete(file_id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file_id, "file", True)
    for call in (
        idle_sdk.client.files.retrieve,
        idle_sdk.client.files.content,
        idle_sdk.client.files.delete,
    ):
        with pytest.raises(openai.NotFoundError):
            call(file_id)
    assert file_id not in [file.id for file in idle_sdk.client.files.list()]
    assert not waiting.site.data.input_file(file_id).exists()
    with pytest.raises(openai.NotFoundError):
        idle_sdk.create_from(file_id)


def test_the_input_of_an_unfinished_batch_stays(idle_sdk: Sdk) -> None:
    batch = idle_sdk.create(lines(2))
    with pytest.raises(openai.ConflictError) as refusal:
        idle_sdk.client.files.delete(batch.input_file_id)
    assert refusal.value.code == "file_in_use"
    assert idle_sdk.client.files.retrieve(batch.input_file_id)

    idle_sdk.client.batches.cancel(batch.id)
    idle_sdk.wait(batch)
    assert idle_sdk.client.files.delete(batch.input_file_id).deleted


# -- uploads ---------------------------------------------------------------------------------------


def test_a_large_file_arrives_in_parts(idle_sdk: Sdk, tmp_path: Path) -> None:
    content = jsonl(lines(3000))
    path = tmp_path / "large.jsonl"
    path.write_bytes(content)

    upload = idle_sdk.client.uploads.upload_file_chunked(
        file=path,
        mime_type="application/jsonl",
        purpose="batch",
        part_size=100_000,
        md5=hashlib.md5(content).hexdigest(),
    )

    assert (upload.object, upload.status) == ("upload", "completed")
    assert (upload.bytes, upload.filename) == (len(content), "large.jsonl")
    assert upload.file
    assert (upload.file.bytes, upload.file.purpose) == (len(content), "batch")
    assert idle_sdk.client.files.content(upload.file.id).content == content
    parts = [request for request in idle_sdk.sent if request.url.path.endswith("/parts")]
    assert len(parts) == len(content) // 100_000 + 1


def test_a_file_in_memory_arrives_in_parts(idle_sdk: Sdk) -> None:
    content = secrets.token_bytes(250_000)
    upload = idle_sdk.client.uploads.upload_file_chunked(
        file=content,
        filename="bytes.jsonl",
        bytes=len(content),
        mime_type="application/jsonl",
        purpose="batch",
        part_size=100_000,
    )
    assert upload.file
    assert idle_sdk.client.files.content(upload.file.id).content == content


def test_a_cut_upload_goes_on_with_the_missing_parts(idle_sdk: Sdk, waiting: Running) -> None:
    client = idle_sdk.client
    content = secrets.token_bytes(250_000)
    pieces = [content[:100_000], content[100_000:200_000], content[200_000:]]
    upload = client.uploads.create(
        bytes=len(content),
        filename="cut.jsonl",
        mime_type="application/jsonl",
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (upload.status, upload.expires_at) == ("pending", upload.created_at + 3600)
    second = client.uploads.parts.create(upload.id, data=pieces[1])
    assert (second.object, second.upload_id) == ("upload.part", upload.id)

    # A client that starts anew asks what has arrived.
    known = idle_sdk.get(f"/v1/uploads/{upload.id}/parts").json()
    assert [(part["id"], part["bytes"]) for part in known["data"]] == [(second.id, 100_000)]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.uploads.complete(upload.id, part_ids=[second.id])
    assert refusal.value.param == "part_ids"

    first = client.uploads.parts.create(upload.id, data=pieces[0])
    third = client.uploads.parts.create(upload.id, data=pieces[2])
    in_order = [first.id, second.id, third.id]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.uploads.complete(
            upload.id, part_ids=in_order[::-1], md5=hashlib.md5(content).hexdigest()
        )
    assert refusal.value.param == "md5"
    done = client.uploads.complete(
        upload.id, part_ids=in_order, md5=hashlib.md5(content).hexdigest()
    )

    assert done.file
    assert client.files.content(done.file.id).content == content
    assert done.file.expires_at == done.file.created_at + 7200
    assert not waiting.site.data.upload_dir(upload.id).exists()
    # Asked once more because the answer was lost.
    assert client.uploads.complete(upload.id, part_ids=in_order).file == done.file


def test_a_part_whose_answer_was_lost_may_be_sent_again(idle_sdk: Sdk) -> None:
    client = idle_sdk.client
    content = secrets.token_bytes(50_000)
    upload = client.uploads.create(
        bytes=len(content), filename="u", mime_type="application/jsonl", purpose="batch"
    )
    # As often as the SDK sends it by itself.
    parts = [client.uploads.parts.create(upload.id, data=content) for _ in range(3)]
    done = client.uploads.complete(upload.id, part_ids=[parts[2].id])
    assert done.file
    assert client.files.content(done.file.id).content == content


def test_an_upload_takes_no_more_than_was_announced(idle_sdk: Sdk) -> None:
    client = idle_sdk.client
    upload = client.uploads.create(
        bytes=1000, filename="u", mime_type="application/jsonl", purpose="batch"
    )
    with pytest.raises(openai.BadRequestError) as refusal:
        client.uploads.parts.create(upload.id, data=b"x" * 1001)
    assert refusal.value.param == "data"
    for _ in range(3):
        client.uploads.parts.create(upload.id, data=b"x" * 1000)
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"x")


def test_a_cancelled_upload_takes_nothing_more(idle_sdk: Sdk, waiting: Running) -> None:
    client = idle_sdk.client
    upload = client.uploads.create(
        bytes=4, filename="u", mime_type="application/jsonl", purpose="batch"
    )
    part = client.uploads.parts.create(upload.id, data=b"abcd")
    cancelled = client.uploads.cancel(upload.id)
    assert (cancelled.status, cancelled.file) == ("cancelled", None)
    assert client.uploads.cancel(upload.id).status == "cancelled"
    sent = len(idle_sdk.sent)
    with pytest.raises(openai.ConflictError) as refusal:
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert refusal.value.code == "upload_not_pending"
    with pytest.raises(openai.ConflictError):
        client.uploads.parts.create(upload.id, data=b"abcd")
    assert len(idle_sdk.sent) == sent + 2, "the SDK repeated what can't succeed"
    assert not waiting.site.data.upload_dir(upload.id).exists()


def test_a_part_of_another_upload_is_refused(idle_sdk: Sdk) -> None:
    client = idle_sdk.client
    first, second = (
        client.uploads.create(bytes=4, filename="u", mime_type="text/plain", purpose="batch")
        for _ in range(2)
    )
    part = client.uploads.parts.create(first.id, data=b"abcd")
    for part_ids in ([part.id], [part.id, part.id], ["part_" + "0" * 24]):
        with pytest.raises(openai.BadRequestError):
            client.uploads.complete(second.id, part_ids=part_ids)


def test_a_batch_runs_on_a_file_that_came_in_parts(sdk: Sdk) -> None:
    content = jsonl(line(f"p{number}") for number in range(50))
    upload = sdk.client.uploads.upload_file_chunked(
        file=content,
        filename="parts.jsonl",
        bytes=len(content),
        mime_type="application/jsonl",
        purpose="batch",
        part_size=1000,
    )
    assert upload.file
    batch = sdk.wait(sdk.create_from(upload.file.id, endpoint=CHAT))
    assert batch.request_counts
    assert (batch.status, batch.request_counts.completed) == ("completed", 50)
