"""Sign-ins to the dashboard. What the browser holds is known here by its SHA-256 only."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import insert, select

from batch_app.database import sessions
from batch_app.errors import NotFound
from batch_app.keys import Session
from batch_app.store.transactions import Transactions


class SessionStore(Transactions):
    def add_session(self, session: Session, now: datetime) -> None:
        """Also forgets those that have run out."""
        with self._write() as connection:
            connection.execute(sessions.delete().where(sessions.c.expires_at <= now))
            connection.execute(
                insert(sessions).values(
                    digest=session.digest,
                    key_id=session.key_id,
                    created_at=now,
                    expires_at=session.expires_at,
                )
            )

    def get_session(self, digest: str) -> Session:
        """Raises NotFound."""
        query = select(sessions.c.digest, sessions.c.key_id, sessions.c.expires_at)
        with self._read() as connection:
            row = connection.execute(query.where(sessions.c.digest == digest)).first()
        if row is None:
            raise NotFound("No such session.")
        return Session(**row._mapping)

    def end_session(self, digest: str) -> None:
        """Doing it twice is harmless."""
        with self._write() as connection:
            connection.execute(sessions.delete().where(sessions.c.digest == digest))
