"""Intake: check every line of an input file and index it, in one pass and in little memory.

`Intake.feed` takes the file's bytes as they arrive, in chunks of any size, so the check runs while
an upload is still on its way. What stays in memory is one partial line, the first errors, and eight
bytes a request (to find duplicate ids); everything else goes to the index on disk.

Forgiven, because the meaning is plain: a UTF-8 byte order mark, CRLF line ends, blank lines.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from batch_app.core import LineError
from batch_app.errors import BadLines
from batch_app.index import Index, IndexWriter
from batch_app.line_check import Found, IntakeRules, LineCheck

__all__ = ["Intake", "IntakeRules", "IntakeSummary", "index_file"]

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IntakeSummary:
    """What an accepted file holds, in order of first appearance."""

    num_requests: int
    models: tuple[str, ...]
    endpoints: tuple[str, ...]


class Intake:
    """One pass over one file. Feed it all bytes, then `finish`; `close` gives up.

    The index is written to `folder`, which must exist.
    """

    def __init__(self, folder: Path, rules: IntakeRules) -> None:
        self._folder = folder
        self._rules = rules
        self._index = IndexWriter(folder)
        self._check = LineCheck(
            rules,
            model_number=self._index.model,
            endpoint_number=self._index.endpoint,
            on_found=self._add,
            on_error=self._add_error,
        )
        self._id_hashes = array("q")
        self._errors: list[LineError] = []
        self._num_errors = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file. Raises StorageFull when the index can't be written."""
        self._check.feed(chunk)

    def finish(self, input_path: Path) -> IntakeSummary:
        """The file is complete, at `input_path`: check what only the whole can show.

        Raises:
            BadLines: some line, or the file as a whole, can't run; nothing of it may.
            StorageFull: the index can't be written.
        """
        any_bytes = self._check.end()
        with self._index:
            self._index.finish()
        index = Index.load(self._folder)
        for error in self._duplicates(index, input_path):
            self._add_error(error)
        if self._num_errors == 0 and len(index) == 0:
            self._add_error(_nothing_in_it(any_bytes))
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
        with self._index:
            pass

    def _add(self, found: Found) -> None:
        self._index.extend(found.records, found.marks)
        self._id_hashes.frombytes(found.id_hashes.tobytes())

    # -- the file as a whole -------------------------------------------------------------------

    def _duplicates(self, index: Index, input_path: Path) -> Iterator[LineError]:
        """Equal hashes are only a suspicion: the ids themselves are read again and compared."""
        hashes = np.frombuffer(self._id_hashes, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(equal) == 0:
            return
        in_groups = np.unique(np.concatenate([order[equal], order[equal + 1]]))
        first_line: dict[str, int] = {}
        with input_path.open("rb") as file:
            for number in in_groups:
                record = index.records[number]
                raw = os.pread(file.fileno(), int(record["length"]), int(record["offset"]))
                custom_id = orjson.loads(raw)["custom_id"]
                line = int(record["line"])
                earlier = first_line.setdefault(custom_id, line)
                if earlier != line:
                    yield LineError(
                        "duplicate_custom_id",
                        f'"custom_id" is the same as in line {earlier}. '
                        "Give each line one of its own.",
                        line,
                        "custom_id",
                    )

    def _add_error(self, error: LineError) -> None:
        self._num_errors += 1
        # Twice the limit, since duplicates are found last but may stand in early lines.
        if len(self._errors) < 2 * self._rules.max_errors:
            self._errors.append(error)

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
    path: Path, folder: Path, rules: IntakeRules, on_read: Callable[[], None] = lambda: None
) -> IntakeSummary:
    """Check and index a file that lies on disk already. Raises as `Intake.finish` does.

    `on_read` is called every megabyte, and may raise what should end it.
    """
    intake = Intake(folder, rules)
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                intake.feed(chunk)
                on_read()
        return intake.finish(path)
    finally:
        intake.close()
