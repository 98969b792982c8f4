"""PostgreSQL, by psycopg 3.

Reads are of one moment (`REPEATABLE READ`), as SQLite's are. Writes lock the rows that they decide
upon, or a name where there is no row yet; nobody waits for a lock for ever, and who stands still in
the middle of a transaction loses its connection.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from batch_app.errors import ConfigError

if TYPE_CHECKING:
    from psycopg import Connection as DriverConnection

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 15
IDLE_IN_TRANSACTION_S = 60
#: Where a worker listens, and what wakes it.
QUEUE_CHANNEL = "vllm_batch_queue"
#: How long a worker that is told to stop may go on listening.
LOOK_EVERY_S = 0.1
RECONNECT_AFTER_S = 5.0
#: Execution options of a connection that only reads.
READS: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
#: Any constant will do: all processes of this program ask for the same one.
MIGRATION_LOCK = 7316849201
DISK_FULL = "53100"
READ_ONLY = "25006"
_CONNECT_ARGS = {
    "application_name": "vllm-batch",
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def connect(url: URL) -> Engine:
    """Raises ConfigError where the driver isn't installed."""
    try:
        from psycopg.types.string import StrDumper
    except ImportError as error:
        raise ConfigError(
            "PostgreSQL needs psycopg, which isn't installed or doesn't load "
            f"({error}). Install it: pip install 'vllm-batch-server[postgres]'"
        ) from error

    class TextDumper(StrDumper):
        """PostgreSQL's text holds no NUL, which somebody's error message or id may."""

        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", "\N{REPLACEMENT CHARACTER}"))

    given = {name: value for name, value in _CONNECT_ARGS.items() if name not in url.query}
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=given,
        pool_pre_ping=True,
        use_native_hstore=False,
        hide_parameters=True,  # errors end in logs, secrets of webhooks don't
        pool_size=5,
        max_overflow=15,
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: DriverConnection, _record: Any) -> None:
        connection.adapters.register_dumper(str, TextDumper)
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION_S}s'")
        connection.commit()

    return engine


class QueueListener:
    """Hears at once, by LISTEN, that a batch has come. Only a hint: where the connection is lost,
    the poll interval does. For one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: DriverConnection | None = None
        self._next_try = 0.0

    def wait(self, timeout_s: float, stop: threading.Event) -> bool:
        """Wait for a batch, `stop`, or the timeout. True if one came, also since the last call."""
        deadline = time.monotonic() + timeout_s
        while (remaining := deadline - time.monotonic()) > 0 and not stop.is_set():
            if self._connection is None and time.monotonic() >= self._next_try:
                if self._listen():
                    return True  # what came before isn't known
            elif self._hears(min(LOOK_EVERY_S, remaining), stop):
                return True
        return False

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _listen(self) -> bool:
        from psycopg import Error

        self._next_try = time.monotonic() + RECONNECT_AFTER_S
        connection: Any = None
        try:
            pooled = self._engine.raw_connection()
            connection = pooled.driver_connection
            pooled.detach()  # the pool would use it for something else
            connection.autocommit = True
            connection.execute(f"LISTEN {QUEUE_CHANNEL}")
        except (SQLAlchemyError, Error) as error:
            logger.warning("Can't listen for new batches: %s", first_line(error))
            if connection is not None:
                connection.close()
            return False
        self._connection = connection
        return True

    def _hears(self, seconds: float, stop: threading.Event) -> bool:
        if self._connection is None:
            stop.wait(seconds)
            return False
        from psycopg import Error

        try:
            return bool([*self._connection.notifies(timeout=seconds, stop_after=1)])
        except Error as error:
            logger.warning("The connection that listens for new batches is lost: %s", error)
            self.close()
            return False


def sqlstate(error: DBAPIError) -> str:
    """PostgreSQL's code for what went wrong; empty where it gave none, or isn't what is asked."""
    return getattr(error.orig, "sqlstate", None) or ""


def first_line(error: Exception) -> str:
    """Of what the driver says; more may follow, such as the statement."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause).partition("\n")[0]
