"""What the OpenAI SDK's callers see of refusals, ids, keys, and batches of the other dialect."""

from __future__ import annotations

import secrets
from typing import Any

import openai
import pytest
from openai.types import Batch

from support.sdk import CHAT, Sdk, ids, jsonl, line, lines

NO_BATCH, NO_FILE = "batch_" + "0" * 24, "file-" + "0" * 24


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_id", [NO_BATCH, "batch_1", "../../etc/passwd", "x" * 500])
def test_an_unknown_batch_is_not_found(idle_sdk: Sdk, batch_id: str) -> None:
    for call in (idle_sdk.client.batches.retrieve, idle_sdk.client.batches.cancel):
        with pytest.raises(openai.NotFoundError) as refusal:
            call(batch_id)
        assert refusal.value.type == "not_found_error"


def test_an_unknown_file_is_not_found(idle_sdk: Sdk) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        idle_sdk.create_from(NO_FILE)
    assert (refusal.value.code, refusal.value.type) == ("not_found", "not_found_error")
    with pytest.raises(openai.NotFoundError):
        idle_sdk.client.files.content(NO_FILE)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"metadata": {f"k{number}": "v" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
        ({"extra_body": {"priority": 101}}, "priority"),
        ({"extra_body": {"endpoint": None}}, "endpoint"),
    ],
)
def test_a_wish_out_of_bounds_names_its_field(
    idle_sdk: Sdk, wish: dict[str, Any], param: str
) -> None:
    file_id = idle_sdk.upload(lines(1))
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.create_from(file_id, **wish)
    assert refusal.value.param
    assert refusal.value.param.startswith(param)
    assert refusal.value.type == "invalid_request_error"


def test_a_published_file_is_no_input(sdk: Sdk) -> None:
    batch = sdk.run(lines(1))
    assert batch.output_file_id
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.create_from(batch.output_file_id)
    assert refusal.value.param == "input_file_id"


def test_a_batch_needs_its_file_and_endpoint(idle_sdk: Sdk) -> None:
    answer = idle_sdk.http.post(f"{idle_sdk.url}/v1/batches", json={"endpoint": CHAT})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "input_file_id")


# -- ids and keys ----------------------------------------------------------------------------------


def test_every_answer_has_a_request_id(idle_sdk: Sdk) -> None:
    batch = idle_sdk.create(lines(1))
    raw = idle_sdk.client.batches.with_raw_response.retrieve(batch.id)
    assert raw.request_id
    with pytest.raises(openai.NotFoundError) as refusal:
        idle_sdk.client.batches.retrieve(NO_BATCH)
    assert refusal.value.request_id
    idle_sdk.get("/nothing/here")
    idle_sdk.get(f"/v1/files/{batch.input_file_id}/content")
    request_ids = [answer.headers["x-request-id"] for answer in idle_sdk.received]
    assert len(set(request_ids)) == len(idle_sdk.received) == 6
    mine = idle_sdk.get("/v1/models", headers={"x-request-id": "mine-7"})
    assert mine.headers["x-request-id"] == "mine-7"


def test_the_same_key_makes_the_same_batch(idle_sdk: Sdk) -> None:
    file_id = idle_sdk.upload(lines(1))
    headers = {"Idempotency-Key": secrets.token_hex(8)}
    first, again = (idle_sdk.create_from(file_id, extra_headers=headers) for _ in range(2))
    assert again.id == first.id
    sent = len(idle_sdk.sent)
    with pytest.raises(openai.UnprocessableEntityError) as refusal:
        idle_sdk.create_from(file_id, extra_headers=headers, completion_window="7d")
    assert refusal.value.code == "idempotency_key_reused"
    assert len(idle_sdk.sent) == sent + 1
    other = {"Idempotency-Key": secrets.token_hex(8)}
    assert idle_sdk.create_from(file_id, extra_headers=other).id != first.id
    # Also when the file is gone since.
    idle_sdk.client.batches.cancel(first.id)
    with pytest.raises(openai.BadRequestError):
        idle_sdk.create_from(file_id, extra_headers={"Idempotency-Key": "k" * 256})


