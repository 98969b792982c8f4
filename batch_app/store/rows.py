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
    Paused,
    PauseKind,
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
