"""The audit log: who did what, one JSON object a line, appended and never changed.

Never a prompt, an answer, a key or a file's name. Several processes may append: each line is one
`write` on a descriptor opened with O_APPEND. A file that has grown too long is renamed to `.1`, the
one before to `.2`, and so on; the oldest goes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from batch_app.core import utc_now
from batch_app.json_lines import escape_line_separators

logger = logging.getLogger(__name__)

#: How many earlier files stay.
KEPT_FILES = 9
#: Refusals of callers without a key that are written in a minute; the rest is counted. They would
#: otherwise push what others did out of the files that are kept.
MAX_STRANGERS_A_MINUTE = 60


@dataclass(frozen=True, slots=True)
class Deed:
    """What somebody did, or tried. `outcome`: the HTTP status; None: they went away before it.

    `key_id` is None where no key was asked for, or none was given that is known. `client` is a
    network address, or `command line`.
    """

    action: str
    object_id: str | None
    outcome: int | None
    key_id: str | None = None
    client: str | None = None
    request_id: str | None = None


class AuditLog:
    """Safe to use from several threads. Never raises: a full disk must not end the service."""

    def __init__(
        self, path: Path, max_bytes: int, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._minute = 0
        self._strangers = 0
        self._unwritten = 0

    def write(self, deed: Deed, *, stranger: bool = False) -> None:
        """Append a line. A `stranger` was refused for want of a key."""
        with self._lock:
            if stranger and not self._admits_stranger():
                self._unwritten += 1
                return
            stamp = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
            line = {"time": stamp, **asdict(deed)}
            if self._unwritten:
                line["refusals_not_written"], self._unwritten = self._unwritten, 0
            try:
                self._rotate()
                self._append(escape_line_separators(orjson.dumps(line)) + b"\n")
            except OSError as error:
                logger.warning("The audit log can't be written: %s", error.strerror)

    def _admits_stranger(self) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._strangers = minute, 0
        self._strangers += 1
        return self._strangers <= MAX_STRANGERS_A_MINUTE

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def _rotate(self) -> None:
        if not self._is_full():
            return
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._is_full():  # else another process was faster
                for number in range(KEPT_FILES - 1, -1, -1):
                    source = self._numbered(number)
                    if source.exists():
                        source.replace(self._numbered(number + 1))
        finally:
            os.close(lock)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def _is_full(self) -> bool:
        try:
            return self.path.stat().st_size >= self._max_bytes
        except FileNotFoundError:
            return False
