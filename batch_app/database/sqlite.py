"""SQLite: one writer at a time, taken at the start of a transaction (`BEGIN IMMEDIATE`), because a
read transaction that upgrades later fails at once instead of waiting.

A write-ahead log is used where the library is free of the bug that can corrupt one when several
connections write and checkpoint at once (fixed in SQLite 3.51.3, 3.50.7 and 3.44.6); elsewhere a
rollback journal, under which a status call has to wait for the worker's commits. Python often comes
with an older SQLite, so `pysqlite3`, which carries its own, goes first where it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

BUSY_TIMEOUT_S = 15.0
#: Execution option of a connection whose next transaction will write.
WRITES = "batch_app_writes"
#: … and whose rows may point to nothing until its end.
_MIGRATES = "batch_app_migrates"


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


def connect(url: URL) -> Engine:
    """Creates the folder of the file."""
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    driver = sqlite_driver()
    engine = create_engine(
        url,
        module=driver,
        connect_args={"timeout": BUSY_TIMEOUT_S},
        pool_size=20,
        hide_parameters=True,  # errors end in logs, secrets of webhooks don't
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
        options = connection.get_execution_options()
        if options.get(_MIGRATES):
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # within one it does nothing
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get(WRITES) else "BEGIN")

    return engine


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A transaction that may make a table anew, as SQLite changes most things of a table: under
    another name, the old one dropped meanwhile although others point to it.

    Raises IntegrityError where at its end a row points to nothing.
    """
    options = {WRITES: True, _MIGRATES: True}
    with engine.connect().execution_options(**options) as connection:
        try:
            with connection.begin():
                yield connection
                lost = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
                if lost is not None:
                    table, _, parent, _ = lost
                    cause = sqlite_driver().IntegrityError(f"{table} points to lost {parent}")
                    raise IntegrityError("PRAGMA foreign_key_check", None, cause)
        finally:
            driver_connection: Any = connection.connection.driver_connection
            driver_connection.execute("PRAGMA foreign_keys=ON")


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
