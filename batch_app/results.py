"""The results log: the truth about which requests of a batch are done.

Append-only segments in the batch's work folder, one for each claim (`results-EPOCH-ATTEMPT.log`).
A segment is a sequence of frames: a fixed header with a checksum, then the output line as it will
be published. A result counts once `commit` has returned; what a crash tore off is found by the
checksums and simply run again.

Fencing. A new segment begins with a seal: the names and lengths of the segments before it that
count. Whatever a worker that lost the batch still appends to its own segment lies behind the seal,
and a segment that it begins under its old epoch stands in no seal. Neither is ever read.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from batch_app.core import FinishReason, FinishReasonCounts, Progress, TokenCounts, is_success
from batch_app.errors import ResultsLogError, StorageFull
from batch_app.faults import crash_point
from batch_app.files import NO_ROOM, sync_dir

_MAGIC = b"vbr1"
#: magic, number, status, 4 token counts, payload length; the checksum covers all that and payload.
#: The status' highest bit says that the answer was copied from another request's; three bits above
#: the status itself say why the model ended it.
_HEAD = struct.Struct("<4sIHIIIII")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size
_SEAL_NUMBER = 0xFFFFFFFF
_COPIED = 0x8000
_STATUS_BITS = 10
_STATUS = (1 << _STATUS_BITS) - 1
#: By their code in a frame; 0 is no reason, or a frame from before there were any. Only append.
_FINISH_REASONS = (
    None,
    FinishReason.STOP,
    FinishReason.LENGTH,
    FinishReason.TOOL_CALLS,
    FinishReason.CONTENT_FILTER,
    FinishReason.OTHER,
)
_FINISH_CODES = {reason: code for code, reason in enumerate(_FINISH_REASONS)}
_MAX_PAYLOAD_BYTES = 1 << 30
_NAME = re.compile(r"results-\d{8,}-\d{4,}\.log")
_SCAN_BYTES = 8 << 20


class Frame(NamedTuple):
    """One frame as found in a segment; `offset` is that of the payload."""

    number: int
    status_code: int
    tokens: tuple[int, int, int, int]
    offset: int
    length: int
    copied: bool = False
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of the log, as far as it counts: `length` bytes of it."""

    path: Path
    length: int

    @property
    def epoch(self) -> int:
        return int(self.path.stem.split("-")[1])


def encode_frame(
    number: int,
    status_code: int,
    tokens: TokenCounts,
    payload: bytes,
    copied: bool = False,
    finish_reason: FinishReason | None = None,
) -> bytes:
    """A frame's bytes, header and payload."""
    head = _HEAD.pack(
        _MAGIC,
        number,
        status_code | _FINISH_CODES[finish_reason] << _STATUS_BITS | (_COPIED if copied else 0),
        tokens.prompt_tokens,
        tokens.completion_tokens,
        tokens.cached_tokens,
        tokens.reasoning_tokens,
        len(payload),
    )
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


class _Scan:
    """Reads the frames of one segment up to a length; knows afterwards where the good part ends."""

    def __init__(self, path: Path, length: int | None) -> None:
        self._path = path
        size = path.stat().st_size
        self._end = size if length is None else min(length, size)
        self.good_length = 0
        self.num_damaged = 0  # stretches of bytes in the middle that were no frames

    def __iter__(self) -> Iterator[tuple[Frame, bytes]]:
        position = 0
        start, window = 0, b""
        with self._path.open("rb") as file:
            while position + HEADER_BYTES <= self._end:
                begin = position - start
                needed = _frame_length(window, begin)
                if begin + needed > len(window) and start + len(window) < self._end:
                    wanted = min(max(_SCAN_BYTES, needed), self._end - position)
                    start, window = position, os.pread(file.fileno(), wanted, position)
                    continue
                frame = _decode(window, begin, start)
                if frame is None:
                    found = _next_frame(file.fileno(), position + 1, self._end)
                    if found is None:
                        return  # nothing good comes after it: a torn tail
                    self.num_damaged += 1
                    position = found
                    continue
                position = frame.offset + frame.length
                self.good_length = position
                payload_at = frame.offset - start
                yield frame, window[payload_at : payload_at + frame.length]


