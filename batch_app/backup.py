"""Back-up and restore of a site, also of one that is at work.

A back-up is a folder: the database as one file of SQLite's, whatever database it comes from, the
files under `batches/`, and `manifest.json` with the size and SHA-256 of each. So one that was made
on SQLite can be restored to PostgreSQL, and the other way round.

The order makes it whole. The database is copied first; every file that it speaks of is in its place
by then, and stays there unless somebody deletes it. A results log is copied as far as it goes, and
recovers like one that a crash cut off; that of a batch which ends meanwhile is left out, so that
its requests run again after a restore.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from batch_app.core import utc_now
from batch_app.database import copy_sqlite, sqlite_path
from batch_app.errors import ConfigError
from batch_app.files import DataDir, atomic_writer, no_room_is_storage_full, sync_dir
from batch_app.store.copying import copy_database, require_empty

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE = "batch_jobs.db"
#: Of the data folder: what is copied. Uploads under way are not: nothing was promised of them.
FOLDERS = ("active", "input", "output", "logs", "uploads")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class BackupSummary:
    num_files: int
    num_bytes: int


def back_up(data: DataDir, database_url: str, target: Path) -> BackupSummary:
    """Write a back-up into a folder that doesn't exist yet; it appears when it is whole.

    Raises:
        ConfigError: the folder exists, or the database hasn't got this version's tables.
        StoreUnavailable, StorageFull, OSError: nothing remains.
    """
    database = sqlite_path(database_url)
    if target.exists():
        raise ConfigError(f"{target} exists already. Name a folder that doesn't.")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with no_room_is_storage_full("writing the back-up"):
            unfinished.mkdir(mode=0o700, parents=True)  # prompts, answers, secrets of webhooks
            if database is None:
                copy_database(database_url, f"sqlite:///{(unfinished / DATABASE).absolute()}")
            else:
                copy_sqlite(database, unfinished / DATABASE)
            entries = [_described(unfinished, unfinished / DATABASE)]
            for folder in FOLDERS:
                copy = unfinished / "batches" / folder
                _copy_tree(data.batches / folder, copy)
                entries += [_described(unfinished, path) for path in _files_under(copy)]
            manifest = {"format": FORMAT, "made_at": utc_now().isoformat(), "files": entries}
            with atomic_writer(unfinished / MANIFEST) as file:
                file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            unfinished.rename(target)
            sync_dir(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return BackupSummary(len(entries), sum(int(str(entry["bytes"])) for entry in entries))


def restore(source: Path, data: DataDir, database_url: str) -> BackupSummary:
    """Put a back-up where a site's files belong. Every byte is checked before anything is written.

    Raises:
        ConfigError: it is no back-up, or damaged; or there is something in the database, or in
            the data folder, already.
        StoreUnavailable, StorageFull, OSError.
    """
    database = sqlite_path(database_url)
    if database is None:
        require_empty(database_url)
        if any(_files_under(data.batches)):
            raise ConfigError(
                f"{data.batches} isn't empty. Move it away, or name another with --data-dir."
            )
    elif database.exists():
        raise ConfigError(
            f"{database} exists. A back-up is restored to an empty data folder: move the present "
            "one away, or name another with --data-dir."
        )
    entries = _checked(source)
    data.create()
    with no_room_is_storage_full("restoring"):
        for name in entries:
            if name != DATABASE:
                _copy(source / name, data.root / name)
        # Last: without it the rest is not looked at.
        if database is None:
            _fill_database(source / DATABASE, database_url)
            return BackupSummary(len(entries), sum(entries.values()))
        database.parent.mkdir(parents=True, exist_ok=True)
        with (source / DATABASE).open("rb") as there, atomic_writer(database) as here:
            shutil.copyfileobj(there, here, _PIECE)
    return BackupSummary(len(entries), sum(entries.values()))


def _fill_database(source: Path, database_url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / DATABASE  # to be brought up to date
        shutil.copyfile(source, copy)
        copy_database(f"sqlite:///{copy}", database_url, bring_up_to_date=True)


def _checked(source: Path) -> dict[str, int]:
    """The files of a back-up and their sizes, each as the manifest says."""
    try:
        manifest = orjson.loads((source / MANIFEST).read_bytes())
        form, entries = manifest["format"], manifest["files"]
        listed = {entry["path"]: (entry["bytes"], entry["sha256"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source} is not a back-up: {error}") from error
    if form != FORMAT:
        raise ConfigError(f"{source} is a back-up of form {form}; this version reads {FORMAT}.")
    for name, expected in listed.items():
        path = source / name
        inside = path.resolve().is_relative_to(source.resolve())
        if not inside or not path.is_file() or _size_and_digest(path) != expected:
            raise ConfigError(f"The back-up is damaged: {name} is not as its manifest says.")
    return {name: size for name, (size, _) in listed.items()}


def _copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of files, and of folders of files, each of them whole or not at all."""
    target.mkdir(parents=True)
    if not source.is_dir():
        return
    for entry in sorted(source.iterdir()):
        copy = target / entry.name
        if not entry.is_dir():
            if not entry.name.endswith(".tmp"):
                _copy(entry, copy)
            continue
        paths = list(_files_under(entry))
        for path in paths:
            _copy(path, copy / path.relative_to(entry))
        if not all(path.exists() for path in paths):
            shutil.rmtree(copy, ignore_errors=True)  # being removed: it may lack its beginning


def _files_under(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(".tmp"):
            yield path


def _copy(source: Path, target: Path) -> bool:
    """Copy a file as long as it is now. False if it is gone."""
    try:
        with source.open("rb") as there:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as here:
                _copy_bytes(there, here, os.fstat(there.fileno()).st_size)
                here.flush()
                os.fsync(here.fileno())
    except FileNotFoundError:
        return False  # deleted, or its batch has ended meanwhile
    return True


def _copy_bytes(there: BinaryIO, here: BinaryIO, length: int) -> None:
    while length > 0:
        piece = there.read(min(_PIECE, length))
        if not piece:
            return
        here.write(piece)
        length -= len(piece)


def _described(root: Path, path: Path) -> dict[str, str | int]:
    size, digest = _size_and_digest(path)
    return {"path": str(path.relative_to(root)), "bytes": size, "sha256": digest}


def _size_and_digest(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with closing(path.open("rb")) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()