def test_the_same_key_makes_one_retry(sdk: Sdk) -> None:
    batch = sdk.run([line("a", "tiny-context", "word " * 9)])
    options = {"headers": {"Idempotency-Key": secrets.token_hex(8)}}
    path = f"/batches/{batch.id}/retry"
    first, again = (sdk.client.post(path, cast_to=Batch, options=options) for _ in range(2))
    assert first.id == again.id != batch.id
    other = sdk.client.post(path, cast_to=Batch)
    assert other.id != first.id
    for made in (first, other):
        sdk.wait(made)


# -- both dialects on one batch --------------------------------------------------------------------


def submit_native(sdk: Sdk, content: bytes, model: str = "sim") -> str:
    answer = sdk.http.post(
        f"{sdk.url}/v1/batches", files={"file": ("native.jsonl", content)}, data={"model": model}
    )
    assert answer.status_code == 200, answer.text
    batch_id = answer.json()["batch_id"]
    assert isinstance(batch_id, str)
    return batch_id


def test_an_openai_batch_seen_by_the_native_dialect(sdk: Sdk) -> None:
    batch = sdk.create(lines(30))
    early = sdk.get(f"/v1/batches/{batch.id}", params={"format": "native"}).json()
    assert early["batch_id"] == batch.id
    done = sdk.wait(batch)

    native = sdk.get(f"/v1/batches/{batch.id}", params={"format": "native"}).json()
    assert (native["status"], native["model"]) == ("completed", "sim")
    assert native["progress"] == {
        "total": 30,
        "completed": 30,
        "failed": 0,
        "truncated": 0,
        "percent": 100.0,
    }
    results = sdk.get(native["results_url"])
    assert done.output_file_id
    assert results.content == sdk.client.files.content(done.output_file_id).content
    assert "Completed" in sdk.get(f"/v1/batches/{batch.id}/logs").text
    assert sdk.get(f"/v1/batches/{batch.id}").json()["object"] == "batch"


def test_a_native_batch_seen_by_the_sdk(sdk: Sdk) -> None:
    batch_id = submit_native(sdk, jsonl(lines(10)))
    assert "batch_id" in sdk.get(f"/v1/batches/{batch_id}").json()

    def seen() -> Batch:
        return sdk.client.batches.retrieve(batch_id, extra_query={"format": "openai"})

    assert seen().object == "batch"
    listed = {batch.id: batch for batch in sdk.client.batches.list(limit=5).data}
    assert listed[batch_id].input_file_id == seen().input_file_id
    while seen().status != "completed":
        sdk.get(f"/v1/batches/{batch_id}/logs", params={"follow": "true"})  # until it has finished
    done = seen()
    assert done.completed_at
    assert ids(sdk.results(done.output_file_id)) == [f"r{number}" for number in range(10)]
    cancelled = sdk.http.post(f"{sdk.url}/v1/batches/{batch_id}/cancel?format=openai")
    assert cancelled.status_code == 409


def test_the_list_carries_both_views(idle_sdk: Sdk) -> None:
    openai_id = idle_sdk.create(lines(1)).id
    native_id = submit_native(idle_sdk, jsonl(lines(1)))
    page = idle_sdk.get("/v1/batches", params={"limit": 2}).json()
    assert [batch["id"] for batch in page["data"]] == [native_id, openai_id]
    assert [batch["batch_id"] for batch in page["batches"]] == [native_id, openai_id]
    assert (page["object"], page["count"], page["has_more"]) == ("list", 2, True)
    assert (page["first_id"], page["last_id"]) == (native_id, openai_id)


def test_the_models_are_listed_for_the_sdk(idle_sdk: Sdk) -> None:
    models = {model.id: model for model in idle_sdk.client.models.list()}
    assert {"sim", "slow"} <= set(models)
    assert models["sim"].object == "model"
    assert idle_sdk.client.models.retrieve("sim") == models["sim"]
    with pytest.raises(openai.NotFoundError) as refusal:
        idle_sdk.client.models.retrieve("gpt-4o")
    assert refusal.value.code == "model_not_found"
    body = idle_sdk.get("/v1/models").json()
    assert [entry["model"] for entry in body["models"]] == [entry["id"] for entry in body["data"]]