def _frame_length(window: bytes, begin: int) -> int:
    """Bytes of the frame at `begin`, or of a header where even that isn't in the window."""
    if begin + HEADER_BYTES > len(window):
        return HEADER_BYTES
    length: int = _HEAD.unpack_from(window, begin)[7]
    return HEADER_BYTES + (length if length <= _MAX_PAYLOAD_BYTES else 0)


def _decode(window: bytes, begin: int, window_start: int) -> Frame | None:
    if begin + HEADER_BYTES > len(window):
        return None
    magic, number, status, prompt, completion, cached, reasoning, length = _HEAD.unpack_from(
        window, begin
    )
    payload_at = begin + HEADER_BYTES
    if magic != _MAGIC or payload_at + length > len(window):
        return None
    view = memoryview(window)
    (expected,) = _CRC.unpack_from(window, begin + _HEAD.size)
    head_crc = zlib.crc32(view[begin : begin + _HEAD.size])
    if zlib.crc32(view[payload_at : payload_at + length], head_crc) != expected:
        return None
    return Frame(
        number,
        status & _STATUS,
        (prompt, completion, cached, reasoning),
        window_start + payload_at,
        length,
        bool(status & _COPIED),
        _finish_reason(status),
    )


def _finish_reason(status: int) -> FinishReason | None:
    code = (status & ~_COPIED) >> _STATUS_BITS
    return _FINISH_REASONS[code] if code < len(_FINISH_REASONS) else FinishReason.OTHER


def _next_frame(descriptor: int, position: int, end: int) -> int | None:
    """Where the next whole frame begins at or behind `position`; slow, for damaged files only."""
    while position < end:
        window = os.pread(descriptor, min(_SCAN_BYTES, end - position), position)
        at = window.find(_MAGIC)
        while at >= 0:
            candidate = position + at
            head = os.pread(descriptor, HEADER_BYTES, candidate)
            length = _frame_length(head, 0)
            if candidate + length <= end:
                whole = os.pread(descriptor, length, candidate)
                if _decode(whole, 0, candidate) is not None:
                    return candidate
            at = window.find(_MAGIC, at + 1)
        position += max(1, len(window) - len(_MAGIC) + 1)
    return None


def live_segments(work_dir: Path) -> list[Segment]:
    """The segments that count, oldest first, each with the length that counts.

    The newest one whose seal can be read speaks for those before it.
    """
    paths = sorted(work_dir.glob("results-*.log"), reverse=True)
    for path in paths:
        first = next(iter(_Scan(path, None)), None)
        sealed = _read_seal(first[1]) if first and first[0].number == _SEAL_NUMBER else None
        if sealed is None:
            continue  # its claim died before it could write a result
        older = [Segment(work_dir / name, length) for name, length in sealed.items()]
        return [*older, Segment(path, path.stat().st_size)]
    return []


def _read_seal(payload: bytes) -> dict[str, int] | None:
    """Names of segments, and the lengths that count; None where it can't be one of ours."""
    try:
        sealed: dict[str, int] = orjson.loads(payload)
        good = all(_NAME.fullmatch(name) and length >= 0 for name, length in sealed.items())
    except (ValueError, TypeError, AttributeError):
        return None
    return sealed if good else None


def iter_results(work_dir: Path) -> Iterator[bytes]:
    """The output lines committed so far, without line feeds, in order of finishing.

    For readers beside the worker that writes; sees whole frames only.
    """
    seen: set[int] = set()
    for segment in live_segments(work_dir):
        for frame, payload in _Scan(segment.path, segment.length):
            if frame.number != _SEAL_NUMBER and frame.number not in seen:
                seen.add(frame.number)
                yield payload


