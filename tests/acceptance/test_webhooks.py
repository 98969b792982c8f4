"""Webhooks, end to end: a real server and worker, a real receiver, the OpenAI SDK at both ends."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from acceptance.conftest import Running
from support.receiver import Call, Receiver
from support.sdk import Sdk, busy_worker, jsonl, line, lines
from support.site import Site, echo_line
from support.waiting import wait_for


def unwrapped(call: Call, secret: str) -> tuple[str, str]:
    """The type, and the batch's id."""
    client = OpenAI(api_key="none", webhook_secret=secret)
    event = client.webhooks.unwrap(call.body, call.headers)
    assert event.object == "event"
    assert event.type in ("batch.completed", "batch.failed", "batch.expired", "batch.cancelled")
    return event.type, event.data.id


def with_webhook(receiver: Receiver) -> dict[str, Any]:
    return {"extra_body": {"webhook_url": receiver.url}}


def test_the_sdk_unwraps_all_four(sdk: Sdk, working: Running, receiver: Receiver) -> None:
    blocker = busy_worker(sdk)
    expiring = sdk.create(lines(3), completion_window="1h", **with_webhook(receiver))
    sdk.wait(expiring, "in_progress")
    working.site.set_row("batches", expiring.id, expires_at=datetime.now(UTC))
    cancelled = sdk.create(lines(3), **with_webhook(receiver))
    sdk.client.batches.cancel(cancelled.id)
    failed = sdk.create(b"no JSON\n", **with_webhook(receiver))
    sdk.client.batches.cancel(blocker.id)
    completed = sdk.create(lines(3), **with_webhook(receiver))
    wanted = {
        batch.id: (kind, batch.webhook["secret"])  # type: ignore[attr-defined]
        for kind, batch in {
            "batch.expired": expiring,
            "batch.cancelled": cancelled,
            "batch.failed": failed,
            "batch.completed": completed,
        }.items()
    }
    assert len({secret for _, secret in wanted.values()}) == 4
    receiver.answers = [500]  # one of them has to be told twice
    calls = receiver.wait_for_calls(5)
    seen = set()
    for call in calls:
        batch_id = httpx.Response(200, content=call.body).json()["data"]["id"]
        kind, secret = wanted[batch_id]
        assert unwrapped(call, secret) == (kind, batch_id)
        seen.add(kind)
        assert sdk.client.batches.retrieve(batch_id).status == kind.removeprefix("batch.")
    assert len(seen) == 4


def test_a_form_names_its_webhook_and_shows_its_secret_once(
    working: Running, receiver: Receiver
) -> None:
    own = "whsec_" + "c2VjcmV0" * 5
    with httpx.Client(base_url=working.url, timeout=120) as http:
        form = {"model": "sim", "webhook_url": receiver.url, "webhook_secret": own}
        answer = http.post("/v1/batches", data=form, files={"file": jsonl(lines(2, "sim"))})
        assert answer.status_code == 200
        batch = answer.json()
        assert batch["webhook"]["secret"] == own
        assert batch["webhook"]["batch_id"] == batch["batch_id"]
        (call,) = receiver.wait_for_calls(1)
        assert unwrapped(call, own) == ("batch.completed", batch["batch_id"])
        again = http.get(f"/v1/batches/{batch['batch_id']}").json()
        assert again["status"] == "completed"
        assert again["webhook"] is None
        (found,) = http.get("/v1/webhooks", params={"batch_id": batch["batch_id"]}).json()["data"]
        assert found == batch["webhook"] | {"secret": None}

        path = f"/v1/webhooks/{found['id']}/deliveries"
        wait_for(lambda: http.get(path, params={"state": "delivered"}).json()["data"])
        (delivery,) = http.get(path).json()["data"]
        assert (delivery["attempts"], delivery["status_code"]) == (1, 200)
        assert delivery["type"] == "batch.completed"
        assert http.post(f"{path}/{delivery['id']}/replay").json()["state"] == "pending"
        first, second = receiver.wait_for_calls(2)
        assert first.body == second.body
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery["id"]
        assert http.delete(f"/v1/webhooks/{found['id']}").json()["deleted"] is True
        assert http.get(path).status_code == 404


