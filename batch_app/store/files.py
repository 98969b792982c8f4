"""Files and uploads in the store. The bytes are elsewhere (`batch_app.files`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from batch_app.core import (
    TERMINAL,
    FilePurpose,
    StoredFile,
    Upload,
    UploadPart,
    UploadStatus,
)
from batch_app.database import batches, files, upload_parts, uploads
from batch_app.errors import Conflict, NotFound
from batch_app.keys import EVERYBODY, Caller
from batch_app.store.rows import to_file, to_upload
from batch_app.store.transactions import Transactions
from batch_app.store.visibility import visible


class FileStore(Transactions):
    def add_file(self, file: StoredFile) -> None:
        with self._write() as connection:
            insert_file(connection, file)

    def get_file(self, file_id: str, *, seen_by: Caller = EVERYBODY) -> StoredFile:
        """Raises NotFound, also for a deleted one, and for one that is another's."""
        with self._read() as connection:
            return _get_file(connection, file_id, seen_by)

    def list_files(
        self,
        *,
        limit: int,
        after: str | None = None,
        purpose: FilePurpose | None = None,
        newest_first: bool = True,
        seen_by: Caller = EVERYBODY,
    ) -> tuple[list[StoredFile], bool]:
        """A page of files, and whether there are more. `after`: the last id of the page before.

        Raises NotFound when `after` is unknown; a file deleted meanwhile still marks its place.
        """
        order = files.c.seq.desc() if newest_first else files.c.seq.asc()
        query = select(files).where(files.c.deleted_at.is_(None)).order_by(order).limit(limit + 1)
        query = visible(query, files, seen_by)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose.value)
        with self._read() as connection:
            if after is not None:
                place = select(files.c.seq).where(files.c.id == after)
                seq = connection.scalar(visible(place, files, seen_by))
                if seq is None:
                    raise NotFound(f"No such file: {after}", param="after")
                query = query.where(files.c.seq < seq if newest_first else files.c.seq > seq)
            rows = connection.execute(query).all()
        return [to_file(row) for row in rows[:limit]], len(rows) > limit

    def file_names(
        self, file_ids: Collection[str], *, seen_by: Caller = EVERYBODY
    ) -> dict[str, str]:
        """What files are called, by their ids, deleted ones too; others' are left out."""
        query = select(files.c.id, files.c.filename).where(files.c.id.in_(file_ids))
        with self._read() as connection:
            rows = connection.execute(visible(query, files, seen_by)).all()
        return {row.id: row.filename for row in rows}

    def delete_file(
        self, file_id: str, now: datetime, *, seen_by: Caller = EVERYBODY
    ) -> StoredFile:
        """Mark a file as deleted; removing its bytes is the caller's next step.

        Raises:
            NotFound: there is no such file (any more).
            Conflict: a batch that hasn't finished needs it.
        """
        with self._write() as connection:
            file = _get_file(connection, file_id, seen_by, for_update=True)
            batch_id: str | None = connection.scalar(_unfinished_batch_of(file_id))
            if batch_id is not None:
                raise Conflict(
                    f"File {file_id} is the input of {_named(connection, batch_id, seen_by)}, "
                    "which has not finished. Cancel that batch first, or wait for its end.",
                    code="file_in_use",
                )
            connection.execute(update(files).where(files.c.id == file_id).values(deleted_at=now))
        return file

    def expired_files(
        self,
        now: datetime,
        outlived: Mapping[FilePurpose, datetime] | None = None,
        limit: int = 100,
    ) -> list[StoredFile]:
        """Files whose time has come, but for those that an unfinished batch needs.

        `outlived`: of these purposes, also those made before then.
        """
        too_old = [
            and_(files.c.purpose == purpose.value, files.c.created_at < before)
            for purpose, before in (outlived or {}).items()
        ]
        in_use = (
            select(batches.c.id)
            .where(batches.c.input_file_id == files.c.id)
            .where(batches.c.status.not_in([status.value for status in TERMINAL]))
            .exists()
        )
        query = (
            select(files)
            .where(files.c.deleted_at.is_(None))
            .where(or_(files.c.expires_at < now, *too_old))
            .where(~in_use)
            .order_by(files.c.seq)
            .limit(limit)
        )
        with self._read() as connection:
            return [to_file(row) for row in connection.execute(query)]

    def batch_of_output(self, file_id: str) -> str | None:
        """The id of the batch that this file was published for, if it was."""
        query = select(batches.c.id).where(
            or_(batches.c.output_file_id == file_id, batches.c.error_file_id == file_id)
        )
        with self._read() as connection:
            found: str | None = connection.scalar(query)
        return found

    # -- uploads -------------------------------------------------------------------------------

    def add_upload(self, upload: Upload) -> None:
        values = asdict(upload)
        values |= {"purpose": upload.purpose.value, "status": upload.status.value}
        with self._write() as connection:
            connection.execute(insert(uploads).values(values))

    def get_upload(self, upload_id: str, now: datetime, *, seen_by: Caller = EVERYBODY) -> Upload:
        """Raises NotFound. One that ran out of time is `expired` from then on."""
        with self._read() as connection:
            upload = _get_upload(connection, upload_id, seen_by)
        if upload.status is UploadStatus.PENDING and upload.expires_at < now:
            return self._end_upload(upload_id, UploadStatus.EXPIRED)
        return upload

    def add_part(self, part: UploadPart) -> None:
        """Raises Conflict when the upload takes no parts any more."""
        with self._write() as connection:
            require_pending(_get_upload(connection, part.upload_id, for_update=True))
            connection.execute(insert(upload_parts).values(asdict(part)))

    def get_parts(self, upload_id: str, *, seen_by: Caller = EVERYBODY) -> list[UploadPart]:
        """The parts of an upload, in order of arrival."""
        query = (
            select(upload_parts)
            .where(upload_parts.c.upload_id == upload_id)
            .order_by(upload_parts.c.created_at, upload_parts.c.id)
        )
        if not seen_by.sees_all:
            query = visible(query.join(uploads), uploads, seen_by)
        with self._read() as connection:
            return [UploadPart(**row._mapping) for row in connection.execute(query)]

    def size_of_parts(self, upload_id: str) -> int:
        """Bytes that have arrived."""
        query = select(func.coalesce(func.sum(upload_parts.c.size_bytes), 0)).where(
            upload_parts.c.upload_id == upload_id
        )
        with self._read() as connection:
            return int(connection.scalar(query) or 0)

    def complete_upload(
        self, upload_id: str, file: StoredFile, *, seen_by: Caller = EVERYBODY
    ) -> Upload:
        """Turn an upload into its file, in one step. Raises NotFound, Conflict."""
        with self._write() as connection:
            require_pending(_get_upload(connection, upload_id, seen_by, for_update=True))
            insert_file(connection, file)
            connection.execute(
                update(uploads)
                .where(uploads.c.id == upload_id)
                .values(status=UploadStatus.COMPLETED.value, file_id=file.id)
            )
            return _get_upload(connection, upload_id)

    def cancel_upload(self, upload_id: str, *, seen_by: Caller = EVERYBODY) -> Upload:
        """Raises NotFound, Conflict. Cancelling twice is harmless."""
        with self._read() as connection:
            upload = _get_upload(connection, upload_id, seen_by)
        if upload.status is UploadStatus.CANCELLED:
            return upload
        return self._end_upload(upload_id, UploadStatus.CANCELLED)

    def expired_uploads(self, now: datetime) -> list[Upload]:
        """Uploads that were neither completed nor cancelled in time."""
        query = (
            select(uploads)
            .where(uploads.c.status == UploadStatus.PENDING.value)
            .where(uploads.c.expires_at < now)
        )
        with self._read() as connection:
            return [to_upload(row) for row in connection.execute(query)]

    def _end_upload(self, upload_id: str, status: UploadStatus) -> Upload:
        with self._write() as connection:
            upload = _get_upload(connection, upload_id, for_update=True)
            if upload.status is status:
                return upload
            require_pending(upload)
            connection.execute(
                update(uploads).where(uploads.c.id == upload_id).values(status=status.value)
            )
            return _get_upload(connection, upload_id)


