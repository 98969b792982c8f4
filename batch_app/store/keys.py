"""API keys in the store. A key's row stays for ever: what it made names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, or_, select, update
from sqlalchemy.engine import Connection

from batch_app.database import api_keys
from batch_app.errors import NotFound
from batch_app.keys import ApiKey, Scope
from batch_app.store.transactions import Transactions


class KeyStore(Transactions):
    def add_key(self, key: ApiKey) -> None:
        values = asdict(key) | {"scopes": ",".join(sorted(key.scopes))}
        with self._write() as connection:
            connection.execute(insert(api_keys).values(values))

    def get_key(self, key_id: str) -> ApiKey:
        """Raises NotFound."""
        with self._read() as connection:
            return _get_key(connection, key_id)

    def list_keys(self) -> list[ApiKey]:
        """All that were ever made, oldest first."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        with self._read() as connection:
            return [_to_key(row) for row in connection.execute(query)]

    def has_keys(self) -> bool:
        """Whether a key was ever made, also one that opens nothing any more."""
        with self._read() as connection:
            return connection.scalar(select(api_keys.c.id).limit(1)) is not None

    def revoke_key(self, key_id: str, now: datetime) -> ApiKey:
        """End a key for good; doing it twice is harmless. Raises NotFound."""
        with self._write() as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id)
                .where(api_keys.c.revoked_at.is_(None))
                .values(revoked_at=now)
            )
            return _get_key(connection, key_id)

    def note_key_uses(self, uses: Mapping[str, datetime]) -> None:
        """When keys, by their ids, were last used."""
        with self._write() as connection:
            for key_id, used_at in uses.items():
                last = api_keys.c.last_used_at
                connection.execute(
                    update(api_keys)
                    .where(api_keys.c.id == key_id)
                    .where(or_(last.is_(None), last < used_at))
                    .values(last_used_at=used_at)
                )


def _get_key(connection: Connection, key_id: str) -> ApiKey:
    row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).first()
    if row is None:
        raise NotFound(f"No such key: {key_id}", param="key_id")
    return _to_key(row)


def _to_key(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    values["scopes"] = frozenset(Scope(scope) for scope in values["scopes"].split(","))
    return ApiKey(**values)
