"""Other ways in which the OpenAI SDK is used: asynchronous, streaming, beside failures."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from batch_app.errors import StorageFull, StoreUnavailable
from integration.api_fixtures import Api
from support.sdk import CHAT, FINISHED, Sdk, jsonl, lines

pytestmark = pytest.mark.long

NO_BATCH = "batch_" + "0" * 24


def test_the_asynchronous_client_does_a_whole_batch(sdk: Sdk) -> None:
    async def life() -> tuple[str, bytes, list[str]]:
        async with AsyncOpenAI(base_url=f"{sdk.url}/v1", api_key="none") as client:
            file = await client.files.create(file=("in.jsonl", jsonl(lines(5))), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            async with asyncio.timeout(60):
                while batch.status not in FINISHED:
                    await asyncio.sleep(0.05)
                    batch = await client.batches.retrieve(batch.id)
            assert batch.output_file_id
            content = await client.files.content(batch.output_file_id)
            listed = []
            async for each in client.batches.list(limit=1):
                listed.append(each.id)
                if each.id == batch.id:
                    break
            assert listed[-1] == batch.id
            return batch.status, content.content, listed

    status, content, _ = asyncio.run(life())
    assert (status, len(content.splitlines())) == ("completed", 5)


def test_content_is_streamed_to_a_file(idle_sdk: Sdk, tmp_path: Path) -> None:
    content = secrets.token_bytes(700_000)
    file_id = idle_sdk.upload(content)
    path = tmp_path / "out"
    with idle_sdk.client.files.with_streaming_response.content(file_id) as answer:
        answer.stream_to_file(path)
    assert path.read_bytes() == content
    text = idle_sdk.upload(b"a\nb\n")
    assert list(idle_sdk.client.files.content(text).iter_lines()) == ["a", "b"]


def test_a_file_is_processed_at_once(idle_sdk: Sdk) -> None:
    file_id = idle_sdk.upload(b"{}\n")
    sent = len(idle_sdk.sent)
    assert idle_sdk.client.files.wait_for_processing(file_id).id == file_id
    assert len(idle_sdk.sent) == sent + 1


def test_published_files_can_be_deleted(sdk: Sdk) -> None:
    batch = sdk.run(lines(2))
    assert batch.output_file_id
    assert batch.output_file_id in [
        file.id for file in sdk.client.files.list(purpose="batch_output", limit=5)
    ]
    assert sdk.client.files.delete(batch.output_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.client.files.content(batch.output_file_id)
    assert sdk.get(f"/v1/batches/{batch.id}/results").status_code == 404
    assert sdk.client.batches.retrieve(batch.id) == batch
    assert sdk.client.files.content(batch.input_file_id).content == jsonl(lines(2))


def test_pages_of_nothing(start_api: Callable[..., Api]) -> None:
    sdk = Sdk(start_api().url)
    assert list(sdk.client.batches.list()) == []
    assert list(sdk.client.files.list()) == []
    assert len(sdk.sent) == 2
    body = sdk.get("/v1/batches").json()
    assert (body["first_id"], body["last_id"], body["has_more"]) == (None, None, False)
    sdk.close()


@pytest.mark.parametrize("limit", [0, 101])
def test_a_limit_of_batches_outside_the_bounds_is_refused(idle_sdk: Sdk, limit: int) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.client.batches.list(limit=limit)
    assert refusal.value.param == "limit"


def test_a_page_after_an_unknown_batch_is_refused(idle_sdk: Sdk) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        idle_sdk.client.batches.list(after=NO_BATCH)
    assert refusal.value.param == "after"


# -- the server's own troubles ---------------------------------------------------------------------


def test_a_file_that_is_too_large_is_sent_once(start_api: Callable[..., Api]) -> None:
    api = start_api(max_upload_bytes=1000)
    sdk = Sdk(api.url)
    with pytest.raises(openai.APIStatusError) as refusal:
        sdk.upload(b"x" * 1001)
    assert (refusal.value.status_code, refusal.value.code) == (413, "file_too_large")
    with pytest.raises(openai.APIStatusError) as refusal:
        sdk.client.uploads.create(
            bytes=1001, filename="u", mime_type="application/jsonl", purpose="batch"
        )
    assert (refusal.value.status_code, refusal.value.code) == (413, "file_too_large")
    assert len(sdk.sent) == 2
    assert api.store.list_files(limit=1) == ([], False)
    sdk.close()


def test_a_full_disk_is_not_asked_again(start_api: Callable[..., Api]) -> None:
    sdk = Sdk(start_api(min_free_bytes=1 << 60).url)
    with pytest.raises(openai.InternalServerError) as refusal:
        sdk.upload(b"{}\n")
    assert (refusal.value.status_code, refusal.value.code) == (507, "storage_full")
    assert len(sdk.sent) == 1
    sdk.close()


def failing(times: int, error: Exception, method: Callable[..., Any]) -> Callable[..., Any]:
    left = times

    def called(*rest: Any, **values: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error
        return method(*rest, **values)

    return called


def test_a_database_that_is_away_for_a_moment_is_asked_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdk = Sdk(api.url)
    file_id = sdk.upload(lines(1))
    away = failing(1, StoreUnavailable("locked: secret"), api.store.add_batch)
    monkeypatch.setattr(api.store, "add_batch", away)
    batch = sdk.create_from(file_id)
    assert [answer.status_code for answer in sdk.received[1:]] == [503, 200]
    assert int(sdk.received[1].headers["retry-after"]) > 0
    assert [each.id for each in sdk.client.batches.list()] == [batch.id]
    sdk.close()


def test_a_database_that_stays_away_is_a_server_error(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdk = Sdk(api.url)
    client = sdk.client.with_options(max_retries=0)
    for error, status, code in (
        (StoreUnavailable("secret"), 503, "store_unavailable"),
        (StorageFull("The database's disk is full."), 507, "storage_full"),
        (KeyError("secret"), 500, "internal_error"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(api.store, "list_batches", failing(9, error, api.store.list_batches))
            with pytest.raises(openai.InternalServerError) as refusal:
                client.batches.list()
        assert (refusal.value.status_code, refusal.value.code) == (status, code)
        assert refusal.value.type == "server_error"
        assert refusal.value.request_id
        assert "secret" not in str(refusal.value)
    sdk.close()


def test_what_is_no_form_is_not_taken(idle_sdk: Sdk) -> None:
    for answer in (
        idle_sdk.http.post(f"{idle_sdk.url}/v1/files", json={"purpose": "batch"}),
        idle_sdk.http.post(f"{idle_sdk.url}/v1/uploads", content=b"{}"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            415,
            "unsupported_media_type",
        )
    with pytest.raises(openai.NotFoundError):
        idle_sdk.client.post("/nothing", cast_to=httpx.Response)
