"""The tables, how to connect to them, and the migrations. The only home of database dialects.

SQLite: one writer at a time, taken at the start of a transaction (`BEGIN IMMEDIATE`), because a
read transaction that upgrades later fails at once instead of waiting. A write-ahead log is used
where the library is free of the bug that can corrupt one when several connections write and
checkpoint at once (fixed in SQLite 3.51.3, 3.50.7 and 3.44.6); elsewhere a rollback journal, under
which a status call has to wait for the worker's commits. Python often comes with an older SQLite,
so `pysqlite3`, which carries its own, goes first where it is installed.
"""

from __future__ import annotations

import importlib
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.types import TypeDecorator

MIGRATIONS_DIR = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 15.0
#: Execution option of a connection whose next transaction will write.
WRITES = "batch_app_writes"


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python; SQLite, which keeps no zone, gets it back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("Times must be aware.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData()
# SQLite numbers rows by itself only for a column of type INTEGER.
_Sequence = BigInteger().with_variant(Integer, "sqlite")

files = Table(
    "files",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("owner", String(64)),
    # A deleted file keeps its row: batches refer to it.
    Column("deleted_at", UtcDateTime),
)

batches = Table(
    "batches",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("dialect", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("input_file_id", String(64), ForeignKey("files.id"), nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", JSON),
    Column("errors", JSON),
    Column("error_message", Text),
    Column("total", BigInteger, nullable=False, default=0),
    Column("completed", BigInteger, nullable=False, default=0),
    Column("failed", BigInteger, nullable=False, default=0),
    Column("deduplicated", BigInteger, nullable=False, default=0),
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("completion_tokens", BigInteger, nullable=False, default=0),
    Column("cached_tokens", BigInteger, nullable=False, default=0),
    Column("reasoning_tokens", BigInteger, nullable=False, default=0),
    Column("throughput_tokens_per_s", Float),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("queued_at", UtcDateTime),
    Column("started_at", UtcDateTime),
    Column("finalizing_at", UtcDateTime),
    Column("completed_at", UtcDateTime),
    Column("failed_at", UtcDateTime),
    Column("expired_at", UtcDateTime),
    Column("cancelling_at", UtcDateTime),
    Column("cancelled_at", UtcDateTime),
    Column("epoch", Integer, nullable=False, default=0),
    Column("lease_owner", String(64)),
    Column("lease_s", Float),
    Column("heartbeats", BigInteger, nullable=False, default=0),
    Column("pause_reason", Text),
    Column("owner", String(64)),
    Column("provenance", JSON),
    Column("priority", Integer, nullable=False, default=0),
    Column("retry_of", String(64)),
    Column("output_expires_after_s", Integer),
    Column("passed_over_at", UtcDateTime),
    Column("deduplicate", Boolean, nullable=False, default=True),
    Column("workload", JSON),
    Column("counted_at", UtcDateTime),
    Column("outlook", JSON),
    Index("batches_by_status", "status", "seq"),
    Index("batches_by_input", "input_file_id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("batch_id", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("file_expires_after_s", Integer),
    Column("file_id", String(64)),
    Column("owner", String(64)),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("upload_id", String(64), ForeignKey("uploads.id"), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
)

# Sign-ins to the dashboard. As of a key, the store knows the SHA-256 of what the browser holds.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("key_id", String(64), ForeignKey("api_keys.id"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)

# How far a batch was at some times; a bounded number of rows for each.
batch_samples = Table(
    "batch_samples",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("at", UtcDateTime, primary_key=True),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("total_tokens", BigInteger, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_started_at", Float, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("state", String(32), nullable=False),
    Column("model", Text),
    Column("batch_id", String(64)),
    Column("engine", JSON),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("url", Text, nullable=False),
    # Not a digest: it signs what is sent.
    Column("secret", String(128), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("owner", String(64)),
    Column("batch_id", String(64), index=True),
    Column("events", String(255), nullable=False),
    Column("disabled_at", UtcDateTime),
    Column("disabled_reason", Text),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("webhook_id", String(64), ForeignKey("webhooks.id"), nullable=False),
    Column("batch_id", String(64), nullable=False),
    Column("type", String(32), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", UtcDateTime, nullable=False),
    Column("last_attempt_at", UtcDateTime),
    Column("delivered_at", UtcDateTime),
    Column("status_code", Integer),
    Column("error", Text),
    Column("owner", String(64)),
    Column("epoch", Integer, nullable=False, default=0),
    # How long nobody else touches it: while it is being sent, or waits for its next attempt.
    Column("hold_s", Float, nullable=False, default=0.0),
    Column("lease_owner", String(64)),
    Index("webhook_deliveries_by_state", "state", "seq"),
    Index("webhook_deliveries_by_webhook", "webhook_id", "seq"),
)

# Counters that only grow, for the metrics.
model_loads = Table(
    "model_loads",
    metadata,
    Column("model", String(512), primary_key=True),
    Column("num_loads", BigInteger, nullable=False, default=0),
    Column("num_failed", BigInteger, nullable=False, default=0),
    Column("load_s", Float, nullable=False, default=0.0),
    Column("num_lost", BigInteger, nullable=False, default=0),
    Column("prefix_queries", BigInteger, nullable=False, default=0),
    Column("prefix_hits", BigInteger, nullable=False, default=0),
    Column("preemptions", BigInteger, nullable=False, default=0),
)


def has_safe_wal(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite version may keep a write-ahead log under several writers.

    Source: SQLite's release notes of 3.51.3, 3.50.7 and 3.44.6 (the WAL-reset bug).
    """
    if version >= (3, 51, 3):
        return True
    return version[:2] in {(3, 50), (3, 44)} and version[2] >= {50: 7, 44: 6}[version[1]]


def sqlite_driver() -> ModuleType:
    """The module to reach SQLite by: the one with the newer library."""
    try:
        return importlib.import_module("pysqlite3")
    except ImportError:
        return importlib.import_module("sqlite3")


def connect(url: str) -> Engine:
    """A SQLAlchemy engine for this URL, with the project's rules for the database behind it.

    Creates the folder of a SQLite file. Raises sqlalchemy errors; `store` translates them.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    driver = sqlite_driver()
    engine = create_engine(
        url, module=driver, connect_args={"timeout": BUSY_TIMEOUT_S}, pool_size=20
    )
    journal = "WAL" if has_safe_wal(driver.sqlite_version_info) else "TRUNCATE"

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # The driver would otherwise begin transactions by its own rules.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_S * 1000)}")
        cursor.execute(f"PRAGMA journal_mode={journal}")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def sqlite_path(url: str) -> Path | None:
    """The file behind this URL; None where it isn't a file of SQLite's."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return None if parsed.database == ":memory:" else Path(parsed.database)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database that may be in use, as it is at one moment, to a file that is new.

    Raises OSError where it can't be read or written.
    """
    driver = sqlite_driver()
    if not source.exists():
        raise FileNotFoundError(f"There is no database at {source}.")
    try:
        with (
            closing(driver.connect(str(source), timeout=BUSY_TIMEOUT_S)) as there,
            closing(driver.connect(str(target))) as here,
        ):
            there.backup(here)
    except driver.Error as error:
        raise OSError(f"The database can't be copied: {error}") from error


def _alembic() -> tuple[Config, str]:
    """Its configuration, and the newest version."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    newest = ScriptDirectory.from_config(config).get_current_head()
    assert newest is not None
    return config, newest


def revisions(engine: Engine) -> tuple[str | None, str]:
    """The version of the tables, None where there are none, and the newest. Changes nothing."""
    with engine.connect() as connection, connection.begin():
        present = MigrationContext.configure(connection).get_current_revision()
    return present, _alembic()[1]


def migrate(engine: Engine) -> None:
    """Bring the tables to the newest version. Safe when several processes start at once."""
    config, newest = _alembic()
    with engine.connect() as connection, connection.begin():
        if MigrationContext.configure(connection).get_current_revision() == newest:
            return
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            # Any constant will do: all processes of this program ask for the same one.
            connection.execute(text("SELECT pg_advisory_xact_lock(7316849201)"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
