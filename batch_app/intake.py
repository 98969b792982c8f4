"""Intake: check every line of an input file and index it, in one pass and in little memory.

`Intake.feed` takes the file's bytes as they arrive, in chunks of any size, so the check runs while
an upload is still on its way. What stays in memory is one partial line, the first errors, and eight
bytes a request (to find duplicate ids); everything else goes to the index on disk.

Forgiven, because the meaning is plain: a UTF-8 byte order mark, CRLF line ends, blank lines.
"""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from batch_app.core import LineError
from batch_app.errors import BadLines
from batch_app.index import Index, IndexWriter
from batch_app.lines import LineParser, LineProblem, RequestLine
from batch_app.policy import check_template_arguments
from batch_app.prefixes import fingerprints
from batch_app.registry import ModelRegistry
from batch_app.shapes import BodyLimits

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IntakeRules:
    """What the lines of one file are held to.

    `model`: the registry's name of the model that all requests run on, whatever the lines say; None
    where each line names its own. `endpoint`: what every line's `url` must be, or None for any.
    `max_requests` 0 means no limit.
    """

    registry: ModelRegistry
    model: str | None = None
    endpoint: str | None = None
    max_line_bytes: int = 8 << 20
    max_requests: int = 0
    max_errors: int = 100
    limits: BodyLimits = field(default_factory=BodyLimits)


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
        self._parser = LineParser(rules.endpoint, rules.limits)
        self._partial = bytearray()
        self._skipping = False  # inside a line that is too long, until its end
        self._offset = 0  # of the partial line's first byte, in the file
        self._line = 1  # number of the partial line
        self._any_bytes = False
        self._is_other_text = False  # no line of it can be read: one error says so
        self._id_hashes = array("q")
        self._errors: list[LineError] = []
        self._num_errors = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file. Raises StorageFull when the index can't be written."""
        lines = chunk.split(b"\n")
        begun = lines.pop()
        if lines and (self._partial or self._skipping):
            self._append(lines[0])
            lines[0] = bytes(self._partial)
            self._partial.clear()
        end_line = self._end_line
        for line in lines:
            end_line(line)
        if begun:
            self._append(begun)

    def finish(self, input_path: Path) -> IntakeSummary:
        """The file is complete, at `input_path`: check what only the whole can show.

        Raises:
            BadLines: some line, or the file as a whole, can't run; nothing of it may.
            StorageFull: the index can't be written.
        """
        if self._partial or self._skipping:
            self._end_line(bytes(self._partial))
        with self._index:
            self._index.finish()
        index = Index.load(self._folder)
        for error in self._duplicates(index, input_path):
            self._add_error(error)
        if self._num_errors == 0 and len(index) == 0:
            self._add_error(self._nothing_in_it())
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

    # -- lines ---------------------------------------------------------------------------------

    def _append(self, piece: bytes) -> None:
        if self._skipping:
            self._offset += len(piece)
        elif len(self._partial) + len(piece) > self._rules.max_line_bytes:
            self._skipping = True
            self._offset += len(self._partial) + len(piece)
            self._partial.clear()
        else:
            self._partial += piece

    def _end_line(self, raw: bytes) -> None:
        if self._is_other_text:
            return
        offset, line = self._offset, self._line
        self._line += 1
        if self._skipping or len(raw) > self._rules.max_line_bytes:
            self._skipping = False
            self._offset += 1 if not raw else len(raw) + 1
            self._add_error(
                LineError(
                    "invalid_request",
                    f"The line is longer than {self._rules.max_line_bytes} bytes "
                    "(max_line_bytes). Split it, or have the limit raised.",
                    line,
                )
            )
            return
        self._offset += len(raw) + 1
        if line == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                self._is_other_text = True
                self._add_error(
                    LineError("invalid_json_line", "The file is UTF-16. Save it as UTF-8.", line)
                )
                return
            if raw.startswith(codecs.BOM_UTF8):
                raw = raw[len(codecs.BOM_UTF8) :]
                offset += len(codecs.BOM_UTF8)
        if not raw or raw.isspace():
            return
        self._any_bytes = True
        try:
            self._take(raw, offset, line)
        except LineProblem as problem:
            self._add_error(LineError(problem.code, problem.message, line, problem.param))

    def _take(self, raw: bytes, offset: int, line: int) -> None:
        rules = self._rules
        request = self._parser.parse(raw)
        model = rules.model
        if model is None:
            if request.model is None:
                raise LineProblem(
                    "missing_required_parameter", 'The body has no "model".', "body.model"
                )
            if not rules.registry.knows(request.model):
                raise LineProblem(
                    "model_not_found",
                    f"The model {request.model[:200]!r} is not in this server's registry "
                    "(GET /v1/models lists it).",
                    "body.model",
                )
            model = rules.registry.get(request.model).name
        if request.template_arguments:
            entry = rules.registry.get(model)
            check_template_arguments(request.template_arguments, entry.chat_template_kwargs)
        self._id_hashes.append(hash(request.custom_id))
        self._index.add(
            offset=offset,
            length=len(raw),
            line=line,
            max_tokens=request.max_tokens,
            model=model,
            endpoint=request.endpoint,
            content=_content_hash(request) if request.deterministic else 0,
            marks=fingerprints(*request.prompt),
        )

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

    def _nothing_in_it(self) -> LineError:
        if self._offset == 0:
            return LineError("empty_file", "The file is empty.")
        return LineError("empty_batch", "The file has no requests, only blank lines.")

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


def _content_hash(request: RequestLine) -> int:
    """64 bits that are the same for requests that ask the same; never 0.

    Python's own hash: keyed anew in each process, but one index is the work of one process.
    """
    return (hash(request.body) ^ hash(request.endpoint)) & 0xFFFFFFFFFFFFFFFF or 1


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
