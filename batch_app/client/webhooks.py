"""Webhooks of a server: who is told of the end of batches, and what became of each event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from batch_app.client.connection import Connection

PAGE = 100


@dataclass(frozen=True, slots=True)
class Webhook:
    """A URL that is told. `batch_id`: of the only batch that it is told of, if it is one's own.

    `secret` is there where it was made, and in no later answer. `disabled_reason`: why nothing is
    sent to it any more.
    """

    id: str
    url: str
    events: tuple[str, ...]
    batch_id: str | None
    created_at: datetime
    disabled_reason: str | None
    secret: str | None
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way. `state`: `pending`, `delivered` or `failed`; `error` says what was wrong
    with the last attempt."""

    id: str
    webhook_id: str
    batch_id: str
    type: str
    state: str
    created_at: datetime
    attempts: int
    next_attempt_at: datetime | None
    status_code: int | None
    error: str | None
    raw: Mapping[str, Any] = field(repr=False)


class Webhooks:
    """`BatchClient.webhooks`. Calls raise what that one's do; NotFound for an unknown id."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self, url: str, *, events: Sequence[str] | None = None, secret: str | None = None
    ) -> Webhook:
        """Have the end of every batch of yours announced at `url`; `events`: only these.

        Raises:
            BadRequest: the server does not send there, or the secret is none.
            TooMany: there are as many as there may be.
        """
        wish: dict[str, Any] = {"url": url}
        if events:
            wish["events"] = list(events)
        if secret is not None:
            wish["secret"] = secret
        # Repeated, it would make two.
        return _webhook(self._connection.json("POST", "/v1/webhooks", body=wish, repeat=False))

    def list(self, batch_id: str | None = None) -> Iterator[Webhook]:
        """Newest first, those of single batches among them; or only that of one batch."""
        params = {} if batch_id is None else {"batch_id": batch_id}
        return map(_webhook, self._pages("/v1/webhooks", params))

    def delete(self, webhook_id: str) -> None:
        """Nothing more is sent to it. Its deliveries go with it."""
        self._connection.json("DELETE", f"/v1/webhooks/{webhook_id}")

    def test(self, webhook_id: str) -> Delivery:
        """Send it an event of no batch. What comes of it, its deliveries say a moment later."""
        return _delivery(self._connection.json("POST", f"/v1/webhooks/{webhook_id}/test"))

    def deliveries(self, webhook_id: str, state: str | None = None) -> Iterator[Delivery]:
        """Its events, newest first; those of one state, if given."""
        params = {} if state is None else {"state": state}
        return map(_delivery, self._pages(f"/v1/webhooks/{webhook_id}/deliveries", params))

    def replay(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send an event once more, under the same id."""
        path = f"/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay"
        return _delivery(self._connection.json("POST", path))

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        asked = {"limit": PAGE, **params}
        while True:
            page = self._connection.json("GET", path, params=asked)
            yield from page["data"]
            if not page["has_more"]:
                return
            asked["after"] = page["last_id"]


def _webhook(body: Mapping[str, Any]) -> Webhook:
    return Webhook(
        id=body["id"],
        url=body["url"],
        events=tuple(body["events"]),
        batch_id=body["batch_id"],
        created_at=_moment(body["created_at"]),
        disabled_reason=body["disabled_reason"],
        secret=body["secret"],
        raw=body,
    )


def _delivery(body: Mapping[str, Any]) -> Delivery:
    following = body["next_attempt_at"]
    return Delivery(
        id=body["id"],
        webhook_id=body["webhook_id"],
        batch_id=body["batch_id"],
        type=body["type"],
        state=body["state"],
        created_at=_moment(body["created_at"]),
        attempts=body["attempts"],
        next_attempt_at=None if following is None else _moment(following),
        status_code=body["status_code"],
        error=body["error"],
        raw=body,
    )


def _moment(unix_s: int) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)
