"""Copying all that the store knows from one database to another, of whatever dialect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, insert, select

from batch_app import database
from batch_app.errors import ConfigError
from batch_app.store.transactions import translated_errors

ROWS_AT_ONCE = 500


def copy_database(source_url: str, target_url: str, *, bring_up_to_date: bool = False) -> int:
    """Copy every row, as it is at one moment, to a database that holds none. Returns how many.

    The source may be in use. `bring_up_to_date`: its tables are migrated first, if they are older.

    Raises:
        ConfigError: the target holds something, or the source hasn't got this version's tables.
        StoreUnavailable, StorageFull: the target is as empty as before.
    """
    with translated_errors(), _opened(source_url) as source, _opened(target_url) as target:
        if bring_up_to_date:
            database.migrate(source)
        present, newest = database.revisions(source)
        if present != newest:
            raise ConfigError(
                f"{database.shown(source_url)} has no tables of this version of the program. If it "
                "is the right database, start the API server of this version on it once."
            )
        database.migrate(target)
        num_rows = 0
        with database.reading(source) as there, database.writing(target) as here:
            _require_empty(target)
            for table in database.metadata.sorted_tables:
                rows = there.execution_options(yield_per=ROWS_AT_ONCE).execute(select(table))
                for some in rows.mappings().partitions():
                    here.execute(insert(table), [dict(row) for row in some])
                    num_rows += len(some)
            database.continue_numbers(here)
    return num_rows


def require_empty(url: str) -> None:
    """Raises ConfigError where there are rows in this database; makes its tables."""
    with translated_errors(), _opened(url) as engine:
        database.migrate(engine)
        _require_empty(engine)


def _require_empty(engine: Engine) -> None:
    with database.reading(engine) as connection:
        for table in database.metadata.sorted_tables:
            if connection.execute(select(table).limit(1)).first() is not None:
                shown = database.shown(engine.url.render_as_string(hide_password=False))
                raise ConfigError(f"{shown} isn't empty: {table.name} has rows. Take a new one.")


@contextmanager
def _opened(url: str) -> Iterator[Engine]:
    engine = database.connect(url)
    try:
        yield engine
    finally:
        engine.dispose()
