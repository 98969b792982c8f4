"""Files of the OpenAI dialect: uploaded whole, or in parts that are put together at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta

from batch_app.core import FilePurpose, StoredFile, Upload, UploadPart
from batch_app.errors import BadRequest, Conflict
from batch_app.files import (
    DataDir,
    atomic_writer,
    move_durably,
    new_id,
    no_room_is_storage_full,
)
from batch_app.incoming import Incoming, UploadServices
from batch_app.shared_files import fetch_part, share_input, share_part

COPY_BYTES = 1 << 20
#: Seconds that a file may be set to live: an hour to thirty days.
SHORTEST_LIFE_S, LONGEST_LIFE_S = 3600, 30 * 86400
#: How often all bytes of an upload may arrive: a client whose answer was lost sends a part again,
#: the OpenAI SDK up to twice by itself.
MAX_COPIES = 3


def checked_purpose(purpose: str | None) -> FilePurpose:
    """Raises BadRequest: only files for batches are kept here."""
    if not purpose:
        raise BadRequest('The request has no "purpose". Use "batch".', param="purpose")
    if purpose != FilePurpose.BATCH:
        raise BadRequest(
            f'The purpose {purpose[:64]!r} is not served here. Use "batch".', param="purpose"
        )
    return FilePurpose.BATCH


def checked_life_s(anchor: object, seconds: object, param: str = "expires_after") -> int | None:
    """The seconds of an `expires_after`, None where there is none. Raises BadRequest."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadRequest('The anchor must be "created_at".', param=f"{param}.anchor")
    try:
        life_s = int(str(seconds))
    except ValueError:
        life_s = 0
    if not SHORTEST_LIFE_S <= life_s <= LONGEST_LIFE_S:
        raise BadRequest(
            f"Seconds must be a whole number from {SHORTEST_LIFE_S} to {LONGEST_LIFE_S}.",
            param=f"{param}.seconds",
        )
    return life_s


class FileUpload(Incoming[StoredFile]):
    """`POST /v1/files`."""

    def _accept(self) -> StoredFile:
        services, fields = self.services, self._form.fields
        purpose = checked_purpose(fields.get("purpose"))
        life_s = checked_life_s(
            fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
        )
        now = services.clock()
        file = StoredFile(
            id=new_id("file"),
            purpose=purpose,
            filename=self._form.filename or "upload.jsonl",
            size_bytes=self._size_bytes,
            created_at=now,
            expires_at=now + timedelta(seconds=life_s) if life_s else None,
            owner=services.caller.owner,
        )
        path = services.data.input_file(file.id)
        self._leftovers.append(path)
        with no_room_is_storage_full("receiving the upload"):
            move_durably(self._path, path)
        share_input(services.data, file.id)
        services.store.add_file(file)
        self._leftovers.clear()
        return file


class PartUpload(Incoming[UploadPart]):
    """`POST /v1/uploads/{id}/parts`. Raises also Conflict where the upload has ended."""

    file_field = "data"

    def __init__(self, services: UploadServices, upload: Upload) -> None:
        super().__init__(services)
        self._upload = upload

    def _accept(self) -> UploadPart:
        services, upload = self.services, self._upload
        arrived = services.store.size_of_parts(upload.id)
        size_bytes, limit = self._size_bytes, upload.size_bytes
        if size_bytes > limit or arrived + size_bytes > MAX_COPIES * limit:
            raise BadRequest(
                f"With this part the upload would have {arrived + size_bytes} bytes; "
                f"{limit} were announced.",
                param="data",
            )
        part = UploadPart(new_id("part"), upload.id, self._size_bytes, services.clock())
        path = services.data.upload_dir(upload.id) / part.id
        self._leftovers.append(path)
        with no_room_is_storage_full("receiving the upload"):
            path.parent.mkdir(exist_ok=True)
            move_durably(self._path, path)
        share_part(services.data, upload.id, part.id)
        try:
            services.store.add_part(part)
        except Conflict:  # it ended meanwhile: nobody else would remove the folder
            self._leftovers.append(path.parent)
            raise
        self._leftovers.clear()
        return part


def assemble(
    data: DataDir,
    upload: Upload,
    parts: Sequence[UploadPart],
    *,
    md5: str | None,
    now: datetime,
) -> StoredFile:
    """Put the parts, in this order, together as an input file; the store is told by the caller.

    Raises:
        BadRequest: the parts don't make up what was announced (size, or `md5`, in hex).
        FileNotFoundError: the upload ended meanwhile, and its parts are gone.
        StorageFull: there is no room for the file beside its parts.
        ObjectsUnavailable.
    """
    num_bytes = sum(part.size_bytes for part in parts)
    if num_bytes != upload.size_bytes:
        raise BadRequest(
            f"The parts have {num_bytes} bytes; {upload.size_bytes} were announced.",
            param="part_ids",
        )
    file_id = new_id("file")
    digest = hashlib.md5(usedforsecurity=False)
    with atomic_writer(data.input_file(file_id)) as target:
        for part in parts:
            with fetch_part(data, upload.id, part.id).open("rb") as source:
                while chunk := source.read(COPY_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
        if md5 and digest.hexdigest() != md5.lower():
            raise BadRequest(
                "The file is not the one of this MD5 checksum: a part was damaged on its way, "
                "or the order is wrong.",
                param="md5",
            )
    share_input(data, file_id)
    life_s = upload.file_expires_after_s
    return StoredFile(
        id=file_id,
        purpose=upload.purpose,
        filename=upload.filename,
        size_bytes=num_bytes,
        created_at=now,
        expires_at=now + timedelta(seconds=life_s) if life_s else None,
        owner=upload.owner,
    )
