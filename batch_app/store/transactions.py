"""Transactions: how each method of the store reaches the database, and what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from batch_app import database
from batch_app.database import QueueListener
from batch_app.database.postgresql import DISK_FULL, READ_ONLY, first_line, sqlstate
from batch_app.errors import StorageFull, StoreLost, StoreUnavailable
from batch_app.identity import PathIdentity

#: What SQLite, and PostgreSQL by its codes, say of a column or a table that isn't there.
_OTHER_TABLES = ("no such column", "no such table", "has no column")
_UNDEFINED = frozenset({"42703", "42P01"})


class Transactions:
    """The database behind the store. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = database.connect(url)
        self._path = database.sqlite_path(url)
        self._identity: PathIdentity | None = None

    @property
    def shown_url(self) -> str:
        """Where the database is, without its password."""
        return database.shown(self.url)

    def migrate(self) -> None:
        """Create the tables, or bring them up to date."""
        with translated_errors():
            database.migrate(self._engine)
        self._remember()

    def revisions(self) -> tuple[str | None, str]:
        """The version of the tables, None where there are none, and the newest. Changes nothing."""
        with translated_errors():
            return database.revisions(self._engine)

    def queue_listener(self) -> QueueListener | None:
        """What hears at once that a batch has come; None where the database can't tell."""
        return database.queue_listener(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def require_same(self) -> None:
        """Raises StoreLost where the file that was opened is not in its place any more: what is
        written to it would be lost, and whoever opens it anew gets another one."""
        change = self._identity.change() if self._identity is not None else None
        if change is not None:
            raise StoreLost(
                f"The database file was {change} while this process ran: what is written now would "
                "be lost. Put the file back, or stop the API server and the worker, restore a "
                "back-up (vllm-batch restore) and start them again."
            )

    def require_tables(self) -> None:
        """Raises StoreLost where the tables are of another version than this program's."""
        present, newest = self.revisions()
        if present != newest:
            raise StoreLost(
                f"The database's tables are of version {present}, this program's of {newest}: "
                "another version of the program has used it meanwhile. Restart the API server and "
                "the worker with that version."
            )

    def _remember(self) -> None:
        if self._path is not None and self._identity is None and self._path.exists():
            self._identity = PathIdentity.of(self._path)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        self.require_same()
        with translated_errors(), database.reading(self._engine) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        self.require_same()
        with translated_errors(), database.writing(self._engine) as connection:
            yield connection


def _other_tables(cause: str) -> StoreLost:
    return StoreLost(
        f"The database has other tables than this version of the program ({cause}). Restart the "
        "API server and the worker: the start says what to do."
    )


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
        if any(words in cause for words in _OTHER_TABLES):
            raise _other_tables(cause) from error
        raise StoreUnavailable(f"The database does not answer: {cause}") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise StoreUnavailable(f"The database's connection broke: {error.orig}") from error
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            raise StoreUnavailable(f"The database file can't be used: {error.orig}") from error
        if sqlstate(error) in _UNDEFINED:
            raise _other_tables(first_line(error)) from error
        if sqlstate(error) == READ_ONLY:  # a standby that nobody has made the primary yet
            raise StoreUnavailable(f"The database is read-only: {first_line(error)}") from error
        raise
    except SQLAlchemyError as error:
        if "QueuePool limit" in str(error):
            raise StoreUnavailable("All connections to the database are busy.") from error
        raise