def insert_file(connection: Connection, file: StoredFile) -> None:
    """Insert a file within the caller's transaction."""
    connection.execute(insert(files).values(asdict(file) | {"purpose": file.purpose.value}))


def insert_files(connection: Connection, new_files: Sequence[StoredFile]) -> None:
    for file in new_files:
        insert_file(connection, file)


def _get_file(
    connection: Connection, file_id: str, seen_by: Caller, *, for_update: bool = False
) -> StoredFile:
    query = select(files).where(files.c.id == file_id).where(files.c.deleted_at.is_(None))
    query = visible(query, files, seen_by)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        raise NotFound(f"No such file: {file_id}", param="file_id")
    return to_file(row)


def _unfinished_batch_of(file_id: str) -> Select[Any]:
    return (
        select(batches.c.id)
        .where(batches.c.input_file_id == file_id)
        .where(batches.c.status.not_in([status.value for status in TERMINAL]))
        .limit(1)
    )


def _get_upload(
    connection: Connection,
    upload_id: str,
    seen_by: Caller = EVERYBODY,
    *,
    for_update: bool = False,
) -> Upload:
    query = visible(select(uploads).where(uploads.c.id == upload_id), uploads, seen_by)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        raise NotFound(f"No such upload: {upload_id}", param="upload_id")
    return to_upload(row)


def require_pending(upload: Upload) -> None:
    """Raises Conflict when the upload takes nothing any more."""
    if upload.status is not UploadStatus.PENDING:
        raise Conflict(
            f"Upload {upload.id} is {upload.status.value}: begin a new one.",
            code="upload_not_pending",
        )


def _named(connection: Connection, batch_id: str, seen_by: Caller) -> str:
    """The id of a batch, for those who may know it: who sees all may run others' files."""
    query = visible(select(batches.c.id).where(batches.c.id == batch_id), batches, seen_by)
    return batch_id if connection.scalar(query) else "a batch"
