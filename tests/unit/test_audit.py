"""The audit log: whole lines, in files that do not grow for ever."""

from __future__ import annotations

import json
import logging
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batch_app import audit
from batch_app.audit import KEPT_FILES, AuditLog, Deed

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_did_what(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 1000, clock=lambda: NOW)
    log.write(Deed("create_batch", "batch_1", 200, "key_1", "10.0.0.7", "req_1"))
    assert entries(log.path) == [
        {
            "time": "2026-01-01T00:00:00.000+00:00",
            "action": "create_batch",
            "object_id": "batch_1",
            "outcome": 200,
            "key_id": "key_1",
            "client": "10.0.0.7",
            "request_id": "req_1",
        }
    ]
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_files_are_rotated_and_the_oldest_goes(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path / "audit.jsonl", 300) for _ in range(2)]  # as two processes
    for number in range(200):
        logs[number % 2].write(Deed("act", str(number), 200))
    files = sorted(tmp_path.glob("audit.jsonl*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == KEPT_FILES + 1
    kept = [entry["object_id"] for path in files for entry in entries(path)]
    assert kept == [str(number) for number in range(200 - len(kept), 200)]
    assert all(path.stat().st_size < 600 for path in files)


def test_strangers_do_not_push_the_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = [600.0]
    monkeypatch.setattr(audit.time, "monotonic", lambda: moment[0])
    log = AuditLog(tmp_path / "audit.jsonl", 1_000_000)
    for _ in range(1000):
        log.write(Deed("refused", None, 401), stranger=True)
    assert len(entries(log.path)) == audit.MAX_STRANGERS_A_MINUTE
    log.write(Deed("create_batch", "batch_1", 200))
    assert entries(log.path)[-1]["refusals_not_written"] == 1000 - audit.MAX_STRANGERS_A_MINUTE
    moment[0] += 60
    log.write(Deed("refused", None, 401), stranger=True)
    assert entries(log.path)[-1]["action"] == "refused"
    assert "refusals_not_written" not in entries(log.path)[-1]


def test_a_log_that_cannot_be_written_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):  # whatever level a library left behind
        AuditLog(tmp_path / "no" / "such" / "folder.jsonl", 100).write(Deed("act", None, 200))
    assert "audit log" in caplog.text
