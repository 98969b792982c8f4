"""The files of a site that all its machines see: in the object storage, where there is one.

```
input/FILE.jsonl            input files
index/BATCH.tar             the three files of a batch's index
results/BATCH/SEGMENT/FROM  results log of an unfinished batch (`batch_app.result_copies`)
output/FILE.jsonl           published files
output/BATCH.EPOCH.jsonl    all lines of a batch that has both output and errors
logs/BATCH/FOLDER.log       what the processes of one data folder wrote to a batch's log
uploads/UPLOAD/PART         a file that arrives in parts
site                        which database these belong to
```

`share_…` puts what lies in the data folder there, before anything else counts on it; `fetch_…` gets
it where the data folder lacks it, and says where it lies. Without object storage the first do
nothing, and the others only say where it lies.

Raise ObjectsUnavailable and StorageFull, `fetch_…` also FileNotFoundError.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tarfile
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from pathlib import Path

from batch_app.core import Batch, FilePurpose, StoredFile
from batch_app.errors import ObjectsUnavailable, StorageFull
from batch_app.files import (
    DataDir,
    IncomingFolder,
    atomic_writer,
    no_room_is_storage_full,
    remove_tree,
)
from batch_app.objects import Objects

logger = logging.getLogger(__name__)

INDEX_FILES = ("index.bin", "prefixes.bin", "index.json")  # the last one makes it an index
#: How a line of a batch's log begins, so that those of several machines can be put in order.
_STAMP_CHARS = len("2026-01-01 00:00:00Z")


def _nothing() -> None:
    pass


def input_name(file_id: str) -> str:
    return f"input/{file_id}.jsonl"


def output_name(file_id: str) -> str:
    return f"output/{file_id}.jsonl"


def file_name(file: StoredFile) -> str:
    return input_name(file.id) if file.purpose is FilePurpose.BATCH else output_name(file.id)


def results_name(batch: Batch) -> str:
    """All lines of a batch are those of its only file, where it has only one."""
    if batch.output_file_id and batch.error_file_id:
        return f"output/{batch.id}.{batch.epoch}.jsonl"
    return output_name(batch.output_file_id or batch.error_file_id or "none")


def index_name(batch_id: str) -> str:
    return f"index/{batch_id}.tar"


def results_folder(batch_id: str) -> str:
    return f"results/{batch_id}"


# -- input files -----------------------------------------------------------------------------------


def share_input(data: DataDir, file_id: str) -> None:
    if data.objects is not None:
        data.objects.put_file(input_name(file_id), data.input_file(file_id))


def fetch_input(data: DataDir, file_id: str, on_block: Callable[[], None] = _nothing) -> Path:
    """`on_block` is called every few megabytes, and may raise what should end it."""
    return _fetched(data, input_name(file_id), data.input_file(file_id), on_block)


def share_part(data: DataDir, upload_id: str, part_id: str) -> None:
    if data.objects is not None:
        path = data.upload_dir(upload_id) / part_id
        data.objects.put_file(f"uploads/{upload_id}/{part_id}", path)


def fetch_part(data: DataDir, upload_id: str, part_id: str) -> Path:
    path = data.upload_dir(upload_id) / part_id
    if data.objects is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return _fetched(data, f"uploads/{upload_id}/{part_id}", path)


def remove_upload(data: DataDir, upload_id: str) -> None:
    """Remove the parts of an upload."""
    remove_tree(data.upload_dir(upload_id))
    _remove(data, lambda objects: _names_under(objects, f"uploads/{upload_id}"))


# -- the index -------------------------------------------------------------------------------------


def share_index(data: DataDir, batch_id: str) -> None:
    if data.objects is None:
        return
    work_dir = data.work_dir(batch_id)
    with IncomingFolder(data) as folder, no_room_is_storage_full("packing the index"):
        packed = folder / "index.tar"
        with tarfile.open(packed, "w") as tar:
            for name in INDEX_FILES:
                tar.add(work_dir / name, name)
        data.objects.put_file(index_name(batch_id), packed)


def fetch_index(data: DataDir, batch_id: str, on_block: Callable[[], None] = _nothing) -> Path:
    """The work folder. It stays without an index where the store has none: it can be made anew."""
    work_dir = data.work_dir(batch_id)
    if data.objects is None or (work_dir / INDEX_FILES[-1]).exists():
        return work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(FileNotFoundError),
        IncomingFolder(data) as folder,
        no_room_is_storage_full("fetching the index"),
    ):
        packed = _fetched(data, index_name(batch_id), folder / "index.tar", on_block)
        with tarfile.open(packed) as tar:
            for name in INDEX_FILES:
                tar.extract(name, folder, filter="data")
        for name in INDEX_FILES:
            (folder / name).replace(work_dir / name)
    return work_dir


def remove_work(data: DataDir, batch_id: str) -> None:
    """Remove what a batch needed until it ended."""
    remove_tree(data.work_dir(batch_id))
    _remove(
        data,
        lambda objects: [index_name(batch_id), *_names_under(objects, results_folder(batch_id))],
    )


# -- published files -------------------------------------------------------------------------------


def share_output(data: DataDir, file_id: str) -> None:
    if data.objects is not None:
        data.objects.put_file(output_name(file_id), data.output_file(file_id))


def share_results(data: DataDir, batch: Batch) -> None:
    """All lines of a batch that has both output and errors."""
    if data.objects is not None:
        path = data.results_file(batch)
        data.objects.put_file(f"output/{path.name}", path)


def fetch_output(data: DataDir, file_id: str) -> Path:
    return _fetched(data, output_name(file_id), data.output_file(file_id))


def fetch_results_file(data: DataDir, batch: Batch) -> Path:
    """All lines of a finished batch. What has one file only is kept here once."""
    path, only = data.results_file(batch), batch.output_file_id or batch.error_file_id
    has_both = batch.output_file_id and batch.error_file_id
    if data.objects is not None and only and not has_both and not path.exists():
        return fetch_output(data, only)
    return _fetched(data, results_name(batch), path)


def remove_file(data: DataDir, file: StoredFile, batch: Batch | None) -> None:
    """Remove the bytes of a file that the database has marked as deleted.

    With a published file goes the file of all lines of its `batch`: it holds the same answers.
    """
    names = [file_name(file)]
    if file.purpose is FilePurpose.BATCH:
        data.input_file(file.id).unlink(missing_ok=True)
    else:
        data.output_file(file.id).unlink(missing_ok=True)
    if batch is not None:
        path = data.results_file(batch)
        path.unlink(missing_ok=True)
        names.append(f"output/{path.name}")
    _remove(data, lambda _: names)


# -- logs ------------------------------------------------------------------------------------------


def share_log(data: DataDir, batch_id: str) -> None:
    """Never raises: a batch must not fail because its log can't be copied."""
    if data.objects is None:
        return
    try:
        data.objects.put_file(_log_name(data, batch_id), data.log_file(batch_id))
    except FileNotFoundError:
        return
    except (ObjectsUnavailable, StorageFull, OSError) as error:
        logger.warning("The log of %s is not copied for now: %s", batch_id, error)


