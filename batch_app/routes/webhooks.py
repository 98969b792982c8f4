"""Webhooks: making, listing and removing them, and what became of their events.

One that belongs to a single batch is made with it (`webhook_url` of `POST /v1/batches`).
"""

from __future__ import annotations

import re

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from batch_app.errors import BadRequest, NotFound
from batch_app.routes.answers import json_answer, json_schema, refusals
from batch_app.routes.bodies import read_json
from batch_app.routes.services import (
    Services,
    caller,
    checked_batch_id,
    note_object,
    services,
)
from batch_app.webhook_targets import requested_webhook
from batch_app.webhooks import DeliveryState
from batch_app.wire.webhooks import (
    DeletedWebhookBody,
    DeliveryBody,
    DeliveryListBody,
    WebhookBody,
    WebhookCreate,
    WebhookListBody,
    delivery_body,
    delivery_list_body,
    webhook_body,
    webhook_list_body,
)

router = APIRouter(tags=["webhooks"])

MAX_LIMIT = 100
DEFAULT_LIMIT = 20
_WEBHOOK_ID = re.compile(r"webhook_[0-9a-f]{24}")
_EVENT_ID = re.compile(r"evt_[0-9a-f]{24}")
_STATES = tuple(state.value for state in DeliveryState)
_LIMIT = Query(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT)
_AFTER = Query(None, description="The last id of the page before.")


@router.post(
    "/v1/webhooks",
    response_model=WebhookBody,
    responses=refusals(400, 413, 415, 429, 503, 507),
    openapi_extra={"requestBody": {"required": True, "content": json_schema(WebhookCreate)}},
)
async def create_webhook(request: Request) -> Response:
    """Have the end of every batch of yours announced. The answer shows the secret, this once."""
    own = services(request)
    wish, _ = await read_json(request, WebhookCreate)
    webhook = requested_webhook(
        own.settings,
        wish.url,
        own.clock(),
        owner=caller(request).owner,
        secret=wish.secret,
        events=wish.events,
    )
    await run_in_threadpool(own.store.add_webhook, webhook, max_webhooks=own.settings.max_webhooks)
    note_object(request, webhook.id)
    return json_answer(webhook_body(webhook, with_secret=True))


@router.get("/v1/webhooks", response_model=WebhookListBody, responses=refusals(400, 404, 503))
def list_webhooks(
    request: Request,
    limit: int = _LIMIT,
    after: str | None = _AFTER,
    batch_id: str | None = Query(None, description="Only the one that was made with this batch."),
) -> Response:
    """Your webhooks, newest first, those of single batches among them."""
    page, has_more = services(request).store.list_webhooks(
        limit=limit,
        after=None if after is None else _checked_webhook_id(after),
        batch_id=None if batch_id is None else checked_batch_id(batch_id),
        seen_by=caller(request),
    )
    return json_answer(webhook_list_body(page, has_more))


@router.get(
    "/v1/webhooks/{webhook_id}", response_model=WebhookBody, responses=refusals(400, 404, 503)
)
def get_webhook(request: Request, webhook_id: str) -> Response:
    """What is known of a webhook, but for its secret."""
    own = services(request)
    found = own.store.get_webhook(_checked_webhook_id(webhook_id), seen_by=caller(request))
    return json_answer(webhook_body(found))


@router.delete(
    "/v1/webhooks/{webhook_id}",
    response_model=DeletedWebhookBody,
    responses=refusals(400, 404, 503),
)
def delete_webhook(request: Request, webhook_id: str) -> Response:
    """Remove a webhook, with all its deliveries; nothing more is sent to it."""
    own = services(request)
    own.store.delete_webhook(_checked_webhook_id(webhook_id), seen_by=caller(request))
    return json_answer(DeletedWebhookBody(id=webhook_id))


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries",
    response_model=DeliveryListBody,
    responses=refusals(400, 404, 503),
)
def list_deliveries(
    request: Request,
    webhook_id: str,
    limit: int = _LIMIT,
    after: str | None = _AFTER,
    state: str | None = Query(None, description=f"One of: {', '.join(_STATES)}."),
) -> Response:
    """The events of a webhook, newest first, and what became of each."""
    if state is not None and state not in _STATES:
        raise BadRequest(
            f"There is no state {state[:64]!r}. There are: {', '.join(_STATES)}.", param="state"
        )
    page, has_more = services(request).store.list_deliveries(
        _checked_webhook_id(webhook_id),
        limit=limit,
        after=None if after is None else _checked_event_id(after),
        state=None if state is None else DeliveryState(state),
        seen_by=caller(request),
    )
    return json_answer(delivery_list_body(page, has_more))


@router.post(
    "/v1/webhooks/{webhook_id}/test", response_model=DeliveryBody, responses=refusals(400, 404, 503)
)
def test_webhook(request: Request, webhook_id: str) -> Response:
    """Send an event that says `"test": true`, of a batch that doesn't exist; its delivery says what
    came of it. It is tried once, and takes the place of the last one. A webhook that was disabled
    is enabled again."""
    own = services(request)
    event = own.store.test_webhook(
        _checked_webhook_id(webhook_id), own.clock(), seen_by=caller(request)
    )
    own.sending.wake()
    return json_answer(delivery_body(event))


@router.post(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay",
    response_model=DeliveryBody,
    responses=refusals(400, 404, 503),
)
def replay_delivery(request: Request, webhook_id: str, delivery_id: str) -> Response:
    """Send an event once more, under the same id. A webhook that was disabled is enabled again."""
    own: Services = services(request)
    again = own.store.replay_delivery(
        _checked_webhook_id(webhook_id),
        _checked_event_id(delivery_id),
        own.clock(),
        seen_by=caller(request),
    )
    own.sending.wake()
    return json_answer(delivery_body(again))


def _checked_webhook_id(webhook_id: str) -> str:
    if not _WEBHOOK_ID.fullmatch(webhook_id):
        raise NotFound(f"No such webhook: {webhook_id[:64]!r}", param="webhook_id")
    return webhook_id


def _checked_event_id(delivery_id: str) -> str:
    if not _EVENT_ID.fullmatch(delivery_id):
        raise NotFound(f"No such delivery: {delivery_id[:64]!r}", param="delivery_id")
    return delivery_id
