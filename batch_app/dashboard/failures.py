"""Why requests failed: grouped by error, with an example each.

Reads a bounded part of them, and remembers what it found: open pages ask again every few seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

import orjson

from batch_app.batch_log import printable
from batch_app.core import Batch
from batch_app.errors import ObjectsUnavailable
from batch_app.files import DataDir
from batch_app.results import iter_results
from batch_app.routes.downloads import lines_of_file
from batch_app.shared_files import fetch_output
from batch_app.wire.lines import has_failed

#: What is read at most. A batch may have millions of failures; the first ones tell why.
MAX_FAILURES = 20_000
MAX_BYTES = 32 << 20
MAX_GROUPS = 20
MAX_CHARS = 300
#: While new ones come, the results of a batch are read again after so many seconds at the earliest.
READ_EVERY_S = 30.0
#: Batches that are remembered. A few kB each.
MAX_REMEMBERED = 64
_NUMBER = re.compile(r"\d+")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")


@dataclass(slots=True)
class FailureGroup:
    """Failures with the same status, code and message but for numbers and quotations."""

    status: int | None
    code: str
    message: str
    custom_id: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Failures:
    """The groups, most frequent first. `is_partial`: more was there than was read."""

    groups: tuple[FailureGroup, ...]
    num_read: int
    is_partial: bool


NONE = Failures((), 0, False)


@dataclass(frozen=True, slots=True)
class _Read:
    """What was found, when, and what the batch had by then: as long as that stands, so does it."""

    found: Failures
    at: float
    state: tuple[object, ...]


@dataclass(frozen=True)
class FailureReader:
    """One per app, for all threads. A batch is read by one of them at a time."""

    data: DataDir
    clock: Callable[[], float] = time.monotonic
    _read: dict[str, _Read] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, batch: Batch) -> Failures:
        """Of a batch that the caller may see. Nothing where its files are gone; blocks.

        Those of a batch at work may be `READ_EVERY_S` old.
        """
        if batch.progress.failed == 0 and batch.error_file_id is None:
            return NONE
        with self._lock, suppress(ObjectsUnavailable):
            known = self._read.pop(batch.id, None)
            if batch.is_terminal and not self._has_file(batch):
                return NONE
            if known is None or not self._holds(known, batch):
                known = _Read(self._grouped(batch), self.clock(), _state(batch))
            self._read[batch.id] = known  # as the newest: the oldest is forgotten first
            if len(self._read) > MAX_REMEMBERED:
                del self._read[next(iter(self._read))]
            return known.found
        return NONE

    def _holds(self, known: _Read, batch: Batch) -> bool:
        if known.state == _state(batch):
            return True
        return not batch.is_terminal and self.clock() < known.at + READ_EVERY_S

    def _has_file(self, batch: Batch) -> bool:
        file_id = batch.error_file_id
        with suppress(FileNotFoundError):
            return file_id is not None and fetch_output(self.data, file_id).exists()
        return False

    def _grouped(self, batch: Batch) -> Failures:
        try:
            if batch.is_terminal:
                assert batch.error_file_id is not None
                return grouped(lines_of_file(fetch_output(self.data, batch.error_file_id)))
            # Where it runs elsewhere, they are shown at its end: its log may be long to fetch.
            return grouped(iter_results(self.data.work_dir(batch.id)))
        except FileNotFoundError:
            return NONE


def _state(batch: Batch) -> tuple[object, ...]:
    return batch.is_terminal, batch.error_file_id, batch.progress.failed


def grouped(lines: Iterable[bytes]) -> Failures:
    """Lines of results; those of requests that succeeded are passed over."""
    groups: dict[tuple[object, ...], FailureGroup] = {}
    num_read = num_bytes = 0
    is_partial = False
    for line in lines:
        num_bytes += len(line)
        if num_read >= MAX_FAILURES or num_bytes > MAX_BYTES:
            is_partial = True
            break
        if not has_failed(line):
            continue
        num_read += 1
        failure = _failure(line)
        key = (
            failure.status,
            failure.code,
            _NUMBER.sub("#", _QUOTED.sub("'…'", failure.message)),
        )
        known = groups.get(key)
        if known is not None:
            known.count += 1
        elif len(groups) < MAX_GROUPS:
            groups[key] = failure
        else:
            rest = FailureGroup(None, "others", "Of other kinds.", failure.custom_id, 0)
            groups.setdefault(("others",), rest).count += 1
    most = sorted(groups.values(), key=lambda group: -group.count)
    return Failures(tuple(most), num_read, is_partial)


def _failure(line: bytes) -> FailureGroup:
    result = orjson.loads(line)
    response = result.get("response")
    status, error = None, result.get("error")
    if response is not None:
        status, body = response.get("status_code"), response.get("body")
        error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):  # a remote server's may be a mere text
        error = {"message": error} if isinstance(error, str) else {}
    code = error.get("code")
    if not isinstance(code, str) or not code:
        code = error.get("type") or "unknown"
    return FailureGroup(
        status=status,
        code=_shown(code),
        message=_shown(error.get("message") or "No message."),
        custom_id=_shown(result.get("custom_id", "")),
    )


def _shown(value: object) -> str:
    """Without control characters and marks that make text read as another; cut to a length."""
    text = printable(str(value))
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"
