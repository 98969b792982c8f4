"""The tables' migrations, on both databases: from the first release on, and one still to come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Column, Connection, Engine, MetaData, select, text
from sqlalchemy.exc import IntegrityError

from batch_app import database
from batch_app.errors import ConfigError

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
#: One that has SQLite make anew each table that others point to, as most changes of a table do.
TO_COME = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{newest}"


def upgrade():
    for table, column in [("files", "filename"), ("batches", "model"), ("webhooks", "url"),
                          ("uploads", "filename"), ("api_keys", "name")]:
        with op.batch_alter_table(table) as altered:
            altered.alter_column(column, type_=sa.String(500))
    op.execute("{last}")
"""


@pytest.fixture
def engine(new_database_url: str) -> Iterator[Engine]:
    engine = database.connect(new_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def rows(engine: Engine) -> dict[str, dict[str, Any]]:
    """Those of a database as the first release made it, by table: one in each."""
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS_DIR))
    with database.writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    with database.writing(engine) as connection:
        tables = _tables(connection)
        for table in tables.sorted_tables:
            row = {column.name: _some(column) for column in table.columns}
            connection.execute(table.insert().values(row))
        return _rows(connection, tables)


def _tables(connection: Connection) -> MetaData:
    found = MetaData()
    found.reflect(connection, only=lambda name, _: name != "alembic_version")
    return found


def _some(column: Column[Any]) -> object:
    """A value for a column, whatever it is for."""
    kind = column.type.python_type
    return {int: 7, float: 0.5, bool: True, dict: {"a": [1]}, datetime: NOW}.get(kind, "a")


def _rows(connection: Connection, tables: MetaData) -> dict[str, dict[str, Any]]:
    return {
        table.name: dict(connection.execute(select(table)).mappings().one())
        for table in tables.sorted_tables
    }


def _assert_still_there(rows: dict[str, dict[str, Any]], engine: Engine) -> None:
    with database.reading(engine) as connection:
        now = _rows(connection, _tables(connection))
    for table, row in rows.items():
        assert {column: now[table][column] for column in row} == row, table


def _add_migration(
    engine: Engine, folder: Path, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, newest = database.revisions(engine)
    shutil.copytree(database.MIGRATIONS_DIR, folder)
    (folder / "versions" / "9999_to_come.py").write_text(TO_COME.format(newest=newest, last=last))
    monkeypatch.setattr(database, "MIGRATIONS_DIR", folder)


def test_rows_of_the_first_release_outlive_every_migration(
    engine: Engine,
    rows: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database.migrate(engine)
    _assert_still_there(rows, engine)

    _add_migration(engine, tmp_path / "migrations", "SELECT 1", monkeypatch)
    database.migrate(engine)
    assert database.revisions(engine) == ("9999", "9999")
    _assert_still_there(rows, engine)
    with (
        pytest.raises(IntegrityError),
        database.writing(engine) as connection,
    ):
        connection.execute(text("DELETE FROM files"))


def test_a_migration_that_fails_changes_nothing(
    engine: Engine,
    rows: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database.migrate(engine)
    present, _ = database.revisions(engine)
    _add_migration(engine, tmp_path / "migrations", "DELETE FROM files", monkeypatch)
    with pytest.raises(IntegrityError):  # there is a batch of that file
        database.migrate(engine)
    assert database.revisions(engine) == (present, "9999")
    _assert_still_there(rows, engine)


def test_tables_of_a_newer_version_are_left_alone(engine: Engine) -> None:
    database.migrate(engine)
    with database.writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=r"newer version of the program.*9999"):
        database.migrate(engine)
    assert database.revisions(engine)[0] == "9999"
