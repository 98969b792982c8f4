"""Copies of a running batch's results log in the object storage, for the worker that takes it over.

A segment of the log is copied in parts, `results/BATCH/SEGMENT/FROM`, each named by where it begins
in its segment. Only bytes that are committed are copied, older segments before the one whose seal
speaks of them. What counts is decided as on one disk (`batch_app.results`): by the newest seal. So
whatever a worker that lost the batch still sends lies behind the seal of its successor, or in a
segment that no seal knows.

A part is sent again, if it has to be, with the same bytes under the same name.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch
from batch_app.errors import ObjectsUnavailable, StorageFull
from batch_app.files import DataDir, IncomingFolder, atomic_writer
from batch_app.objects import Objects, StoredObject
from batch_app.results import ResultsLog, live_segments
from batch_app.shared_files import results_folder, share_log

logger = logging.getLogger(__name__)

#: Parts fetched at once.
MAX_CONCURRENCY = 8
#: How often the batch's log is copied while nothing of weight happens.
LOG_EVERY_S = 60.0
_LOOK_S = 0.5
_PART = re.compile(r"(results-\d{8,}-\d{4,})/(\d{16})")


def fetch_results_log(
    data: DataDir, batch_id: str, folder: Path, on_block: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Bring the segments in a folder as far as the object storage has them. Returns how far that
    is: bytes, by the segments' names.

    What is here and longer stays: it is this machine's own, of which the store has the beginning.
    Raises ObjectsUnavailable, StorageFull, OSError.
    """
    if data.objects is None:
        return {}
    lengths: dict[str, int] = {}
    for name, parts in _segments(data.objects, batch_id).items():
        path = folder / f"{name}.log"
        lengths[name] = length = _contiguous(parts)
        if length > (path.stat().st_size if path.exists() else -1):
            with atomic_writer(path) as file:
                for block in _joined(data.objects, parts):
                    file.write(block)
                    on_block()
    for segment in live_segments(folder):
        segment.path.touch()  # lost altogether: its requests run again
    return lengths


@contextmanager
def results_so_far(data: DataDir, batch: Batch) -> Iterator[Path]:
    """A folder with the results log of a batch that runs, here or elsewhere."""
    here = data.work_dir(batch.id)
    segments = live_segments(here) if data.objects is not None else []
    if data.objects is None or (segments and segments[-1].epoch == batch.epoch):
        yield here
        return
    # Apart from the work folder, in which a worker of this machine may be about to begin.
    with IncomingFolder(data) as folder:
        fetch_results_log(data, batch.id, folder)
        yield folder


class ResultCopies:
    """Copies the log of one claim, in a thread of its own, from `start` to `stop`.

    While the object storage is away the batch goes on: results are on this machine's disk.
    """

    def __init__(
        self,
        data: DataDir,
        batch: Batch,
        log: ResultsLog,
        batch_log: BatchLog,
        settings: Settings,
        copied: dict[str, int],
    ) -> None:
        """`copied`: what `fetch_results_log` returned."""
        self._data = data
        self._batch = batch
        self._log = log
        self._batch_log = batch_log
        self._interval_s = settings.storage_copy_interval_s
        self._part_bytes = settings.storage_part_bytes
        self._copied = dict(copied)
        self._end_of_part: dict[str, int] = {}
        self._is_away = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)

    def start(self) -> None:
        if self._data.objects is not None:
            self._thread.start()

    def end(self) -> None:
        """The batch has ended: nothing more is copied."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def stop(self) -> None:
        """Copy what is left, if the store answers, and end. Harmless after `end`."""
        if self._data.objects is None or self._stop.is_set():
            return
        self.end()
        self._try_to_copy()
        share_log(self._data, self._batch.id)

    def _run(self) -> None:
        next_copy = next_log = 0.0
        while not self._stop.wait(min(_LOOK_S, self._interval_s)):
            now = time.monotonic()
            if now >= next_copy or (self._num_behind() >= self._part_bytes and not self._is_away):
                self._try_to_copy()
                next_copy = time.monotonic() + self._interval_s
            if now >= next_log and not self._is_away:
                share_log(self._data, self._batch.id)
                next_log = now + LOG_EVERY_S

    def _num_behind(self) -> int:
        segment = self._log.committed()[-1]
        return segment.length - self._copied.get(segment.path.stem, 0)

    def _try_to_copy(self) -> None:
        try:
            self._copy()
        except (ObjectsUnavailable, StorageFull, OSError) as error:
            if not self._is_away:
                self._batch_log.write(
                    f"Waiting for the object storage: {error} Results stay on this machine."
                )
            self._is_away = True
        except Exception:
            logger.exception("Results of %s are not copied.", self._batch.id)
        else:
            if self._is_away:
                self._batch_log.write("The object storage answers again.")
            self._is_away = False

    def _copy(self) -> None:
        assert self._data.objects is not None
        for segment in self._log.committed():
            name = segment.path.stem
            while (start := self._copied.get(name, 0)) < segment.length:
                end = self._end_of_part.setdefault(
                    name, min(start + self._part_bytes, segment.length)
                )
                part = _bytes_of(segment.path, start, end)
                folder = results_folder(self._batch.id)
                self._data.objects.put(f"{folder}/{name}/{start:016d}", part)
                self._copied[name] = end
                del self._end_of_part[name]


def _bytes_of(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        part = os.pread(file.fileno(), end - start, start)
    if len(part) != end - start:
        raise OSError(f"{path.name} is shorter than what was committed.")
    return part


def _segments(objects: Objects, batch_id: str) -> dict[str, list[StoredObject]]:
    """The parts of each segment, in their order."""
    folder = results_folder(batch_id)
    segments: dict[str, list[StoredObject]] = {}
    for found in objects.list(folder):
        named = _PART.fullmatch(found.name.removeprefix(f"{folder}/"))
        if named is not None:
            segments.setdefault(named[1], []).append(found)
    return {name: sorted(parts, key=_start) for name, parts in sorted(segments.items())}


def _start(part: StoredObject) -> int:
    return int(part.name.rpartition("/")[2])


def _contiguous(parts: list[StoredObject]) -> int:
    """How far these reach without a gap, in bytes."""
    length = 0
    for part in parts:
        if _start(part) > length:
            break
        length = max(length, _start(part) + part.size_bytes)
    return length


def _joined(objects: Objects, parts: list[StoredObject]) -> Iterator[bytes]:
    """The bytes of these up to the first gap; where two say the same, once."""
    position = 0
    with ThreadPoolExecutor(MAX_CONCURRENCY) as pool:
        for first in range(0, len(parts), MAX_CONCURRENCY):
            some = parts[first : first + MAX_CONCURRENCY]
            for part, content in zip(
                some, pool.map(lambda part: objects.get(part.name), some), strict=True
            ):
                start = _start(part)
                if start > position:
                    return
                yield content[position - start :]
                position = max(position, start + len(content))
