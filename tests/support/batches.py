"""A batch that is running, for tests of what works on one without a store."""

from __future__ import annotations

from datetime import UTC, datetime

from batch_app.core import Batch, BatchStatus, Dialect
from batch_app.files import new_id


def running_batch(total: int) -> Batch:
    return Batch(
        id=new_id("batch"),
        dialect=Dialect.NATIVE,
        status=BatchStatus.RUNNING,
        endpoint="/v1/chat/completions",
        model="m",
        input_file_id=new_id("file"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        total=total,
        epoch=1,
    )
