"""What the store knows of bytes found on the disk: asked for many names at once, by the sweep."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select

from batch_app.core import Batch, StoredFile, UploadStatus
from batch_app.database import batches, files, uploads
from batch_app.store.rows import to_batch, to_file
from batch_app.store.transactions import Transactions


class RemainsStore(Transactions):
    """Names that the store has never heard of are left out of every answer."""

    def is_empty(self) -> bool:
        """Whether no file was ever stored. Deleted ones keep their rows."""
        with self._read() as connection:
            return connection.execute(select(files.c.id).limit(1)).first() is None

    def first_file(self) -> StoredFile | None:
        """The first file ever stored, deleted or not: no two databases have the same."""
        with self._read() as connection:
            row = connection.execute(select(files).order_by(files.c.seq).limit(1)).first()
        return None if row is None else to_file(row)

    def which_files_live(self, file_ids: Collection[str]) -> dict[str, bool]:
        """False: it is marked as deleted."""
        query = select(files.c.id, files.c.deleted_at).where(files.c.id.in_(file_ids))
        with self._read() as connection:
            return {row.id: row.deleted_at is None for row in connection.execute(query)}

    def which_uploads_live(self, upload_ids: Collection[str]) -> dict[str, bool]:
        """False: it takes no parts any more."""
        query = select(uploads.c.id, uploads.c.status).where(uploads.c.id.in_(upload_ids))
        with self._read() as connection:
            return {
                row.id: row.status == UploadStatus.PENDING.value
                for row in connection.execute(query)
            }

    def known_batches(self, batch_ids: Collection[str]) -> dict[str, Batch]:
        query = select(batches).where(batches.c.id.in_(batch_ids))
        with self._read() as connection:
            return {row.id: to_batch(row) for row in connection.execute(query)}
