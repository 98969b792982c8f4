"""Where requests come from: a file of JSON lines, plain or packed, standard input, or a program.

What can't be read twice is kept in a temporary file, so that memory stays flat and a broken upload
can begin anew.
"""

from __future__ import annotations

import gzip
import io
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import orjson
import zstandard

from batch_app.errors import BadRequest
from batch_app.json_lines import escape_line_separators

BLOCK_BYTES = 1 << 20
STDIN = "-"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

#: What a program may give as requests: a path (`-` is standard input), the bytes of a file, or
#: requests as they stand in its lines.
Requests = str | Path | bytes | Iterable[Mapping[str, Any]]


class Source:
    """Requests as JSON lines, to be read as often as needed. Use as a context manager."""

    def __init__(self, name: str, path: Path | None = None, spool: IO[bytes] | None = None) -> None:
        """Of a file, or of a temporary one that this owns. `name` is for messages."""
        self.name = name
        self._path = path
        self._spool = spool

    @classmethod
    def of(cls, requests: Requests | Source) -> Source:
        """Raises BadRequest where there is no such file, or one can't be read."""
        if isinstance(requests, Source):
            return requests
        if isinstance(requests, str | Path):
            if str(requests) == STDIN:
                return cls.spooled("standard input", _blocks(sys.stdin.buffer))
            path = Path(requests)
            try:
                with path.open("rb"):
                    return cls(path.name, path=path)
            except OSError as error:
                raise BadRequest(f"{path} can't be read: {error.strerror}.") from error
        if isinstance(requests, bytes):
            return cls.spooled("requests.jsonl", [requests])
        lines = (
            escape_line_separators(orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)) + b"\n"
            for request in requests
        )
        return cls.spooled("requests.jsonl", lines)

    @classmethod
    def spooled(cls, name: str, content: Iterable[bytes]) -> Source:
        """Of bytes that come once."""
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            for block in content:
                spool.write(block)
        except BaseException:
            spool.close()
            raise
        return cls(name, spool=spool)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()

    def blocks(self) -> Iterator[bytes]:
        """The content from its beginning, unpacked.

        Raises:
            BadRequest: it can't be read, or unpacked.
        """
        with self.opened() as file:
            yield from _blocks(file)

    def lines(self) -> Iterator[bytes]:
        """The lines that aren't blank, without their ends."""
        with self.opened() as file:
            for line in file:
                if stripped := line.strip():
                    yield stripped

    @contextmanager
    def seekable(self) -> Iterator[IO[bytes]]:
        """The unpacked content, as a file that can be read in any order."""
        if not self._is_packed():
            with self._raw() as raw:
                yield raw
            return
        with Source.spooled(self.name, self.blocks()) as unpacked, unpacked.seekable() as file:
            yield file

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Where the unpacked content lies: the file itself, or else a copy that goes again.

        Raises:
            BadRequest: it can't be read, or unpacked.
        """
        if self._path is not None and not self._is_packed():
            yield self._path
            return
        with tempfile.NamedTemporaryFile() as copy:
            copy.writelines(self.blocks())
            copy.flush()
            yield Path(copy.name)

    def _is_packed(self) -> bool:
        with self._raw() as raw:
            return raw.read(4).startswith((_GZIP, _ZSTD))

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The unpacked content, from its beginning.

        Raises:
            BadRequest: it can't be read, or unpacked.
        """
        try:
            with self._raw() as raw:
                magic = raw.read(4)
                raw.seek(0)
                if magic.startswith(_GZIP):
                    with gzip.GzipFile(fileobj=raw) as file:
                        yield io.BufferedReader(file, BLOCK_BYTES)
                elif magic == _ZSTD:
                    yield io.BufferedReader(_Zstd(raw), BLOCK_BYTES)
                else:
                    yield raw
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise BadRequest(f"{self.name} can't be unpacked: {error}.") from error
        except OSError as error:
            raise BadRequest(f"{self.name} can't be read: {error.strerror}.") from error

    @contextmanager
    def _raw(self) -> Iterator[BinaryIO]:
        if self._path is not None:
            with self._path.open("rb", buffering=BLOCK_BYTES) as file:
                yield file
        else:
            assert self._spool is not None
            self._spool.seek(0)
            yield self._spool  # type: ignore[misc]


class _Zstd(io.RawIOBase):
    """Unpacks frame after frame; unlike the library's own reader it notices one that is torn."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(b"")
        self._is_between_frames = True

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._is_between_frames = True
            packed = rest or self._packed.read(BLOCK_BYTES)
            if not packed:
                if not self._is_between_frames:
                    raise EOFError("it ends in the middle")
                return 0
            self._is_between_frames = False
            self._ready = memoryview(self._frame.decompress(packed))
        num_bytes = min(len(target), len(self._ready))
        target[:num_bytes] = self._ready[:num_bytes]
        self._ready = self._ready[num_bytes:]
        return num_bytes


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block
