"""Batches for tests of what works on one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from batch_app.core import Batch, BatchStatus, Dialect
from batch_app.files import new_id


def a_batch(**values: Any) -> Batch:
    """One that waits, unless `values` say otherwise."""
    usual = {
        "id": new_id("batch"),
        "dialect": Dialect.NATIVE,
        "status": BatchStatus.QUEUED,
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "input_file_id": new_id("file"),
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "total": 1,
    }
    return Batch(**(usual | values))


def running_batch(total: int) -> Batch:
    return a_batch(status=BatchStatus.RUNNING, total=total, epoch=1)
