"""Transactions: how each method of the store reaches the database, and what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from batch_app import database
from batch_app.database import QueueListener
from batch_app.database.postgresql import DISK_FULL, READ_ONLY, first_line, sqlstate
from batch_app.errors import StorageFull, StoreUnavailable


class Transactions:
    """The database behind the store. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = database.connect(url)

    @property
    def shown_url(self) -> str:
        """Where the database is, without its password."""
        return database.shown(self.url)

    def migrate(self) -> None:
        """Create the tables, or bring them up to date."""
        with translated_errors():
            database.migrate(self._engine)

    def revisions(self) -> tuple[str | None, str]:
        """The version of the tables, None where there are none, and the newest. Changes nothing."""
        with translated_errors():
            return database.revisions(self._engine)

    def queue_listener(self) -> QueueListener | None:
        """What hears at once that a batch has come; None where the database can't tell."""
        return database.queue_listener(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with translated_errors(), database.reading(self._engine) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with translated_errors(), database.writing(self._engine) as connection:
            yield connection


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn what says "not now" into the project's errors; what says "never" passes."""
    try:
        yield
    except OperationalError as error:
        cause = first_line(error)
        full = "disk is full" in cause or "No space left" in cause
        if full or sqlstate(error) == DISK_FULL:
            raise StorageFull(f"The database's disk is full ({cause}).") from error
        raise StoreUnavailable(f"The database does not answer: {cause}") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise StoreUnavailable(f"The database's connection broke: {error.orig}") from error
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            raise StoreUnavailable(f"The database file can't be used: {error.orig}") from error
        if sqlstate(error) == READ_ONLY:  # a standby that nobody has made the primary yet
            raise StoreUnavailable(f"The database is read-only: {first_line(error)}") from error
        raise
    except SQLAlchemyError as error:
        if "QueuePool limit" in str(error):
            raise StoreUnavailable("All connections to the database are busy.") from error
        raise
