"""From rows to the types of `core`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Row

from batch_app.core import (
    Batch,
    BatchStatus,
    Dialect,
    FilePurpose,
    FinishReasonCounts,
    LineError,
    Progress,
    StoredFile,
    TokenCounts,
    Upload,
    UploadStatus,
)

Values = dict[str, Any]

_FINISH = "finish_"
_FINISH_REASONS = tuple(field.name for field in fields(FinishReasonCounts))
_TOKENS = tuple(field.name for field in fields(TokenCounts))
PROGRESS_COLUMNS = (
    "completed",
    "failed",
    "deduplicated",
    *_TOKENS,
    *(_FINISH + name for name in _FINISH_REASONS),
)


def progress_values(progress: Progress) -> Values:
    return {
        "completed": progress.completed,
        "failed": progress.failed,
        "deduplicated": progress.deduplicated,
        **asdict(progress.tokens),
        **{_FINISH + name: num for name, num in asdict(progress.finish_reasons).items()},
    }


def to_progress(values: Mapping[str, Any]) -> Progress:
    """From the columns of `PROGRESS_COLUMNS`, whose sums a database may give as decimals."""
    return Progress(
        completed=int(values["completed"]),
        failed=int(values["failed"]),
        deduplicated=int(values["deduplicated"]),
        tokens=TokenCounts(**{name: int(values[name]) for name in _TOKENS}),
        finish_reasons=FinishReasonCounts(
            **{name: int(values[_FINISH + name]) for name in _FINISH_REASONS}
        ),
    )


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
    values["progress"] = to_progress({name: values.pop(name) for name in PROGRESS_COLUMNS})
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
