"""`vllm-batch webhooks`, on a real server and a real receiver."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from acceptance.conftest import Running
from batch_app.cli.webhooks import Event
from batch_app.client import BatchClient
from batch_app.errors import NotFound
from batch_app.webhooks import EVENT_TYPES
from support.receiver import Receiver
from support.sdk import lines
from support.shell import Shell
from support.waiting import wait_for


def delivered(shell: Shell, webhook_id: str) -> dict[str, Any]:
    """What has arrived, by batch."""
    asked = ("webhooks", "deliveries", webhook_id, "--state", "delivered", "--json")
    return {one["batch_id"]: one for one in json.loads(shell(*asked).out)}


def test_from_making_one_to_removing_it(shell: Shell, receiver: Receiver) -> None:
    made = shell("webhooks", "create", receiver.url, "--event", "batch.completed")
    assert made.code == 0, made.err
    secret = made.out.strip()
    assert secret.startswith("whsec_")
    webhook_id = made.err.split()[1]
    assert f"vllm-batch webhooks test {webhook_id}" in made.err

    listed = shell("webhooks", "list")
    (row,) = [line for line in listed.lines if webhook_id in line]
    assert "active" in row
    assert "every batch" in row
    assert receiver.url in row
    assert secret not in listed.out
    assert shell("webhooks", "deliveries", webhook_id).err == "Nothing was sent to it so far.\n"

    tested = shell("webhooks", "test", webhook_id)
    assert tested.code == 0, tested.err
    assert "arrived: the receiver answered 200" in tested.err
    (call,) = receiver.calls
    client = OpenAI(api_key="none", webhook_secret=secret)
    assert client.webhooks.unwrap(call.body, call.headers).type == "batch.completed"

    receiver.answers = [500]
    refused = shell("webhooks", "test", webhook_id)
    assert refused.code == 1
    assert "did not arrive: " in refused.err
    assert "500" in refused.err.partition("did not arrive: ")[2]

    batch_id = shell.submitted(lines(2, "sim"))
    told = wait_for(lambda: delivered(shell, webhook_id).get(batch_id), what="it is told")
    again = shell("webhooks", "replay", webhook_id, told["id"], "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["state"] == "delivered"
    assert receiver.wait_for_calls(4)[-1].headers["webhook-id"] == told["id"]
    table = shell("webhooks", "deliveries", webhook_id, "--state", "failed")
    assert "500" in table.lines[1].rsplit("  ", 1)[1]
    assert batch_id not in table.out

    assert shell("webhooks", "remove", webhook_id).err == f"Webhook {webhook_id} is removed.\n"
    assert webhook_id not in shell("webhooks", "list").out
    gone = shell("webhooks", "test", webhook_id)
    assert gone.code == 4
    assert "No such webhook" in gone.err


def test_what_the_server_does_not_do_is_said(shell: Shell) -> None:
    inside = shell("webhooks", "create", "https://169.254.169.254/")
    assert inside.code != 0
    assert inside.out == ""
    assert "not a public address" in inside.err
    assert shell("webhooks", "create", "https://example.org/", "--event", "end").code == 2


def test_an_event_of_every_kind_may_be_asked_for() -> None:
    assert sorted(Event) == sorted(EVENT_TYPES)


def test_from_a_program(working: Running, receiver: Receiver) -> None:
    with BatchClient(working.url) as client:
        one = client.webhooks.create(receiver.url)
        assert one.secret
        assert one.events == EVENT_TYPES
        batch = client.submit(lines(1, "sim"), "sim", webhook_url=receiver.url)
        (own,) = client.webhooks.list(batch.id)
        assert (own.batch_id, own.secret) == (batch.id, None)
        client.wait(batch)
        receiver.wait_for_calls(2)
        client.webhooks.delete(one.id)
        with pytest.raises(NotFound):
            list(client.webhooks.deliveries(one.id))
