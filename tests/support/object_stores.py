"""Object stores of the tests' own: a folder, and a real S3 server in a process of its own."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from batch_app.objects import Objects
from support.waiting import wait_for

REPO = Path(__file__).parents[2]
KINDS = ("file", "s3")
PART_BYTES = 5 << 20  # the smallest that S3 takes


class S3Server:
    """Make one, `start` it; what it holds is gone with `stop`, unless it is only held up."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """What those who use it need."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "an-id-of-a-test",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-a-test",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.s3_server", str(self._port)],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": f"{REPO / 'tests'}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers, what="the S3 server answers")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None

    def new_bucket(self) -> str:
        """The URL of a bucket's prefix."""
        name = f"of-a-test-{next(self._numbers)}"
        self.fail(False)
        httpx.put(f"{self.endpoint}/{name}", timeout=60).raise_for_status()
        return f"s3://{name}/some/prefix"

    def fail(self, is_failing: bool) -> None:
        """From now on it answers every request with 503, or as it should."""
        httpx.post(f"{self.endpoint}/-/failing/{int(is_failing)}", timeout=60).raise_for_status()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        try:
            httpx.get(f"{self.endpoint}/-/requests", timeout=60)
        except httpx.TransportError:
            return False
        return True


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One for all tests of a process; each asks it for a bucket of its own."""
    pytest.importorskip("moto")
    pytest.importorskip("obstore")
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """This process, and those it starts, may use it."""
    s3.fail(False)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(params=KINDS)
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    pytest.importorskip("obstore")
    if request.param == "file":
        (tmp_path / "objects").mkdir()
        return f"file://{tmp_path / 'objects'}"
    server: S3Server = request.getfixturevalue("s3_environment")
    return server.new_bucket()


@pytest.fixture
def objects(storage_url: str) -> Objects:
    return Objects(storage_url, part_bytes=PART_BYTES)


@pytest.fixture
def file_objects(tmp_path: Path) -> Callable[[], Objects]:
    """Opens one and the same folder as a store, as each machine would."""
    pytest.importorskip("obstore")
    folder = tmp_path / "objects"
    folder.mkdir()
    return lambda: Objects(f"file://{folder}", part_bytes=PART_BYTES)
