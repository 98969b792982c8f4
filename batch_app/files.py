"""Where bytes lie under the data folder, and how they get there whole.

```
<data_dir>/batches/incoming/           uploads under way; swept when left behind
                   input/FILE.jsonl    input files
                   output/FILE.jsonl   published files; BATCH.EPOCH.jsonl: all lines, in input order
                   logs/BATCH.log      one log a batch
                   uploads/UPLOAD/PART  a file that arrives in parts
                   active/BATCH/       index and results log of a batch, gone once it is published
<data_dir>/database/batch_jobs.db      the store, when it is SQLite
<data_dir>/logs/audit.jsonl            who did what; audit.jsonl.1 and so on: earlier ones
```

Names are ids that the server made, never anything a user sent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from batch_app.core import Batch
from batch_app.errors import StorageFull, StorageLost
from batch_app.faults import crash_point
from batch_app.identity import PathIdentity
from batch_app.objects import Objects

#: With less room than this a worker can't go on.
FULL_BYTES = 64 * 1024
#: Seconds after which a folder that nobody has locked isn't about to be.
SETTLED_S = 60.0
#: What the operating system says when there is no room: full disk, quota, file size limit.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def new_id(prefix: str) -> str:
    """A fresh id: the prefix and 24 hexadecimal digits (96 random bits).

    Joined by `_`, except for files, whose ids begin with `file-` in the OpenAI dialect.
    """
    joint = "-" if prefix == "file" else "_"
    return f"{prefix}{joint}{secrets.token_hex(12)}"


def derived_file_id(batch: Batch, kind: str) -> str:
    """The id of a file published for this batch under its present epoch.

    Derived, so that publishing again after a crash writes the same file again; different for every
    epoch, so that a worker that has lost the batch can't overwrite what its successor published.
    """
    digest = hashlib.sha256(f"{batch.id}/{batch.epoch}/{kind}".encode()).hexdigest()
    return f"file-{digest[:24]}"


@dataclass(frozen=True, slots=True)
class DataDir:
    """The paths under one data folder.

    `objects`: where the files are for all machines; what lies here is then a copy of that, or on
    its way to it (`batch_app.shared_files`). None: what lies here is all there is.
    """

    root: Path
    objects: Objects | None = field(default=None, compare=False, repr=False)
    _made: list[PathIdentity] = field(default_factory=list, compare=False, repr=False)

    @property
    def batches(self) -> Path:
        return self.root / "batches"

    @property
    def incoming(self) -> Path:
        return self.batches / "incoming"

    def input_file(self, file_id: str) -> Path:
        return self.batches / "input" / f"{file_id}.jsonl"

    def output_file(self, file_id: str) -> Path:
        return self.batches / "output" / f"{file_id}.jsonl"

    def results_file(self, batch: Batch) -> Path:
        """All lines of a finished batch, successes and failures, in input order.

        The epoch is in the name for the reason `derived_file_id` gives.
        """
        return self.batches / "output" / f"{batch.id}.{batch.epoch}.jsonl"

    def log_file(self, batch_id: str) -> Path:
        return self.batches / "logs" / f"{batch_id}.log"

    def work_dir(self, batch_id: str) -> Path:
        return self.batches / "active" / batch_id

    def upload_dir(self, upload_id: str) -> Path:
        """The parts of a file that arrives in parts, each under its id."""
        return self.batches / "uploads" / upload_id

    @property
    def wakeup_file(self) -> Path:
        return self.root / "database" / "queue.signal"

    @property
    def key_changes_file(self) -> Path:
        """Grows by a byte with every key that is made or revoked, and every sign-out."""
        return self.root / "database" / "keys.changes"

    @property
    def audit_file(self) -> Path:
        return self.root / "logs" / "audit.jsonl"

    @property
    def lowered_limits_file(self) -> Path:
        return self.root / "lowered-limits.json"

    @property
    def engine_log(self) -> Path:
        return self.root / "logs" / "engine.log"

    def create(self) -> None:
        """Make the folders that are not there yet; a new data folder is for its user alone."""
        if not self.root.exists():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        for folder in (
            self.incoming,
            self.batches / "input",
            self.batches / "output",
            self.batches / "logs",
            self.batches / "active",
            self.batches / "uploads",
            self.root / "database",
            self.engine_log.parent,
        ):
            folder.mkdir(parents=True, exist_ok=True)
        self._made[:] = [PathIdentity.of(folder) for folder in (self.root, self.batches)]

    def require_present(self) -> None:
        """Raises StorageLost where the folder that was there at the start isn't there any more."""
        for folder in self._made:
            change = folder.change()
            if change is not None:
                raise StorageLost(
                    f"The data folder was {change} while this process ran: what is "
                    "written now would be lost. Put it back (the same folder, or its disk), or "
                    "restart the API server and the worker to begin with what is there now."
                )

    def trouble(self) -> str | None:
        """Why nothing can be written to the folder at the moment; None if nothing is known."""
        try:
            self.require_present()
            disk = os.statvfs(self.root)
        except StorageLost as error:
            return error.message
        except OSError:
            return "The data folder can't be reached."
        if disk.f_flag & os.ST_RDONLY:
            return "The data folder's disk is read-only."
        if disk.f_bavail * disk.f_frsize < FULL_BYTES:
            return "No space left on the data folder's disk."
        return None

    def sweep_incoming(self, older_than_s: float = SETTLED_S) -> int:
        """Remove what interrupted uploads left behind. Returns how many there were.

        A folder that somebody still works in is locked; a very young one may be about to be.
        """
        removed = 0
        for leftover in self.incoming.iterdir():
            try:
                if time.time() - leftover.stat().st_mtime < older_than_s or _is_locked(leftover):
                    continue
                remove_tree(leftover)
            except FileNotFoundError:
                continue  # its own upload, or another server, was faster
            removed += 1
        return removed


class IncomingFolder:
    """A folder under `incoming/` to make something in, locked while it is open.

    What is in it when it is closed is removed; what is wanted is moved out before.
    """

    def __init__(self, data: DataDir) -> None:
        self.path = data.incoming / new_id("incoming")
        self._descriptor = -1

    def open(self) -> IncomingFolder:
        self.path.mkdir()
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return self

    def close(self) -> None:
        """Idempotent."""
        remove_tree(self.path)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Path:
        return self.open().path

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_locked(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def no_room_is_storage_full(doing: str) -> Iterator[None]:
    """Turn a full disk into StorageFull; other OS errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFull(f"No space left on the disk while {doing}.") from error
        raise


def sync_dir(folder: Path) -> None:
    """Make names created in, or moved to, this folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole and durable when the block ends, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with no_room_is_storage_full(f"writing {path.name}"), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        crash_point("file-written")
        move_durably(temporary, path)
        crash_point("file-moved")
    finally:
        temporary.unlink(missing_ok=True)


def move_durably(source: Path, target: Path) -> None:
    """Rename within one file system, and make the rename survive a power loss."""
    source.replace(target)
    sync_dir(target.parent)


def remove_tree(path: Path) -> None:
    """Remove a file or a folder; nothing happens if it isn't there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def wake_workers(data: DataDir) -> None:
    """Tell the workers that share this data folder that the queue has changed."""
    data.wakeup_file.touch()