def test_a_webhook_of_ones_own_hears_of_every_batch(working: Running, receiver: Receiver) -> None:
    with httpx.Client(base_url=working.url, timeout=120) as http:
        made = http.post(
            "/v1/webhooks", json={"url": receiver.url, "events": ["batch.completed"]}
        ).json()
        try:
            assert http.get(f"/v1/webhooks/{made['id']}").json() == made | {"secret": None}
            tested = http.post(f"/v1/webhooks/{made['id']}/test").json()
            (call,) = receiver.wait_for_calls(1)
            assert unwrapped(call, made["secret"]) == ("batch.completed", tested["batch_id"])
            assert http.get(f"/v1/batches/{tested['batch_id']}").status_code == 404
            receiver.calls.clear()
            ids = set()
            for _ in range(2):
                form = {"model": "sim"}
                answer = http.post("/v1/batches", data=form, files={"file": jsonl(lines(1, "sim"))})
                ids.add(answer.json()["batch_id"])
            calls = receiver.wait_for_calls(2)
            assert {unwrapped(call, made["secret"]) for call in calls} == {
                ("batch.completed", batch_id) for batch_id in ids
            }
        finally:
            http.delete(f"/v1/webhooks/{made['id']}")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://169.254.169.254/", "invalid_webhook_url"),
        ("http://example.org/", "invalid_webhook_url"),
        ("no url", "invalid_webhook_url"),
    ],
)
def test_a_target_that_is_not_allowed_makes_no_batch(
    idle_sdk: Sdk, waiting: Running, url: str, code: str
) -> None:
    file_id = idle_sdk.upload(lines(1))
    before = len(idle_sdk.client.batches.list().data)
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.create_from(file_id, extra_body={"webhook_url": url})
    assert refusal.value.code == code
    assert refusal.value.param == "webhook_url"
    answer = httpx.post(
        f"{waiting.url}/v1/batches",
        data={"model": "sim", "webhook_url": url},
        files={"file": jsonl(lines(1, "sim"))},
        timeout=120,
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert len(idle_sdk.client.batches.list().data) == before


def test_a_retry_tells_the_same_host(sdk: Sdk, receiver: Receiver) -> None:
    content = [line("good"), line("too-long", "tiny-context", "x " * 50)]
    batch = sdk.create(content, **with_webhook(receiver))
    done = sdk.wait(batch)
    assert done.request_counts
    assert done.request_counts.failed == 1
    answer = sdk.http.post(f"{sdk.url}/v1/batches/{batch.id}/retry")
    secret = batch.webhook["secret"]  # type: ignore[attr-defined]
    told = [unwrapped(call, secret) for call in receiver.wait_for_calls(2)]
    assert told == [("batch.completed", batch.id), ("batch.completed", answer.json()["id"])]


def test_what_ends_while_no_server_runs_is_told_by_the_next(
    tmp_path: Path, receiver: Receiver
) -> None:
    site = Site(tmp_path, webhook_allowed_hosts="127.0.0.1", min_free_bytes=0, poll_interval_s=0.2)
    try:
        url = site.start_server()
        server = site.last_process
        made = httpx.post(f"{url}/v1/webhooks", json={"url": receiver.url}, timeout=120).json()
        batch_id = site.submit([echo_line(number) for number in range(3)], "sim")
        server.kill()
        server.wait(timeout=120)
        site.start_worker()
        site.wait_until_done(batch_id)
        assert receiver.calls == []
        site.start_server()
        (call,) = receiver.wait_for_calls(1)
        assert unwrapped(call, made["secret"]) == ("batch.completed", batch_id)
    finally:
        site.close()