def fetch_logs(data: DataDir, batch_id: str) -> dict[str, bytes]:
    """What was written to the log of a batch: of each data folder, by its id.

    While the store is away, what this machine has of it, if anything.
    """
    assert data.objects is not None
    own = {}
    with contextlib.suppress(FileNotFoundError):
        own[_log_name(data, batch_id)] = data.log_file(batch_id).read_bytes()
    logs: dict[str, bytes] = {}
    try:
        for found in data.objects.list(f"logs/{batch_id}"):
            if found.name not in own:
                with contextlib.suppress(FileNotFoundError):
                    logs[found.name] = data.objects.get(found.name)
    except ObjectsUnavailable:
        if not own:
            raise
    return own | logs


def in_order(logs: Iterable[bytes]) -> bytes:
    """The lines of several logs as one, by their times; unfinished lines are left out."""
    lines = [
        [line for line in log.splitlines(keepends=True) if line.endswith(b"\n")] for log in logs
    ]
    merged: Iterator[bytes] = merge(*lines, key=_stamp)
    return b"".join(merged)


def _stamp(line: bytes) -> bytes:
    return line[:_STAMP_CHARS]


def _log_name(data: DataDir, batch_id: str) -> str:
    return f"logs/{batch_id}/{folder_id(data)}.log"


def folder_id(data: DataDir) -> str:
    """What tells this data folder from those of other machines; made when first asked for."""
    path = data.root / "folder-id"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="ascii")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_text(secrets.token_hex(8), encoding="ascii")
    try:
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
    finally:
        temporary.unlink()
    return path.read_text(encoding="ascii")


# -- inside ----------------------------------------------------------------------------------------


def _fetched(data: DataDir, name: str, path: Path, on_block: Callable[[], None] = _nothing) -> Path:
    """A copy appears under `path` whole or not at all."""
    if data.objects is None:
        return path
    try:
        os.utime(path)  # used just now: see `batch_app.cache`
        return path
    except FileNotFoundError:
        pass
    size = data.objects.size(name)
    with atomic_writer(path) as file:
        for block in data.objects.read(name, 0, size):
            file.write(block)
            on_block()
    return path


def _names_under(objects: Objects, prefix: str) -> list[str]:
    return [found.name for found in objects.list(prefix)]


def _remove(data: DataDir, names: Callable[[Objects], list[str]]) -> None:
    """What can't be removed now is found by the sweep."""
    if data.objects is None:
        return
    try:
        data.objects.delete(names(data.objects))
    except (ObjectsUnavailable, StorageFull, OSError) as error:
        logger.warning("Objects stay until the next sweep: %s", error)
