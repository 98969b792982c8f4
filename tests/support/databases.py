"""Databases of both dialects, for tests of what must hold on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batch_app import database
from support.postgres import PostgresServer

DIALECTS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def emptied(postgres: PostgresServer) -> Iterator[Callable[[], str]]:
    """Empties the tables of one PostgreSQL database, and says its URL: a new one takes longer."""
    url = postgres.new_database_with_tables()
    engine = database.connect(url)

    def empty() -> str:
        with database.writing(engine) as connection:
            for table in reversed(database.metadata.sorted_tables):
                connection.execute(table.delete())
        return url

    yield empty
    engine.dispose()


@pytest.fixture(params=DIALECTS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database; on SQLite without tables yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'database' / 'batch_jobs.db'}"
    url: str = request.getfixturevalue("emptied")()
    return url


@pytest.fixture(params=DIALECTS)
def new_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that never had a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()
