"""The OpenAI dialect: its objects, made from what the core knows. All times are Unix seconds.

The pydantic models are the shapes, for the answers and for /openapi.json alike. Optional fields are
sent as null where they are unset, as the SDK's types allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from batch_app.core import (
    Batch,
    BatchStatus,
    Endpoint,
    FilePurpose,
    StoredFile,
    Upload,
    UploadPart,
    UploadStatus,
)
from batch_app.estimates import Estimate
from batch_app.registry import ModelEntry
from batch_app.webhooks import Webhook
from batch_app.wire.errors import LineErrorBody
from batch_app.wire.native import (
    EstimateBody,
    FinishReasonsBody,
    PausedBody,
    ProgressBody,
    UsageBody,
    estimate_body,
    finish_reasons_body,
    paused_body,
    progress_body,
    usage_body,
)
from batch_app.wire.webhooks import (
    MAX_SECRET_CHARS,
    MAX_URL_CHARS,
    WebhookBody,
    WebhookCreate,
    webhook_body,
)

#: How the dialect calls each state.
STATUS_NAMES: Mapping[BatchStatus, str] = {
    **{status: status.value for status in BatchStatus},
    BatchStatus.QUEUED: "in_progress",
    BatchStatus.RUNNING: "in_progress",
}
MAX_METADATA_PAIRS = 16


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


# -- what comes in ---------------------------------------------------------------------------------


class ExpiresAfter(_Body):
    """How long files are kept: from an hour to thirty days."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA_PAIRS)]


class BatchCreate(_Body):
    """The body of `POST /v1/batches`. This server's own: `priority`, of which the higher goes
    first, `deduplicate`, whether equal requests may be computed once, and `webhook_url`, which is
    told of the batch's end; `webhook_secret`: see `POST /v1/webhooks`."""

    input_file_id: str
    endpoint: str = Field(json_schema_extra={"enum": [endpoint.value for endpoint in Endpoint]})
    completion_window: str = Field("24h", json_schema_extra={"pattern": "^[1-9][0-9]{0,2}[mhd]$"})
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    priority: int = Field(0, ge=-100, le=100)
    deduplicate: bool = True
    webhook_url: str | None = Field(None, max_length=MAX_URL_CHARS)
    webhook_secret: str | None = Field(None, max_length=MAX_SECRET_CHARS)


class UploadCreate(_Body):
    """The body of `POST /v1/uploads`."""

    filename: str = Field(min_length=1, max_length=512)
    purpose: str = Field(json_schema_extra={"enum": ["batch"]})
    bytes: int = Field(ge=1)
    mime_type: str = Field(max_length=255)
    expires_after: ExpiresAfter | None = None


class UploadComplete(_Body):
    """The body of `POST /v1/uploads/{id}/complete`. `md5`: of the whole file, in hex."""

    part_ids: list[str]
    md5: str | None = None


#: What /openapi.json has to define by itself, since the handlers read these bodies on their own.
REQUEST_BODIES = (BatchCreate, UploadCreate, UploadComplete, WebhookCreate)


# -- what goes out ---------------------------------------------------------------------------------


