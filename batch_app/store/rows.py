"""From rows to the types of `core`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row

from batch_app.core import (
    Batch,
    BatchStatus,
    Dialect,
    FilePurpose,
    LineError,
    Progress,
    StoredFile,
    TokenCounts,
    Upload,
    UploadStatus,
)

Values = dict[str, Any]


def progress_values(progress: Progress) -> Values:
    return {
        "completed": progress.completed,
        "failed": progress.failed,
        "deduplicated": progress.deduplicated,
        **asdict(progress.tokens),
    }


def batch_values(batch: Batch) -> Values:
    values = asdict(batch)
    del values["progress"]
    return (
        values
        | progress_values(batch.progress)
        | {
            "dialect": batch.dialect.value,
            "status": batch.status.value,
            "errors": [asdict(error) for error in batch.errors] or None,
        }
    )


def to_batch(row: Row[Any] | Mapping[str, Any]) -> Batch:
    values = _values(row)
    del values["seq"]
    values["progress"] = Progress(
        completed=values.pop("completed"),
        failed=values.pop("failed"),
        deduplicated=values.pop("deduplicated"),
        tokens=TokenCounts(
            prompt_tokens=values.pop("prompt_tokens"),
            completion_tokens=values.pop("completion_tokens"),
            cached_tokens=values.pop("cached_tokens"),
            reasoning_tokens=values.pop("reasoning_tokens"),
        ),
    )
    values["dialect"] = Dialect(values["dialect"])
    values["status"] = BatchStatus(values["status"])
    values["errors"] = tuple(LineError(**error) for error in values["errors"] or ())
    return Batch(**values)


def to_file(row: Row[Any]) -> StoredFile:
    values = _values(row)
    del values["seq"], values["deleted_at"]
    values["purpose"] = FilePurpose(values["purpose"])
    return StoredFile(**values)


def to_upload(row: Row[Any]) -> Upload:
    values = _values(row)
    values["purpose"] = FilePurpose(values["purpose"])
    values["status"] = UploadStatus(values["status"])
    return Upload(**values)


def _values(row: Row[Any] | Mapping[str, Any]) -> Values:
    return dict(row._mapping) if isinstance(row, Row) else dict(row)
