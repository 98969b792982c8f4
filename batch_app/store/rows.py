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
    Paused,
    PauseKind,
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


def pause_values(paused: Paused | None) -> Values:
    """The columns that say why a batch is paused; with None, that it isn't."""
    if paused is None:
        names = ("reason", "model", "entry")
        return dict.fromkeys(["paused_at", "paused_by", "retry_at", *(f"pause_{n}" for n in names)])
    return {
        "pause_kind": paused.kind.value,
        "pause_reason": paused.reason,
        "paused_at": paused.since,
        "paused_by": paused.by,
        "retry_at": paused.retry_at,
        "pause_model": paused.model,
        "pause_entry": paused.entry,
    }


def to_paused(values: Mapping[str, Any]) -> Paused | None:
    if values["paused_at"] is None:
        return None
    return Paused(
        kind=PauseKind(values["pause_kind"]),
        reason=values["pause_reason"],
        since=values["paused_at"],
        retry_at=values["retry_at"],
        by=values["paused_by"],
        model=values["pause_model"],
        entry=values["pause_entry"],
    )


def batch_values(batch: Batch) -> Values:
    values = asdict(batch)
    del values["progress"], values["paused"]
    return (
        values
        | {"pause_kind": batch.pause_kind.value if batch.pause_kind else None}
        | pause_values(batch.paused)
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
    values["paused"] = to_paused(values)
    for name in pause_values(None):
        del values[name]
    if values["pause_kind"] is not None:
        values["pause_kind"] = PauseKind(values["pause_kind"])
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
