"""An upload, from the first byte of the request's body to the queued batch.

The body goes once to disk, and past the line check on its way where the form names the model
before the file (else the check reads the file when it has arrived: the order is the user's). All
blocking work is in a thread, one chunk at a time, so that memory holds a chunk or two whatever the
file's size, and a slow disk slows the client down, not the server.

What a crash leaves is a folder under `incoming/`, which the next start sweeps away; a refused or
cut upload leaves nothing. The batch exists from the insert on, after its files are durable.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import anyio
from anyio import CancelScope, CapacityLimiter

from batch_app.batch_log import BatchLog
from batch_app.config import MIB, Settings
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, StoredFile, utc_now
from batch_app.errors import BadRequest, StorageFull, TooLarge, UnsupportedMedia
from batch_app.files import (
    DataDir,
    move_durably,
    new_id,
    no_room_is_storage_full,
    remove_tree,
    sync_dir,
    wake_workers,
)
from batch_app.intake import Intake, IntakeRules, IntakeSummary, index_file
from batch_app.multipart import Form
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.store import Store

CHUNK_BYTES = 1 * MIB
#: Uploads worked on at once; more of them wait for their turn, chunk by chunk. More threads would
#: only compete for the interpreter with the calls that ask how far a batch is.
MAX_BUSY_UPLOADS = 4
#: How often the free room is looked at while a file arrives.
ROOM_CHECK_BYTES = 64 * MIB


@dataclass(frozen=True)
class UploadServices:
    """What an upload needs of the server. `clock` and `limiter` are shared by all uploads."""

    settings: Settings
    data: DataDir
    store: Store
    registry: ModelRegistry
    limiter: CapacityLimiter
    clock: Callable[[], datetime] = utc_now


async def receive_batch(
    services: UploadServices,
    headers: dict[str, str],
    chunks: AsyncIterator[bytes],
) -> Batch:
    """Take a native submission and queue it.

    Args:
        headers: of the request, with lower-case names.
        chunks: of its body.

    Raises:
        BadRequest: the form can't be used (`BadLines`, `TooLarge`, `UnsupportedMedia` among it).
        ModelNotFound: the form's model is not in the registry.
        StorageFull: there is no room.
        StoreUnavailable: the database does not answer.
    Whatever is raised, nothing of the upload remains.
    """
    _check_headers(services.settings, headers)
    upload = _Upload(services, headers.get("content-type"))
    in_thread = anyio.to_thread.run_sync
    try:
        await in_thread(upload.open, limiter=services.limiter)
        async for chunk in _gathered(chunks, CHUNK_BYTES):
            await in_thread(upload.write, chunk, limiter=services.limiter)
        return await in_thread(upload.finish, limiter=services.limiter)
    finally:
        # Also when the client is gone or the server stops: the rest must still be removed.
        with CancelScope(shield=True):
            await in_thread(upload.discard)


def _check_headers(settings: Settings, headers: dict[str, str]) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMedia("Send the body as it is, with no Content-Encoding.")
    length = headers.get("content-length", "")
    # The form's own bytes come on top of the file's; the file alone is measured as it arrives.
    if length.isdigit() and int(length) > settings.max_upload_bytes + MIB:
        raise _too_large(settings)


def _too_large(settings: Settings) -> TooLarge:
    return TooLarge(
        f"The file is larger than {settings.max_upload_bytes} bytes (max_upload_bytes). "
        "Split it into several batches, or have the limit raised.",
        param="file",
    )


async def _gathered(chunks: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of at least `size`, but for the last."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if len(buffer) >= size:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


class _Upload:
    """One upload. Its methods block, and are called in threads, never two at a time."""

    def __init__(self, services: UploadServices, content_type: str | None) -> None:
        self._services = services
        self._batch_id = new_id("batch")
        self._file_id = new_id("file")
        self._folder = services.data.incoming / self._batch_id
        self._path = self._folder / "input.jsonl"
        self._form = Form(
            content_type, file_field="file", on_file=self._begin_file, on_data=self._take
        )
        self._file: BinaryIO | None = None
        self._size_bytes = 0
        self._room_checked_at = 0
        self._model: ModelEntry | None = None
        self._intake: Intake | None = None
        self._leftovers: list[Path] = []

    def open(self) -> None:
        self._check_room()
        self._leftovers.append(self._folder)
        with no_room_is_storage_full("receiving the upload"):
            self._folder.mkdir()

    def write(self, chunk: bytes) -> None:
        self._form.write(chunk)

    def finish(self) -> Batch:
        """All bytes are here: check what remains to be checked, then queue the batch."""
        self._form.finish()
        model = self._require_model()
        file = self._file
        if file is None:
            raise BadRequest('The form has no "file".', param="file")
        with no_room_is_storage_full("receiving the upload"):
            os.fsync(file.fileno())
            file.close()
        summary = self._check_lines(model)
        return self._queue(model, summary)

    def discard(self) -> None:
        """Remove what isn't part of a queued batch. Harmless when there is nothing."""
        if self._intake is not None:
            self._intake.close()
        if self._file is not None:
            self._file.close()
        for path in self._leftovers:
            remove_tree(path)

    # -- while the body arrives ----------------------------------------------------------------

    def _begin_file(self, fields: dict[str, str]) -> None:
        with no_room_is_storage_full("receiving the upload"):
            # Unbuffered: pieces are large, and a failed write must not come back at close.
            self._file = self._path.open("wb", buffering=0)
            if "model" in fields:
                self._intake = Intake(self._folder, self._rules(self._require_model()))

    def _take(self, piece: bytes) -> None:
        assert self._file is not None
        self._size_bytes += len(piece)
        if self._size_bytes > self._services.settings.max_upload_bytes:
            raise _too_large(self._services.settings)
        if self._size_bytes - self._room_checked_at >= ROOM_CHECK_BYTES:
            self._room_checked_at = self._size_bytes
            self._check_room()
        with no_room_is_storage_full("receiving the upload"):
            rest = memoryview(piece)
            while rest:
                rest = rest[self._file.write(rest) :]
        if self._intake is not None:
            self._intake.feed(piece)

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._services.data.incoming).free
        if free < self._services.settings.min_free_bytes:
            raise StorageFull(
                "The server's disk is nearly full (min_free_bytes). Nothing was kept; "
                "remove old batches or files, then send it again."
            )

    def _require_model(self) -> ModelEntry:
        if self._model is None:
            name = self._form.fields.get("model", "").strip()
            if not name:
                raise BadRequest(
                    'The form has no "model". GET /v1/models lists them.', param="model"
                )
            self._model = self._services.registry.get(name)
        return self._model

    # -- when it has arrived -------------------------------------------------------------------

    def _rules(self, model: ModelEntry) -> IntakeRules:
        settings = self._services.settings
        return IntakeRules(
            registry=self._services.registry,
            model=model.name,
            endpoint=None,
            max_line_bytes=settings.max_line_bytes,
            max_requests=settings.max_requests_per_batch,
            max_errors=settings.max_line_errors,
        )

    def _check_lines(self, model: ModelEntry) -> IntakeSummary:
        if self._intake is not None:
            return self._intake.finish(self._path)
        return index_file(self._path, self._folder, self._rules(model))

    def _queue(self, model: ModelEntry, summary: IntakeSummary) -> Batch:
        data, now = self._services.data, self._services.clock()
        input_file = StoredFile(
            id=self._file_id,
            purpose=FilePurpose.BATCH,
            filename=self._form.filename or "upload.jsonl",
            size_bytes=self._size_bytes,
            created_at=now,
        )
        batch = Batch(
            id=self._batch_id,
            dialect=Dialect.NATIVE,
            status=BatchStatus.QUEUED,
            endpoint=summary.endpoints[0],
            model=model.name,
            input_file_id=input_file.id,
            created_at=now,
            queued_at=now,
            total=summary.num_requests,
        )
        input_path, work_dir = data.input_file(input_file.id), data.work_dir(batch.id)
        self._leftovers += [input_path, work_dir, data.log_file(batch.id)]
        with no_room_is_storage_full("receiving the upload"):
            move_durably(self._path, input_path)
            sync_dir(self._folder)
            move_durably(self._folder, work_dir)
        BatchLog(data.log_file(batch.id), clock=self._services.clock).write(
            f"submitted: {summary.num_requests} requests, {self._size_bytes} bytes, "
            f"model {model.name}"
        )
        self._services.store.add_batch(batch, input_file)
        self._leftovers.clear()
        with suppress(OSError):  # the batch is queued; a worker that isn't woken polls
            wake_workers(data)
        return batch
