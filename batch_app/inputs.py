"""The input file of a batch, read line by line through its index."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from batch_app.index import Index


class InputRequest(msgspec.Struct, gc=False):
    """What a line says: its id, and its body as it was sent, byte for byte."""

    custom_id: str
    body: msgspec.Raw


_decode = msgspec.json.Decoder(InputRequest).decode


class InputFile:
    """Use as a context manager. Raises OSError where the file is gone or can't be read."""

    def __init__(self, path: Path, index: Index) -> None:
        self._records = index.records
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def request(self, number: int) -> InputRequest:
        """What this request's line says; it passed intake, so it can be read."""
        record = self._records[number]
        return _decode(os.pread(self._descriptor, int(record["length"]), int(record["offset"])))
