"""The tables, how to connect to them, and the migrations. The only home of database dialects.

What the store needs done in another way by each dialect is a function here: `reading`, `writing`,
`lock`, `wake_workers`. `tables` are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Engine, func, inspect, make_url, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError

from batch_app.database import postgresql, sqlite
from batch_app.database.postgresql import QueueListener
from batch_app.database.sqlite import (
    WRITES,
    copy_sqlite,
    has_safe_wal,
    sqlite_driver,
    sqlite_path,
)
from batch_app.database.tables import (
    UtcDateTime,
    api_keys,
    batch_samples,
    batches,
    files,
    idempotency_keys,
    metadata,
    model_loads,
    sessions,
    upload_parts,
    uploads,
    webhook_deliveries,
    webhooks,
    workers,
)
from batch_app.errors import ConfigError

__all__ = [
    "WRITES",
    "QueueListener",
    "UtcDateTime",
    "api_keys",
    "batch_samples",
    "batches",
    "connect",
    "continue_numbers",
    "copy_sqlite",
    "files",
    "has_safe_wal",
    "idempotency_keys",
    "lock",
    "metadata",
    "migrate",
    "model_loads",
    "queue_listener",
    "reading",
    "revisions",
    "sessions",
    "shown",
    "sqlite_driver",
    "sqlite_path",
    "upload_parts",
    "uploads",
    "wake_workers",
    "webhook_deliveries",
    "webhooks",
    "workers",
    "writing",
]

MIGRATIONS_DIR = Path(__file__).parents[1] / "migrations"


def connect(url: str) -> Engine:
    """A SQLAlchemy engine for this URL, with the project's rules for the database behind it.

    Raises ConfigError where it can't be used; later sqlalchemy errors, which `store` translates.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        return sqlite.connect(parsed)
    return postgresql.connect(parsed)


def _parsed(url: str) -> URL:
    try:
        # A spelling that some hosts give to their customers.
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    except ArgumentError as error:
        raise ConfigError("database_url is not a URL (postgresql://user@host/name).") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"database_url names {parsed.get_backend_name()!r}; it can be sqlite or postgresql."
        )
    return parsed


def shown(url: str) -> str:
    """The URL as anybody may read it: without its password."""
    parsed = _parsed(url)
    return parsed.difference_update_query(["password"]).render_as_string(hide_password=True)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads, all of it as it is at one moment."""
    options = postgresql.READS if _is_postgresql(engine) else {}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that may write. On SQLite nobody else does meanwhile; on PostgreSQL others may,
    so that what it decides upon has to be locked: rows by `with_for_update`, all else by `lock`."""
    with (
        engine.connect().execution_options(**{WRITES: True}) as connection,
        connection.begin(),
    ):
        yield connection


def lock(connection: Connection, name: str) -> None:
    """Until its transaction ends, no other one gets past its `lock` of the same name."""
    if _is_postgresql(connection):
        query = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
        connection.execute(query, {"name": name})


def wake_workers(connection: Connection) -> None:
    """Once its transaction is committed, tell those who listen that a batch may be claimed."""
    if _is_postgresql(connection):
        connection.execute(text(f"NOTIFY {postgresql.QUEUE_CHANNEL}"))


def queue_listener(engine: Engine) -> QueueListener | None:
    """What hears `wake_workers`; None where the dialect has no such thing."""
    return QueueListener(engine) if _is_postgresql(engine) else None


def continue_numbers(connection: Connection) -> None:
    """After rows were inserted with numbers of their own: the next ones get higher numbers."""
    if _is_postgresql(connection):
        for table in metadata.sorted_tables:
            if "seq" in table.c:
                sequence = func.pg_get_serial_sequence(table.name, "seq")
                last = select(func.coalesce(func.max(table.c.seq), 0) + 1).scalar_subquery()
                connection.execute(select(func.setval(sequence, last, False)))


def _alembic() -> tuple[Config, str]:
    """Its configuration, and the newest version."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    newest = ScriptDirectory.from_config(config).get_current_head()
    assert newest is not None
    return config, newest


def revisions(engine: Engine) -> tuple[str | None, str]:
    """The version of the tables, None where there are none, and the newest. Changes nothing."""
    with reading(engine) as connection:
        present = MigrationContext.configure(connection).get_current_revision()
    return present, _alembic()[1]


def migrate(engine: Engine) -> None:
    """Bring the tables to the newest version. Safe when several processes start at once.

    Raises ConfigError where a newer program has brought them further, or where they are not those
    that their version says: nothing is changed then.
    """
    present, newest = revisions(engine)
    if present == newest:
        with reading(engine) as connection:
            _require_columns(connection, newest)
        return
    config, _ = _alembic()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        shown_url = shown(engine.url.render_as_string(hide_password=False))
        raise ConfigError(
            f"{shown_url} was made by a newer version of the program (its tables are of {present}, "
            f"this version's of {newest}). Use that version, or go back to a back-up."
        )
    with writing(engine) if _is_postgresql(engine) else sqlite.migrating(engine) as connection:
        if _is_postgresql(engine):
            # One process migrates, the others wait for it, however long that takes.
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({postgresql.MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        _require_columns(connection, present or newest)


def _require_columns(connection: Connection, version: str) -> None:
    """Raises ConfigError where a table or a column is missing: before the first release a
    migration was changed after databases had been made by it."""
    there = inspect(connection)
    tables = set(there.get_table_names())
    for table in metadata.sorted_tables:
        columns = set()
        if table.name in tables:
            columns = {column["name"] for column in there.get_columns(table.name)}
        missing = [column.name for column in table.columns if column.name not in columns]
        if missing:
            shown_url = shown(connection.engine.url.render_as_string(hide_password=False))
            raise ConfigError(
                f"{shown_url} says that its tables are of version {version}, but {table.name} has "
                f"no {', '.join(missing)}: a program from before the first release made it. "
                "Nothing was changed. Fetch your results with the program that made it; then move "
                "the database away, or name another data folder (--data-dir), and start again."
            )


def _is_postgresql(bind: Engine | Connection) -> bool:
    return bind.dialect.name == "postgresql"
