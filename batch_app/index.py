"""The index of an input file: where each request lies, and what the planner needs to know of it.

Two files in the batch's work folder: `index.bin`, fixed-size little-endian records in input order,
and `index.json`, the few names that the records refer to by number. Written once by intake, read
by the worker as an array, so that nobody parses the input twice to find a line.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_app.errors import IndexUnreadable
from batch_app.files import atomic_writer, no_room_is_storage_full

VERSION = 1
#: `offset` and `length` in bytes; `line` from 1; `max_tokens` 0 where the line sets none;
#: `model` and `endpoint` are positions in the lists of index.json.
DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("line", "<u4"),
        ("max_tokens", "<u4"),
        ("model", "<u2"),
        ("endpoint", "<u2"),
    ]
)
_RECORD = struct.Struct("<QIIIHH")
_FLUSH_BYTES = 1 << 18


class IndexWriter:
    """Writes the two files. Use as a context manager; `finish` makes them durable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / "index.bin").open("wb")
        self._buffer = bytearray()
        self._names: dict[str, dict[str, int]] = {"models": {}, "endpoints": {}}
        self.num_requests = 0

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(
        self, *, offset: int, length: int, line: int, max_tokens: int, model: str, endpoint: str
    ) -> None:
        models, endpoints = self._names["models"], self._names["endpoints"]
        self._buffer += _RECORD.pack(
            offset,
            length,
            line,
            min(max(max_tokens, 0), 0xFFFFFFFF),
            models.setdefault(model, len(models)),
            endpoints.setdefault(endpoint, len(endpoints)),
        )
        self.num_requests += 1
        if len(self._buffer) >= _FLUSH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Raises StorageFull."""
        with no_room_is_storage_full("writing the index"):
            self._flush()
            self._file.flush()
            os.fsync(self._file.fileno())
        header = {
            "version": VERSION,
            "num_requests": self.num_requests,
            "models": list(self._names["models"]),
            "endpoints": list(self._names["endpoints"]),
        }
        with atomic_writer(self._folder / "index.json") as file:
            file.write(orjson.dumps(header))

    def _flush(self) -> None:
        with no_room_is_storage_full("writing the index"):
            self._file.write(self._buffer)
        self._buffer.clear()


@dataclass(frozen=True, slots=True)
class Index:
    """An index as read back. `records` has shape (num_requests,) and dtype `DTYPE`."""

    records: npt.NDArray[Any]
    models: tuple[str, ...]
    endpoints: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Raises IndexUnreadable when the files are missing, torn or of another version."""
        try:
            header = orjson.loads((folder / "index.json").read_bytes())
            if header["version"] != VERSION:
                raise IndexUnreadable(
                    f"The index in {folder.name} is of version {header['version']}."
                )
            records = np.fromfile(folder / "index.bin", dtype=DTYPE)
            if len(records) != header["num_requests"]:
                raise IndexUnreadable(
                    f"The index in {folder.name} has {len(records)} records of "
                    f"{header['num_requests']}."
                )
            return cls(records, tuple(header["models"]), tuple(header["endpoints"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexUnreadable(f"The index in {folder.name} can't be read: {error}") from error
