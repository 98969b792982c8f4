"""The tables. Every dialect has the same."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python; SQLite, which keeps no zone, gets it back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("Times must be aware.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData()
# SQLite numbers rows by itself only for a column of type INTEGER.
_Sequence = BigInteger().with_variant(Integer, "sqlite")

files = Table(
    "files",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("owner", String(64)),
    # A deleted file keeps its row: batches refer to it.
    Column("deleted_at", UtcDateTime),
)

batches = Table(
    "batches",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("dialect", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("input_file_id", String(64), ForeignKey("files.id"), nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", JSON),
    Column("errors", JSON),
    Column("error_message", Text),
    Column("total", BigInteger, nullable=False, default=0),
    Column("completed", BigInteger, nullable=False, default=0),
    Column("failed", BigInteger, nullable=False, default=0),
    Column("deduplicated", BigInteger, nullable=False, default=0),
    # Completed requests by the finish reason of their answers, as `core.FinishReasonCounts`.
    Column("finish_stop", BigInteger, nullable=False, default=0, server_default="0"),
    Column("finish_length", BigInteger, nullable=False, default=0, server_default="0"),
    Column("finish_tool_calls", BigInteger, nullable=False, default=0, server_default="0"),
    Column("finish_content_filter", BigInteger, nullable=False, default=0, server_default="0"),
    Column("finish_other", BigInteger, nullable=False, default=0, server_default="0"),
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("completion_tokens", BigInteger, nullable=False, default=0),
    Column("cached_tokens", BigInteger, nullable=False, default=0),
    Column("reasoning_tokens", BigInteger, nullable=False, default=0),
    Column("throughput_tokens_per_s", Float),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("queued_at", UtcDateTime),
    Column("started_at", UtcDateTime),
    Column("finalizing_at", UtcDateTime),
    Column("completed_at", UtcDateTime),
    Column("failed_at", UtcDateTime),
    Column("expired_at", UtcDateTime),
    Column("cancelling_at", UtcDateTime),
    Column("cancelled_at", UtcDateTime),
    Column("epoch", Integer, nullable=False, default=0),
    Column("lease_owner", String(64)),
    Column("lease_s", Float),
    Column("heartbeats", BigInteger, nullable=False, default=0),
    # A batch is paused as long as `paused_at` is set. The kind and the number outlive the pause.
    Column("pause_reason", Text),
    Column("paused_at", UtcDateTime),
    Column("paused_by", String(64)),
    Column("retry_at", UtcDateTime),
    Column("pause_kind", String(32)),
    Column("pause_model", Text),
    Column("pause_entry", String(64)),
    Column("num_pauses", Integer, nullable=False, default=0),
    Column("owner", String(64)),
    Column("provenance", JSON),
    Column("priority", Integer, nullable=False, default=0),
    Column("retry_of", String(64)),
    Column("output_expires_after_s", Integer),
    Column("passed_over_at", UtcDateTime),
    Column("deduplicate", Boolean, nullable=False, default=True),
    Column("workload", JSON),
    Column("counted_at", UtcDateTime),
    Column("outlook", JSON),
    Index("batches_by_status", "status", "seq"),
    Index("batches_by_input", "input_file_id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("batch_id", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("file_expires_after_s", Integer),
    Column("file_id", String(64)),
    Column("owner", String(64)),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("upload_id", String(64), ForeignKey("uploads.id"), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
)

# Sign-ins to the dashboard. As of a key, the store knows the SHA-256 of what the browser holds.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("key_id", String(64), ForeignKey("api_keys.id"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)

# How far a batch was at some times; a bounded number of rows for each.
batch_samples = Table(
    "batch_samples",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("at", UtcDateTime, primary_key=True),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("total_tokens", BigInteger, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_started_at", Float, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("state", String(32), nullable=False),
    Column("model", Text),
    Column("batch_id", String(64)),
    Column("engine", JSON),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("url", Text, nullable=False),
    # Not a digest: it signs what is sent.
    Column("secret", String(128), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("owner", String(64)),
    Column("batch_id", String(64), index=True),
    Column("events", String(255), nullable=False),
    Column("disabled_at", UtcDateTime),
    Column("disabled_reason", Text),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("seq", _Sequence, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("webhook_id", String(64), ForeignKey("webhooks.id"), nullable=False),
    Column("batch_id", String(64), nullable=False),
    Column("type", String(32), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", UtcDateTime, nullable=False),
    Column("last_attempt_at", UtcDateTime),
    Column("delivered_at", UtcDateTime),
    Column("status_code", Integer),
    Column("error", Text),
    Column("owner", String(64)),
    Column("epoch", Integer, nullable=False, default=0),
    # How long nobody else touches it: while it is being sent, or waits for its next attempt.
    Column("hold_s", Float, nullable=False, default=0.0),
    Column("lease_owner", String(64)),
    Index("webhook_deliveries_by_state", "state", "seq"),
    Index("webhook_deliveries_by_webhook", "webhook_id", "seq"),
)

# Counters that only grow, for the metrics.
model_loads = Table(
    "model_loads",
    metadata,
    Column("model", String(512), primary_key=True),
    Column("num_loads", BigInteger, nullable=False, default=0),
    Column("num_failed", BigInteger, nullable=False, default=0),
    Column("load_s", Float, nullable=False, default=0.0),
    Column("num_lost", BigInteger, nullable=False, default=0),
    Column("prefix_queries", BigInteger, nullable=False, default=0),
    Column("prefix_hits", BigInteger, nullable=False, default=0),
    Column("preemptions", BigInteger, nullable=False, default=0),
)
