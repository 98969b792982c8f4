"""Intake: check every line of an input file and index it, in one pass and in little memory.

`Intake.grown` is told how far the file has come, so the check runs while an upload is still on its
way: in the caller's thread, or, of a large file, in processes of its own (`batch_app.checkers`).
What stays in memory is one partial line, the first errors, and eight bytes a request (to find
duplicate ids); everything else goes to the index on disk.

Forgiven, because the meaning is plain: a UTF-8 byte order mark, CRLF line ends, blank lines.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from batch_app.checkers import FROM_BYTES, CheckerPlaces, Checkers, CheckersLost
from batch_app.core import LineError
from batch_app.errors import BadLines
from batch_app.index import Index, IndexWriter
from batch_app.line_check import Found, IntakeRules, LineCheck

__all__ = ["Intake", "IntakeRules", "IntakeSummary", "index_file"]

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IntakeSummary:
    """What an accepted file holds, in order of first appearance."""

    num_requests: int
    models: tuple[str, ...]
    endpoints: tuple[str, ...]


class Intake:
    """One pass over one file: tell it how far the file has come, then `finish`; `close` gives up.

    The file is at `path`, and only grows. The index is written to `folder`; both must exist.
    `places`: for processes that check a large file; None: it is checked in the caller's thread.
    """

    def __init__(
        self, path: Path, folder: Path, rules: IntakeRules, places: CheckerPlaces | None = None
    ) -> None:
        """Raises StorageFull, OSError."""
        self._path = path
        self._folder = folder
        self._rules = rules
        self._places = places
        self._num_places = 0
        self._checkers: Checkers | None = None
        self._file = path.open("rb", buffering=0)
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def grown(self, size_bytes: int) -> None:
        """The file has so many bytes by now. Raises StorageFull when the index can't be written,
        OSError when the file can't be read."""
        if self._checkers is not None:
            self._go_on(lambda checkers: checkers.grown(size_bytes))
        elif self._places is None:
            self._read_to(size_bytes)
        elif size_bytes >= FROM_BYTES:
            self._start_checkers(self._places)

    def finish(self) -> IntakeSummary:
        """The file is complete: check what only the whole can show.

        Raises:
            BadLines: some line, or the file as a whole, can't run; nothing of it may.
            StorageFull: the index can't be written.
            OSError: the file can't be read.
        """
        size_bytes = os.fstat(self._file.fileno()).st_size
        if self._checkers is not None:
            self._go_on(lambda checkers: checkers.end(size_bytes))
        if self._checkers is None:
            self._read_to(size_bytes)
            self._check.end()
        self._end_checkers()
        with self._index:
            self._index.finish()
        index = Index.load(self._folder)
        for error in self._duplicates(index):
            self._add_error(error)
        if self._num_errors == 0 and len(index) == 0:
            self._add_error(_nothing_in_it(size_bytes > 0))
        if self._rules.max_requests and len(index) > self._rules.max_requests:
            self._add_error(
                LineError(
                    "too_many_tasks",
                    f"The file has {len(index)} requests; the limit is "
                    f"{self._rules.max_requests} (max_requests_per_batch).",
                )
            )
        if self._num_errors:
            raise self._refusal()
        return IntakeSummary(len(index), index.models, index.endpoints)

    def close(self) -> None:
        """Give up. What was written to the folder is the caller's to remove."""
        self._end_checkers()
        self._file.close()
        with self._index:
            pass

    # -- line by line --------------------------------------------------------------------------

    def _begin(self) -> None:
        """Before the file's first byte, with nothing found yet."""
        self._position = 0
        self._index = IndexWriter(self._folder)
        self._check = LineCheck(
            self._rules,
            model_number=self._index.model,
            endpoint_number=self._index.endpoint,
            on_found=self._add,
            on_error=self._add_error,
        )
        self._id_hashes = array("q")
        self._errors: list[LineError] = []
        self._num_errors = 0

    def _read_to(self, size_bytes: int) -> None:
        while self._position < size_bytes:
            wanted = min(READ_BYTES, size_bytes - self._position)
            piece = os.pread(self._file.fileno(), wanted, self._position)
            if not piece:
                return  # cut short by somebody; what is here is what counts
            self._position += len(piece)
            self._check.feed(piece)

    def _start_checkers(self, places: CheckerPlaces) -> None:
        self._num_places = places.take()
        if self._num_places:
            try:
                self._checkers = Checkers(
                    self._path,
                    self._rules,
                    self._num_places,
                    model_number=self._index.model,
                    endpoint_number=self._index.endpoint,
                    on_found=self._add,
                    on_error=self._add_error,
                    on_more_errors=self._count_errors,
                )
            except OSError as error:
                logger.warning("No processes to check a file with: %s", error)
        if self._checkers is None:
            self._end_checkers()

    def _go_on(self, what: Callable[[Checkers], None]) -> None:
        assert self._checkers is not None
        try:
            what(self._checkers)
        except CheckersLost:
            self._end_checkers()
            with self._index:
                pass
            self._begin()

    def _end_checkers(self) -> None:
        """What is not checked yet will be by the caller's thread."""
        if self._checkers is not None:
            self._checkers.close()
        if self._places is not None:
            self._places.give_back(self._num_places)
        self._checkers = self._places = None
        self._num_places = 0

    def _add(self, found: Found) -> None:
        self._index.extend(found.records, found.marks)
        self._id_hashes.frombytes(found.id_hashes.tobytes())

    # -- the file as a whole -------------------------------------------------------------------

    def _duplicates(self, index: Index) -> Iterator[LineError]:
        """Equal hashes are only a suspicion: the ids themselves are read again and compared."""
        hashes = np.frombuffer(self._id_hashes, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(equal) == 0:
            return
        in_groups = np.unique(np.concatenate([order[equal], order[equal + 1]]))
        first_line: dict[str, int] = {}
        for number in in_groups:
            record = index.records[number]
            raw = os.pread(self._file.fileno(), int(record["length"]), int(record["offset"]))
            custom_id = orjson.loads(raw)["custom_id"]
            line = int(record["line"])
            earlier = first_line.setdefault(custom_id, line)
            if earlier != line:
                yield LineError(
                    "duplicate_custom_id",
                    f'"custom_id" is the same as in line {earlier}. Give each line one of its own.',
                    line,
                    "custom_id",
                )

    def _add_error(self, error: LineError) -> None:
        self._num_errors += 1
        # Twice the limit, since duplicates are found last but may stand in early lines.
        if len(self._errors) < 2 * self._rules.max_errors:
            self._errors.append(error)

    def _count_errors(self, number: int) -> None:
        self._num_errors += number

    def _refusal(self) -> BadLines:
        errors = sorted(self._errors, key=lambda error: error.line or 0)[: self._rules.max_errors]
        first = errors[0]
        where = f"Line {first.line}: " if first.line else ""
        more = f" ({self._num_errors} errors in all)" if self._num_errors > 1 else ""
        return BadLines(
            f"{where}{first.message}{more} Nothing was queued.", errors, self._num_errors
        )


def _nothing_in_it(any_bytes: bool) -> LineError:
    if not any_bytes:
        return LineError("empty_file", "The file is empty.")
    return LineError("empty_batch", "The file has no requests, only blank lines.")


def index_file(
    path: Path,
    folder: Path,
    rules: IntakeRules,
    on_read: Callable[[], None] = lambda: None,
    places: CheckerPlaces | None = None,
) -> IntakeSummary:
    """Check and index a file that lies on disk already. Raises as `Intake.finish` does.

    `on_read` is called every megabyte, and may raise what should end it.
    """
    size_bytes = path.stat().st_size
    intake = Intake(path, folder, rules, places)
    try:
        for read_bytes in range(READ_BYTES, size_bytes + READ_BYTES, READ_BYTES):
            intake.grown(min(read_bytes, size_bytes))
            on_read()
        return intake.finish()
    finally:
        intake.close()
