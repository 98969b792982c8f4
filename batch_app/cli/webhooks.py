"""`vllm-batch webhooks …`: who is told of the end of batches, and whether that arrives."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer

from batch_app.cli.figures import ago
from batch_app.cli.options import Json
from batch_app.cli.remote import ApiKey, Server, connected, same_place
from batch_app.cli.terminal import say, show, show_json, show_table
from batch_app.client.webhooks import Delivery, Webhook, Webhooks
from batch_app.errors import BatchAppError
from batch_app.webhooks import DeliveryState

app = typer.Typer(
    help="Have the end of batches announced, and see what arrived.", no_args_is_help=True
)

LOOK_EVERY_S = 0.2


class Event(StrEnum):
    COMPLETED = "batch.completed"
    FAILED = "batch.failed"
    EXPIRED = "batch.expired"
    CANCELLED = "batch.cancelled"


WebhookId = Annotated[
    str, typer.Argument(metavar="WEBHOOK", help="Its id, as `webhooks list` shows it.")
]
Timeout = Annotated[float, typer.Option(min=0, help="Seconds to wait for what comes of it.")]


@app.command()
def create(
    url: Annotated[str, typer.Argument(help="Where a POST goes for each batch that has ended.")],
    event: Annotated[
        list[Event] | None,
        typer.Option(help="Only this one; may be given several times.", show_default="all"),
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_BATCH_WEBHOOK_SECRET",
            help="A secret of your own, whsec_ and 24 to 64 bytes in base64. Others on the machine "
            "see what stands on a command line: rather set the variable.",
            show_default="made by the server",
        ),
    ] = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Announce the end of every batch of yours. The secret is shown this once."""
    with connected(server, api_key) as client:
        made = client.webhooks.create(url, events=event, secret=secret)
    say(
        f"Webhook {made.id} for {made.url}. Keep its secret, which proves that an event is "
        "genuine: it is shown this once."
    )
    say(f"Try it: vllm-batch webhooks test {made.id}{same_place(server)}")
    if as_json:
        show_json(made.raw)
    else:
        show(made.secret or "")


@app.command("list")
def list_webhooks(as_json: Json = False, server: Server = None, api_key: ApiKey = None) -> None:
    """List webhooks, newest first, those of single batches among them."""
    with connected(server, api_key) as client:
        found = list(client.webhooks.list())
    if as_json:
        show_json([webhook.raw for webhook in found])
    elif found:
        columns = ("webhook", "state", "of", "created", "events", "url")
        show_table(columns, [_row(webhook) for webhook in found])
    else:
        say("There are no webhooks. Make one: vllm-batch webhooks create URL")


def _row(webhook: Webhook) -> tuple[str, ...]:
    every = len(webhook.events) == len(Event)
    return (
        webhook.id,
        f"disabled: {webhook.disabled_reason}" if webhook.disabled_reason else "active",
        webhook.batch_id or "every batch",
        ago(webhook.created_at),
        "all" if every else ", ".join(webhook.events),
        webhook.url,
    )


@app.command()
def deliveries(
    webhook_id: WebhookId,
    state: Annotated[
        DeliveryState | None, typer.Option(help="Only those of this state.", show_default="all")
    ] = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """List a webhook's events, newest first, and what became of each."""
    with connected(server, api_key) as client:
        found = list(client.webhooks.deliveries(webhook_id, state))
    if as_json:
        show_json([delivery.raw for delivery in found])
    elif found:
        columns = ("delivery", "state", "event", "batch", "created", "attempts", "last answer")
        show_table(
            columns,
            [
                (
                    one.id,
                    one.state,
                    one.type,
                    one.batch_id,
                    ago(one.created_at),
                    str(one.attempts),
                    _answer(one),
                )
                for one in found
            ],
        )
    else:
        say("Nothing was sent to it so far.")


def _answer(delivery: Delivery) -> str:
    return delivery.error or ("" if delivery.status_code is None else str(delivery.status_code))


@app.command("test")
def send_test(
    webhook_id: WebhookId,
    timeout: Timeout = 30.0,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Send it an event that says so, and tell whether it arrived."""
    with connected(server, api_key) as client:
        delivery = _settled(client.webhooks, client.webhooks.test(webhook_id), timeout)
    _tell(delivery, as_json=as_json)


@app.command()
def replay(
    webhook_id: WebhookId,
    delivery_id: Annotated[
        str, typer.Argument(metavar="DELIVERY", help="As `webhooks deliveries` shows it.")
    ],
    timeout: Timeout = 30.0,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Send an event once more, and tell whether it arrived."""
    with connected(server, api_key) as client:
        again = client.webhooks.replay(webhook_id, delivery_id)
        delivery = _settled(client.webhooks, again, timeout)
    _tell(delivery, as_json=as_json)


@app.command()
def remove(
    webhook_id: WebhookId, as_json: Json = False, server: Server = None, api_key: ApiKey = None
) -> None:
    """Remove a webhook and its deliveries: nothing more is sent to it."""
    with connected(server, api_key) as client:
        client.webhooks.delete(webhook_id)
    say(f"Webhook {webhook_id} is removed.")
    if as_json:
        show_json({"id": webhook_id, "deleted": True})


def _settled(webhooks: Webhooks, sent: Delivery, timeout_s: float) -> Delivery:
    """The delivery after its next attempt, or as it is when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = webhooks.deliveries(sent.webhook_id)
        now = next((one for one in found if one.id == sent.id), sent)
        # It counts an attempt as it begins, and says when the next one is due as it ends.
        is_due_anew = now.attempts > 0 and now.next_attempt_at != sent.next_attempt_at
        if now.state != DeliveryState.PENDING or is_due_anew or time.monotonic() > deadline:
            return now
        time.sleep(LOOK_EVERY_S)


def _tell(delivery: Delivery, *, as_json: bool) -> None:
    """Raises BatchAppError where it did not arrive."""
    if as_json:
        show_json(delivery.raw)
    if delivery.state != DeliveryState.DELIVERED:
        what = _answer(delivery) or "there was no attempt so far"
        raise BatchAppError(f"Event {delivery.id} did not arrive: {what}.")
    say(f"Event {delivery.id} arrived: the receiver answered {delivery.status_code}.")
