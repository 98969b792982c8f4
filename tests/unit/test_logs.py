"""What the processes print of what went wrong: enough to find it, and nobody's words."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from batch_app import logs
from batch_app.database import connect
from batch_app.errors import StorageFull
from batch_app.files import DataDir
from batch_app.routes.middleware import RequestIds

logger = logging.getLogger("batch_app.of_a_test")
SECRET = "zebra-crossing"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process of ours, until the test ends."""
    make, hook = logging.getLogRecordFactory(), threading.excepthook
    monkeypatch.setattr(logs, "_keeps_texts_out", False)
    logs.keep_texts_out()
    yield
    logging.setLogRecordFactory(make)
    threading.excepthook = hook


def read_line(text: str) -> None:
    try:
        raise KeyError(text)
    except KeyError as error:
        raise ValueError(f"not a {text}") from error


@pytest.mark.usefixtures("quiet")
def test_a_defect_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ExceptionGroup(SECRET, [TypeError(SECRET)])
    except ExceptionGroup:
        logger.exception("Together.")
    try:
        read_line(SECRET)
    except ValueError:
        logger.exception("It failed.")
    assert SECRET not in caplog.text
    for said in ("in read_line", "builtins.KeyError", "builtins.ValueError", "builtins.TypeError"):
        assert said in caplog.text
    assert "raise KeyError(text)" in caplog.text  # the place, with its line of code
    assert SECRET not in logs.JsonFormatter().format(caplog.records[-1])


@pytest.mark.usefixtures("quiet")
def test_what_is_ours_and_the_system_s_is_told_whole(caplog: pytest.LogCaptureFixture) -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise StorageFull("No room for results.") from error
    except StorageFull:
        logger.exception("It failed.")
    assert "No space left on device" in caplog.text
    assert "StorageFull: No room for results." in caplog.text


@pytest.mark.usefixtures("quiet")
def test_a_thread_that_dies_too(caplog: pytest.LogCaptureFixture) -> None:
    thread = threading.Thread(target=read_line, args=(SECRET,), name="reader")
    thread.start()
    thread.join()
    assert "reader ended." in caplog.text
    assert "builtins.ValueError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("error", [ClientDisconnect(), ValueError()])
def test_an_address_can_t_forge_a_line(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    async def fails(*_: Any) -> None:
        raise error

    async def send(_: Any) -> None:
        pass

    path = "/v1/batches/x\nINFO: all is well\x1b[2J"  # as it was escaped: %0A and so on
    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    with caplog.at_level(logging.INFO):
        asyncio.run(RequestIds(fails)(scope, fails, send))
    assert r"/v1/batches/x\x0aINFO: all is well\x1b[2J" in caplog.text
    assert "\nINFO: all" not in caplog.text


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://localhost/none"])
def test_errors_of_the_database_name_no_values(url: str) -> None:
    """Secrets of webhooks are among them."""
    engine = connect(url)
    assert engine.hide_parameters
    engine.dispose()


def test_a_new_data_folder_is_nobody_else_s(tmp_path: Path) -> None:
    new = DataDir(tmp_path / "sites" / "mine")
    new.create()
    assert new.root.stat().st_mode & 0o077 == 0
    there = tmp_path / "there"
    there.mkdir(mode=0o750)
    DataDir(there).create()
    assert there.stat().st_mode & 0o777 == 0o750, "whoever made it has said who may read it"