class ResultsLog:
    """The results log of one batch, opened for one claim. One thread at a time.

    Memory: 16 bytes a request, whatever the results' size.
    """

    def __init__(self, work_dir: Path, num_requests: int, epoch: int) -> None:
        """Recover what is there, and begin a segment for this epoch.

        Raises:
            ResultsLogError: the segments can't be read, or a new one can't be begun.
            StorageFull: … because there is no room.
        """
        self._work_dir = work_dir
        self._segment_of = np.zeros(num_requests, dtype=np.uint16)  # 1-based; 0: not done
        self._offset = np.zeros(num_requests, dtype=np.uint64)
        self._length = np.zeros(num_requests, dtype=np.uint32)
        self._status = np.zeros(num_requests, dtype=np.uint16)
        self.progress = Progress()
        self.num_damaged = 0
        self._segments: list[Segment] = []
        self._readers: dict[int, int] = {}
        try:
            for segment in live_segments(work_dir):
                self._recover(segment)
        except OSError as error:
            raise ResultsLogError(f"The results log can't be read: {error}") from error
        self._buffer: list[bytes] = []
        self._pending: list[Frame] = []
        self._written = 0
        self._broken = False
        self._descriptor = -1
        self._committed = 0
        self._begin_segment(epoch)

    # -- reading -------------------------------------------------------------------------------

    def is_done(self, number: int) -> bool:
        return bool(self._segment_of[number])

    def todo(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Numbers of the requests without a committed result, ascending."""
        return np.flatnonzero(self._segment_of == 0).astype(np.int64)

    def status_code(self, number: int) -> int:
        """Of a done request; 0 for one that isn't."""
        return int(self._status[number])

    def tokens(self, number: int) -> TokenCounts:
        """What a done request used. Raises as `read`."""
        return TokenCounts(*self._whole(number)[0].tokens)

    def finish_reason(self, number: int) -> FinishReason | None:
        """Of a done request's answer. Raises as `read`."""
        return self._whole(number)[0].finish_reason

    def read(self, number: int) -> bytes:
        """The output line of a done request, without its line feed.

        Raises ResultsLogError where it is not what was written: disks change bytes under way, too.
        Opened anew, the log no longer has that result, and the request runs again.
        """
        return self._whole(number)[1]

    def _whole(self, number: int) -> tuple[Frame, bytes]:
        at = int(self._offset[number]) - HEADER_BYTES
        raw = os.pread(self._reader(number), HEADER_BYTES + int(self._length[number]), at)
        frame = _decode(raw, 0, at)
        if frame is None or frame.number != number:
            raise ResultsLogError(
                f"The result of request {number} was damaged on the disk after it was written."
            )
        return frame, raw[HEADER_BYTES:]

    def _reader(self, number: int) -> int:
        which = int(self._segment_of[number])
        descriptor = self._readers.get(which)
        if descriptor is None:
            descriptor = os.open(self._segments[which - 1].path, os.O_RDONLY)
            self._readers[which] = descriptor
        return descriptor

    # -- writing -------------------------------------------------------------------------------

    def append(
        self,
        number: int,
        status_code: int,
        tokens: TokenCounts,
        payload: bytes,
        copied: bool = False,
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Take a result into the next commit. A second result of a request is dropped.

        Counts beyond what a frame can hold are taken as the nearest that it can: the answer counts.
        """
        tokens = tokens.of_one_result()
        self._buffer.append(
            encode_frame(number, status_code, tokens, payload, copied, finish_reason)
        )
        self._pending.append(
            Frame(
                number,
                status_code,
                (
                    tokens.prompt_tokens,
                    tokens.completion_tokens,
                    tokens.cached_tokens,
                    tokens.reasoning_tokens,
                ),
                self._written + HEADER_BYTES,
                len(payload),
                copied,
                finish_reason,
            )
        )
        self._written += HEADER_BYTES + len(payload)

    def committed(self) -> list[Segment]:
        """The segments that count, oldest first, each as far as it is durable. From any thread."""
        return [*self._segments[:-1], Segment(self._segments[-1].path, self._committed)]

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def commit(self) -> Progress:
        """Make everything appended durable; only then does it count. Returns the progress.

        Raises:
            StorageFull, ResultsLogError: the segment is given up, for good: what the system says
                after a failed write or fsync can't be trusted. Open the log anew; what was not
                committed is run again.
        """
        if self._broken:
            raise ResultsLogError("This segment of the results log was given up.")
        if not self._pending:
            return self.progress
        try:
            _write_all(self._descriptor, b"".join(self._buffer))
            crash_point("results-written")
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._give_up()
            raise _write_error(error) from error
        crash_point("results-committed")
        self._committed = self._written
        self._buffer.clear()
        which = len(self._segments)
        self._count(self._pending, which)
        self._pending.clear()
        return self.progress

    def close(self) -> None:
        """Close the files. What was appended and not committed is lost, and will be run again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        for descriptor in self._readers.values():
            os.close(descriptor)
        self._readers.clear()
        self._broken = True

    # -- inside --------------------------------------------------------------------------------

    def _give_up(self) -> None:
        """After a failed write: what lies behind the last commit may not be on the disk, even if
        it can be read back now, so it must not be found by a later recovery."""
        self._broken = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._committed)

    def _recover(self, segment: Segment) -> None:
        scan = _Scan(segment.path, segment.length)
        which = len(self._segments) + 1
        frames: list[Frame] = []
        for frame, _payload in scan:
            if frame.number == _SEAL_NUMBER or frame.number >= len(self._segment_of):
                continue
            frames.append(frame)
            if len(frames) >= 10_000:
                self._count(frames, which)
                frames.clear()
        self._count(frames, which)
        self.num_damaged += scan.num_damaged
        self._segments.append(Segment(segment.path, scan.good_length))

    def _count(self, frames: list[Frame], which: int) -> None:
        completed = failed = copied = 0
        tokens = [0, 0, 0, 0]
        finish_reasons = dict.fromkeys(FinishReason, 0)
        for frame in frames:
            number = frame.number
            if self._segment_of[number]:
                continue
            self._segment_of[number] = which
            self._offset[number] = frame.offset
            self._length[number] = frame.length
            self._status[number] = frame.status_code
            if is_success(frame.status_code):
                completed += 1
                if frame.finish_reason is not None:
                    finish_reasons[frame.finish_reason] += 1
            else:
                failed += 1
            copied += frame.copied
            for position, count in enumerate(frame.tokens):
                tokens[position] += count
        self.progress += Progress(
            completed,
            failed,
            TokenCounts(*tokens),
            copied,
            FinishReasonCounts(**{reason.value: num for reason, num in finish_reasons.items()}),
        )

    def _begin_segment(self, epoch: int) -> None:
        attempt = 1
        while (path := self._work_dir / f"results-{epoch:08d}-{attempt:04d}.log").exists():
            attempt += 1
        seal = {segment.path.name: segment.length for segment in self._segments}
        frame = encode_frame(_SEAL_NUMBER, 0, TokenCounts(), orjson.dumps(seal))
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            try:
                crash_point("segment-begun")
                _write_all(self._descriptor, frame)
                os.fdatasync(self._descriptor)
                sync_dir(self._work_dir)
            except OSError:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise _write_error(error) from error
        crash_point("segment-sealed")
        self._written = self._committed = len(frame)
        self._segments.append(Segment(path, 0))
        if len(self._segments) > np.iinfo(np.uint16).max:
            raise ResultsLogError("The batch was claimed more often than its log can tell apart.")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _write_error(error: OSError) -> ResultsLogError | StorageFull:
    if error.errno in NO_ROOM:
        return StorageFull(f"No space left on the disk for results: {error.strerror}.")
    return ResultsLogError(f"The results log can't be written: {error}")
