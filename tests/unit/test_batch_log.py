"""The batch log: one line an event, whatever the event's text."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.batch_log import BatchLog, pace_text, printable
from batch_app.routes import downloads
from batch_app.routes.downloads import log_blocks


def test_a_line(tmp_path: Path) -> None:
    log = BatchLog(tmp_path / "b.log", clock=lambda: datetime(2025, 10, 28, 10, tzinfo=UTC))
    log.write("claimed")
    log.write("loaded in 8.1 s — ✅")
    assert log.path.read_text() == (
        "2025-10-28 10:00:00Z  claimed\n2025-10-28 10:00:00Z  loaded in 8.1 s — ✅\n"
    )


def test_long_answers_are_no_standstill() -> None:
    assert pace_text(1234.5, 99) == "1,234 tokens/s."
    assert pace_text(0, 99) == "none finished, 99 tokens/s being written."
    assert pace_text(0, 0) == "0 tokens/s."
    assert pace_text(0, 0, 8192) == "reading prompts (8,192 prompt tokens so far)."
    assert pace_text(1234.5, 0, 8192) == "1,234 tokens/s."
    assert pace_text(0, 99, 8192) == "none finished, 99 tokens/s being written."


@given(st.text())
def test_no_text_makes_a_second_line(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "b.log"

    def write(name: str) -> None:
        for _ in range(50):
            BatchLog(path).write(name * 500)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 200
    assert all(len(set(line[22:])) == 1 for line in lines)


def test_a_log_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A library loaded by another test may have turned the root logger down.
    with caplog.at_level(logging.WARNING, logger="batch_app"):
        BatchLog(tmp_path / "no" / "such" / "folder.log").write("x")
    assert "can't be written" in caplog.text


@given(
    st.lists(st.text("ab", max_size=40), max_size=30),
    st.integers(0, 40),
    st.booleans(),
    st.integers(1, 50),
)
def test_tail(lines: list[str], tail: int, last_end: bool, block_bytes: int) -> None:
    text = "\n".join(lines) + ("\n" if last_end and lines else "")
    wanted = b"".join(text.encode().splitlines(keepends=True)[-tail:]) if tail else b""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(downloads, "BLOCK_BYTES", block_bytes)
        path = Path(folder) / "a.log"
        path.write_text(text)
        assert b"".join(log_blocks(path, tail)) == wanted
        assert b"".join(log_blocks(path, None)) == text.encode()


def test_no_log() -> None:
    assert list(log_blocks(Path("/nowhere"), None)) == []