class FileBody(_Body):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class FileListBody(_Body):
    object: Literal["list"] = "list"
    data: list[FileBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFileBody(_Body):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadBody(_Body):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileBody | None


class PartBody(_Body):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int


class PartListBody(_Body):
    """The parts of an upload, in order of arrival."""

    object: Literal["list"] = "list"
    data: list[PartBody]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False


class RequestCountsBody(_Body):
    total: int
    completed: int
    failed: int


class BatchErrorsBody(_Body):
    object: Literal["list"] = "list"
    data: list[LineErrorBody]


class OpenAIBatchBody(_Body):
    """A batch. `progress`, `estimate`, `priority`, `retry_of`, `deduplicated` (requests that got
    the answer of an equal one), `paused` (why it can't go on at the moment), `pause_reason` and
    `webhook` (the one that was made with the batch, in the answer that creates both, with its
    secret) are this server's own."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrorsBody | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCountsBody
    usage: UsageBody | None
    metadata: dict[str, str] | None
    progress: ProgressBody
    finish_reasons: FinishReasonsBody
    estimate: EstimateBody | None
    priority: int
    retry_of: str | None
    deduplicated: int
    pause_reason: str | None
    paused: PausedBody | None
    webhook: WebhookBody | None


class OpenAIModelBody(_Body):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllm-batch-server"


def unix(moment: datetime | None) -> int | None:
    """Unix seconds; null stays null."""
    return None if moment is None else int(moment.timestamp())


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


def file_body(file: StoredFile) -> FileBody:
    return FileBody(
        id=file.id,
        bytes=file.size_bytes,
        created_at=_unix(file.created_at),
        expires_at=unix(file.expires_at),
        filename=file.filename,
        purpose=file.purpose.value,
    )


def file_list_body(files: Sequence[StoredFile], has_more: bool) -> FileListBody:
    return FileListBody(
        data=[file_body(file) for file in files],
        first_id=files[0].id if files else None,
        last_id=files[-1].id if files else None,
        has_more=has_more,
    )


def upload_body(upload: Upload, file: StoredFile | None = None) -> UploadBody:
    return UploadBody(
        id=upload.id,
        bytes=upload.size_bytes,
        created_at=_unix(upload.created_at),
        expires_at=_unix(upload.expires_at),
        filename=upload.filename,
        purpose=upload.purpose.value,
        status=upload.status.value,
        file=file_body(file) if file and upload.status is UploadStatus.COMPLETED else None,
    )


def part_body(part: UploadPart) -> PartBody:
    return PartBody(
        id=part.id,
        created_at=_unix(part.created_at),
        upload_id=part.upload_id,
        bytes=part.size_bytes,
    )


def part_list_body(parts: Sequence[UploadPart]) -> PartListBody:
    return PartListBody(
        data=[part_body(part) for part in parts],
        first_id=parts[0].id if parts else None,
        last_id=parts[-1].id if parts else None,
    )


def openai_batch_body(
    batch: Batch, estimate: Estimate | None = None, webhook: Webhook | None = None
) -> OpenAIBatchBody:
    progress = batch.progress
    errors = [LineErrorBody.model_validate(error) for error in batch.errors]
    if not errors and batch.error_message:
        # The dialect has no other place for why a batch failed.
        errors = [
            LineErrorBody(code="batch_failed", line=None, message=batch.error_message, param=None)
        ]
    return OpenAIBatchBody(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model or None,
        errors=BatchErrorsBody(data=errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=STATUS_NAMES[batch.status],
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=_unix(batch.created_at),
        in_progress_at=unix(batch.queued_at),
        expires_at=unix(batch.expires_at),
        finalizing_at=unix(batch.finalizing_at),
        completed_at=unix(batch.completed_at),
        failed_at=unix(batch.failed_at),
        expired_at=unix(batch.expired_at),
        cancelling_at=unix(batch.cancelling_at),
        cancelled_at=unix(batch.cancelled_at),
        request_counts=RequestCountsBody(
            total=batch.total, completed=progress.completed, failed=progress.failed
        ),
        usage=usage_body(batch),
        metadata=dict(batch.metadata) if batch.metadata is not None else None,
        progress=progress_body(batch),
        finish_reasons=finish_reasons_body(batch),
        estimate=estimate_body(estimate),
        priority=batch.priority,
        retry_of=batch.retry_of,
        deduplicated=progress.deduplicated,
        pause_reason=batch.pause_reason,
        paused=paused_body(batch, unix),
        webhook=None if webhook is None else webhook_body(webhook, with_secret=True),
    )


def openai_model_body(entry: ModelEntry, since: datetime) -> OpenAIModelBody:
    """`since`: when the server began to offer it."""
    return OpenAIModelBody(id=entry.name, created=_unix(since))


def as_purpose(name: str) -> FilePurpose | None:
    """The purpose of this name; None where no file here can have it."""
    return next((purpose for purpose in FilePurpose if purpose == name), None)
