"""The data folder and the database, looked at without changing them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from batch_app.config import Settings
from batch_app.database import sqlite_path
from batch_app.doctor.finding import Finding, fail, ok, size, warn
from batch_app.errors import ConfigError, ObjectsUnavailable, StorageFull, StoreUnavailable
from batch_app.objects import open_objects
from batch_app.origins import masked
from batch_app.store import Store

#: File systems on which SQLite's locks, or its shared memory, can't be relied on.
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "lustre"})
#: With less room than so many times `min_free_bytes` it is time to look.
_TIGHT = 4


def look_at_storage(settings: Settings) -> Iterator[Finding]:
    yield from _folder("data folder", settings.data_dir, settings.min_free_bytes)
    yield from _folder("benchmarks", settings.benchmarks_dir, 0)
    yield _database(settings)
    if settings.storage_url:
        yield _objects(settings)


def has_database(settings: Settings) -> bool:
    """Whether there is one to be asked: asking makes the file of SQLite's where it isn't."""
    try:
        path = sqlite_path(settings.resolved_database_url)
    except Exception:  # noqa: BLE001 - an address that is none: whoever connects says so
        return True
    return path is None or path.exists()


def _folder(subject: str, folder: Path, min_free_bytes: int) -> Iterator[Finding]:
    place = folder.resolve()
    there = place
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield fail(subject, f"{there} is no folder", "move it away, or set another folder")
        return
    problem = _unwritable(there)
    if problem:
        yield fail(
            subject,
            f"{there} can't be written: {problem}",
            "give it to the user that runs this (chown, a disk that isn't read-only), or set "
            "another folder",
        )
        return
    free = shutil.disk_usage(there).free
    made = "" if place.exists() else ", made at the first start"
    if min_free_bytes and free < min_free_bytes:
        yield fail(
            subject,
            f"{place}{made}: {size(free)} free, less than min_free_bytes ({size(min_free_bytes)}): "
            "uploads are refused",
            "make room: delete files that are no longer needed, or set retention_input_s and "
            "retention_output_s",
        )
    elif min_free_bytes and free < _TIGHT * min_free_bytes:
        yield warn(
            subject,
            f"{place}{made}: only {size(free)} free",
            "make room soon; at min_free_bytes uploads are refused",
        )
    else:
        yield ok(subject, f"{place}{made}, {size(free)} free")
    kind = _file_system(there)
    if min_free_bytes and kind in _REMOTE:
        yield warn(
            subject,
            f"{place} is on a {kind} file system, where SQLite's locks can't be relied on",
            "a local disk, or a database_url of another database",
        )


def _unwritable(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _file_system(folder: Path) -> str:
    """The kind of the file system that holds this folder; empty where that isn't known."""
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return ""
    mounts = [(row[1], row[2]) for row in rows if len(row) > 2 and folder.is_relative_to(row[1])]
    return max(mounts, key=lambda mount: len(mount[0]), default=("", ""))[1]


def _objects(settings: Settings) -> Finding:
    subject = "object storage"
    try:
        objects = open_objects(settings)
        assert objects is not None
        objects.ping()
    except ConfigError as error:
        return fail(subject, error.message, "correct storage_url; see docs/object_storage.md")
    except ObjectsUnavailable as error:
        return fail(
            subject,
            f"{settings.storage_url}: {error.message}",
            "is the bucket (or the folder) there, the endpoint right, and do the credentials in "
            "the environment allow to list it?",
        )
    return ok(subject, f"{settings.storage_url} answers")


def _database(settings: Settings) -> Finding:
    subject = "database"
    url = masked(settings.resolved_database_url)
    if not has_database(settings):
        return ok(subject, f"{url}, made at the first start")
    try:
        store = Store(settings.resolved_database_url)
        try:
            present, newest = store.revisions()
        finally:
            store.close()
    except (StoreUnavailable, StorageFull) as error:
        return fail(
            subject,
            f"{url}: {error.message}",
            "is its server up, the disk there, the file a database? Else restore a back-up "
            "(vllm-batch restore)",
        )
    except Exception as error:  # noqa: BLE001 - a driver that is missing, an address that is none
        return fail(
            subject,
            f"{url} can't be opened: {type(error).__name__}",
            "correct database_url; other databases than SQLite need their driver installed",
        )
    if present == newest:
        return ok(subject, f"{url}, up to date")
    if present is None:
        return warn(subject, f"{url} is empty", "nothing: the next start makes its tables")
    if present > newest:
        return fail(
            subject,
            f"{url} was made by a newer version (its tables are of {present}, these of {newest})",
            "use that version again, or restore a back-up of this one",
        )
    return warn(
        subject,
        f"{url} is of an older version ({present}, now {newest})",
        "vllm-batch backup first; the next start brings it up to date",
    )
