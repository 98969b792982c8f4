"""The index of an input file: where each request lies, and what the planner needs to know of it.

Three files in the batch's work folder: `index.bin`, fixed-size little-endian records in input
order; `prefixes.bin`, the fingerprints of every prompt's prefixes, one request's after the other's;
and `index.json`, the few names that the records refer to by number. Written once by intake, mapped
into memory by the worker: nobody parses the input twice to find or to order its lines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batch_app.errors import IndexUnreadable
from batch_app.files import atomic_writer, no_room_is_storage_full

VERSION = 3
#: `offset` and `length` in bytes; `line` from 1; `max_tokens` 0 where the line sets none;
#: `content` is a hash of endpoint and body, 0 where they don't determine the answer; `model` and
#: `endpoint` are positions in the lists of index.json; `num_marks`: fingerprints in prefixes.bin.
DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("line", "<u4"),
        ("max_tokens", "<u4"),
        ("content", "<u8"),
        ("model", "<u2"),
        ("endpoint", "<u2"),
        ("num_marks", "<u2"),
    ]
)


class IndexWriter:
    """Writes the three files. Use as a context manager; `finish` makes them durable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / "index.bin").open("wb")
        self._prefixes = (folder / "prefixes.bin").open("wb")
        self._models: dict[str, int] = {}
        self._endpoints: dict[str, int] = {}
        self._num_marks = 0
        self.num_requests = 0

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._prefixes.close()

    def model(self, name: str) -> int:
        """What stands for it in `model` of the records."""
        return self._models.setdefault(name, len(self._models))

    def endpoint(self, name: str) -> int:
        """What stands for it in `endpoint` of the records."""
        return self._endpoints.setdefault(name, len(self._endpoints))

    def extend(self, records: npt.NDArray[Any], marks: npt.NDArray[np.uint32]) -> None:
        """The next requests, of dtype `DTYPE`, and the fingerprints of their prompts, one's after
        the other's. Raises StorageFull."""
        with no_room_is_storage_full("writing the index"):
            self._file.write(records.tobytes())
            self._prefixes.write(marks.astype("<u4", copy=False).tobytes())
        self.num_requests += len(records)
        self._num_marks += len(marks)

    def finish(self) -> None:
        """Raises StorageFull."""
        with no_room_is_storage_full("writing the index"):
            for written in (self._file, self._prefixes):
                written.flush()
                os.fsync(written.fileno())
        header = {
            "version": VERSION,
            "num_requests": self.num_requests,
            "num_marks": self._num_marks,
            "models": list(self._models),
            "endpoints": list(self._endpoints),
        }
        with atomic_writer(self._folder / "index.json") as file:
            file.write(orjson.dumps(header))


@dataclass(frozen=True, slots=True)
class Index:
    """An index as read back.

    `records` has shape (num_requests,) and dtype `DTYPE`; `prefixes` has shape (sum of num_marks,).
    Both are views of the files: what isn't looked at takes no memory.
    """

    records: npt.NDArray[Any]
    prefixes: npt.NDArray[np.uint32]
    models: tuple[str, ...]
    endpoints: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def models_of(self, numbers: npt.NDArray[np.int64]) -> list[str]:
        """The models that these requests run on, in the order of the file."""
        counts = np.bincount(self.records["model"][numbers], minlength=len(self.models))
        return [model for model, count in zip(self.models, counts, strict=True) if count]

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Raises IndexUnreadable when the files are missing, torn or of another version."""
        try:
            header = orjson.loads((folder / "index.json").read_bytes())
            if header["version"] != VERSION:
                raise IndexUnreadable(
                    f"The index in {folder.name} is of version {header['version']}."
                )
            records = _mapped(folder / "index.bin", DTYPE)
            if len(records) != header["num_requests"]:
                raise IndexUnreadable(
                    f"The index in {folder.name} has {len(records)} records of "
                    f"{header['num_requests']}."
                )
            prefixes = _mapped(folder / "prefixes.bin", np.dtype("<u4"))
            if len(prefixes) != header["num_marks"]:
                raise IndexUnreadable(
                    f"The index in {folder.name} has {len(prefixes)} fingerprints of "
                    f"{header['num_marks']}."
                )
            return cls(records, prefixes, tuple(header["models"]), tuple(header["endpoints"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexUnreadable(f"The index in {folder.name} can't be read: {error}") from error


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A file as an array. Raises OSError, or ValueError where the last element is torn."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # nothing can't be mapped
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
