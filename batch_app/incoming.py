"""A form on its way in: the one file of a multipart body, to disk, in little memory.

The body goes once to disk. All blocking work is in a thread, one chunk at a time, so that memory
holds a chunk or two whatever the file's size, and a slow disk slows the client down, not the
server. What a crash leaves is a folder under `incoming/`, which the next start sweeps away; a
refused or cut upload leaves nothing.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import anyio
from anyio import CancelScope, CapacityLimiter

from batch_app.checkers import CheckerPlaces
from batch_app.config import MIB, Settings
from batch_app.core import Batch, utc_now
from batch_app.errors import BadRequest, StorageFull, TooLarge, TooMany, UnsupportedMedia
from batch_app.files import DataDir, IncomingFolder, no_room_is_storage_full, remove_tree
from batch_app.keys import EVERYBODY, Caller
from batch_app.multipart import Form
from batch_app.registry import ModelRegistry
from batch_app.store import Store

CHUNK_BYTES = 1 * MIB
#: Uploads worked on at once; more of them wait for their turn, chunk by chunk. More threads would
#: only compete for the interpreter with the calls that ask how far a batch is.
MAX_BUSY_UPLOADS = 4
#: How often the free room is looked at while a file arrives.
ROOM_CHECK_BYTES = 64 * MIB


@dataclass(frozen=True)
class UploadServices:
    """What an upload needs of the server, and who sends it.

    `clock`, `limiter`, `under_way` and `checker_places` are shared by all uploads. `appraise` tells
    from the index in its work folder what a batch asks for; `queued` is called when there is a new
    one.
    """

    settings: Settings
    data: DataDir
    store: Store
    registry: ModelRegistry
    limiter: CapacityLimiter
    clock: Callable[[], datetime] = utc_now
    caller: Caller = EVERYBODY
    under_way: Counter[str | None] = field(default_factory=Counter)
    appraise: Callable[[Batch], Sequence[object] | None] = lambda _: None
    queued: Callable[[], None] = lambda: None
    checker_places: CheckerPlaces | None = None


T = TypeVar("T")


async def receive(
    incoming: Incoming[T], headers: dict[str, str], chunks: AsyncIterator[bytes]
) -> T:
    """Take a request's body in, and return what it became.

    Args:
        headers: of the request, with lower-case names.
        chunks: of its body.

    Raises:
        BadRequest: the form can't be used (`TooLarge`, `UnsupportedMedia` among it).
        StorageFull: there is no room.
        TooMany: its owner has too many uploads under way.
        StoreUnavailable: the database does not answer.
        ObjectsUnavailable: the object storage does not answer.
        … and what the kind of upload adds. Whatever is raised, nothing of the upload remains.
    """
    _check_headers(incoming.services.settings, headers)
    incoming.begin(headers.get("content-type"))
    with under_way(incoming.services):
        return await _received(incoming, chunks)


@contextmanager
def under_way(services: UploadServices) -> Iterator[None]:
    """Counts the upload, or what costs as much, for as long as it lasts. Raises TooMany."""
    owner, limit = services.caller.owner, services.settings.max_open_uploads
    if services.under_way[owner] >= limit:
        raise TooMany(
            f"You have {limit} uploads under way (max_open_uploads). Send one after the other.",
            code="too_many_uploads",
            retry_after_s=5,
        )
    services.under_way[owner] += 1
    try:
        yield
    finally:
        services.under_way[owner] -= 1
        if not services.under_way[owner]:
            del services.under_way[owner]


async def _received(incoming: Incoming[T], chunks: AsyncIterator[bytes]) -> T:
    limiter = incoming.services.limiter
    in_thread = anyio.to_thread.run_sync
    try:
        await in_thread(incoming.open, limiter=limiter)
        async for chunk in _gathered(chunks, CHUNK_BYTES):
            await in_thread(incoming.write, chunk, limiter=limiter)
        return await in_thread(incoming.finish, limiter=limiter)
    finally:
        # Also when the client is gone or the server stops: the rest must still be removed.
        with CancelScope(shield=True):
            await in_thread(incoming.discard)


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


class Incoming(ABC, Generic[T]):
    """One upload. Its methods block, and are called in threads, never two at a time."""

    #: The name of the form's field that holds the file.
    file_field = "file"

    def __init__(self, services: UploadServices) -> None:
        self.services = services
        self._incoming = IncomingFolder(services.data)
        self._folder = self._incoming.path
        self._path = self._folder / "input.jsonl"
        self._file: BinaryIO | None = None
        self._size_bytes = 0
        self._room_checked_at = 0
        self._leftovers: list[Path] = []

    def begin(self, content_type: str | None) -> None:
        """Raises BadRequest, UnsupportedMedia."""
        self._form = Form(
            content_type,
            file_field=self.file_field,
            on_file=self._begin_file,
            on_data=self._take,
        )

    def open(self) -> None:
        self._check_room()
        with no_room_is_storage_full("receiving the upload"):
            self._incoming.open()

    def write(self, chunk: bytes) -> None:
        self._form.write(chunk)

    def finish(self) -> T:
        """All bytes are here and on disk: make of them what they are for."""
        self._form.finish()
        file = self._file
        if file is None:
            raise BadRequest(f'The form has no "{self.file_field}".', param=self.file_field)
        with no_room_is_storage_full("receiving the upload"):
            os.utime(file.fileno())  # an orphan's age counts from here, however slow its client was
            os.fsync(file.fileno())
            file.close()
        return self._accept()

    def discard(self) -> None:
        """Remove what has not become part of something. Harmless when there is nothing."""
        if self._file is not None:
            self._file.close()
        for path in self._leftovers:
            remove_tree(path)
        self._incoming.close()

    @abstractmethod
    def _accept(self) -> T:
        """Check the whole, put the file into its place and tell the store. Clears `_leftovers`."""

    # -- while the body arrives ----------------------------------------------------------------

    def _begin_file(self, fields: dict[str, str]) -> None:
        with no_room_is_storage_full("receiving the upload"):
            # Unbuffered: pieces are large, and a failed write must not come back at close.
            self._file = self._path.open("wb", buffering=0)

    def _take(self, piece: bytes) -> None:
        assert self._file is not None
        self._size_bytes += len(piece)
        if self._size_bytes > self.services.settings.max_upload_bytes:
            raise _too_large(self.services.settings)
        if self._size_bytes - self._room_checked_at >= ROOM_CHECK_BYTES:
            self._room_checked_at = self._size_bytes
            self._check_room()
        with no_room_is_storage_full("receiving the upload"):
            rest = memoryview(piece)
            while rest:
                rest = rest[self._file.write(rest) :]

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.services.data.incoming).free
        if free < self.services.settings.min_free_bytes:
            raise StorageFull(
                "The server's disk is nearly full (min_free_bytes). Nothing was kept; "
                "remove old batches or files, then send it again."
            )
