"""The check of lines, one after the other, and what it finds: their records for the index, and what
is wrong with the others.

What can only be said of the whole file is `batch_app.intake`'s.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_app.core import LineError
from batch_app.index import DTYPE
from batch_app.lines import LineParser, LineProblem, RequestLine, Verdict
from batch_app.policy import check_template_arguments
from batch_app.prefixes import fingerprints_of, head_of
from batch_app.registry import ModelRegistry
from batch_app.shapes import BodyLimits

#: So much at a time is taken apart. Of a megabyte, the allocator gives the memory back each time,
#: and gets it anew, page by page, which can take longer than the work.
PIECE_BYTES = 256 << 10
_MOST_TOKENS = 2**32 - 1


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
class Found:
    """Of some good lines, in their order: `records` of dtype `index.DTYPE`, all the fingerprints of
    their prompts, and a hash of each id."""

    records: npt.NDArray[Any]
    marks: npt.NDArray[np.uint32]
    id_hashes: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Sort:
    """What the records of lines with the same verdict have in common."""

    verdict: Verdict
    fixed: tuple[int, int, int]  # max_tokens, model, endpoint
    head: int
    content: int  # of the endpoint; 0: the answer is not determined


#: How files begin that aren't JSON lines, and what to do about each.
_OTHER_FILES = (
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "The file is UTF-16. Save it as UTF-8."),
    ((b"\x1f\x8b",), "The file is packed by gzip: unpack it. (`vllm-batch submit` does so.)"),
    ((b"(\xb5/\xfd",), "The file is packed by zstd: unpack it. (`vllm-batch submit` does so.)"),
    ((b"PK\x03\x04",), "The file is a ZIP archive or a spreadsheet, not JSON lines."),
    ((b"PAR1",), "The file is a Parquet table. `vllm-batch submit` makes requests of its rows."),
)


def _what_else(first: bytes) -> str | None:
    """What the file is that begins with this line, where it can't be one of JSON lines."""
    for beginnings, why in _OTHER_FILES:
        if first.startswith(beginnings):
            return why
    begun = first.removeprefix(codecs.BOM_UTF8).strip()
    if begun == b"[" or begun.startswith(b"[{"):
        return (
            "The file is one JSON array. Each request stands in a line of its own: "
            "`jq -c '.[]' FILE > requests.jsonl` makes it so."
        )
    if begun == b"{":
        return (
            "Here a request stands in several lines. Each one stands in a line of its own: "
            "`jq -c . FILE > requests.jsonl` makes it so."
        )
    return None


class LineCheck:
    """Takes the bytes of a file as they come, and hands on what it found in each piece of them.

    `model_number` and `endpoint_number` say what stands for a name in the records. `on_found` gets
    the good lines, `on_error` each of the others, with its number; both in order.
    """

    def __init__(
        self,
        rules: IntakeRules,
        *,
        model_number: Callable[[str], int],
        endpoint_number: Callable[[str], int],
        on_found: Callable[[Found], None],
        on_error: Callable[[LineError], None],
    ) -> None:
        self._rules = rules
        self._model_number = model_number
        self._endpoint_number = endpoint_number
        self._on_found = on_found
        self._on_error = on_error
        self._parser = LineParser(rules.endpoint, rules.limits)
        self._partial = bytearray()
        self._skipping = False  # inside a line that is too long, until its end
        self._offset = 0  # of the partial line's first byte, in the file
        self._line = 1  # number of the partial line
        self._is_other_text = False  # no line of it can be read: one error says so
        self._sort: _Sort | None = None
        # Of the piece at hand, a line each.
        self._places: list[tuple[int, int, int]] = []  # offset, length, number
        self._sorts: list[_Sort] = []
        self._contents: list[int] = []
        self._streams: list[bytes] = []
        self._id_hashes: list[int] = []

    def begin_at(self, offset: int) -> None:
        """What is fed next lies there in the file, and begins a line, which is counted as the
        first."""
        self._partial.clear()
        self._skipping = False
        self._offset = offset
        self._line = 1

    @property
    def num_lines(self) -> int:
        """Lines that have ended so far, good or bad or blank."""
        return self._line - 1

    @property
    def is_other_text(self) -> bool:
        """The file can't be read at all; an error said so."""
        return self._is_other_text

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the file. Raises what the callbacks raise."""
        for start in range(0, len(chunk), PIECE_BYTES):
            self._feed_piece(chunk[start : start + PIECE_BYTES])

    def end(self) -> bool:
        """There are no more. Returns whether there were any."""
        if self._partial or self._skipping:
            self._end_line(bytes(self._partial))
            self._hand_on()
        return self._offset > 0

    def _feed_piece(self, piece: bytes) -> None:
        lines = piece.split(b"\n")
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
        self._hand_on()

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
        self._line = line + 1
        if self._skipping or len(raw) > self._rules.max_line_bytes:
            self._skipping = False
            self._offset += 1 if not raw else len(raw) + 1
            self._on_error(
                LineError(
                    "invalid_request",
                    f"The line is longer than {self._rules.max_line_bytes} bytes "
                    "(max_line_bytes). Split it, or have the limit raised.",
                    line,
                )
            )
            return
        self._offset = offset + len(raw) + 1
        if offset == 0:
            why = _what_else(raw)
            if why is not None:
                self._is_other_text = True
                self._on_error(LineError("invalid_json_line", why, line))
                return
            if raw.startswith(codecs.BOM_UTF8):
                raw = raw[len(codecs.BOM_UTF8) :]
                offset += len(codecs.BOM_UTF8)
        if not raw or raw.isspace():
            return
        try:
            request = self._parser.parse(raw)
            sort = self._sort
            if sort is None or sort.verdict is not request.verdict:
                sort = self._sort = self._sort_of(request.verdict)
        except LineProblem as problem:
            self._on_error(LineError(problem.code, problem.message, line, problem.param))
            return
        self._places.append((offset, len(raw), line))
        self._sorts.append(sort)
        self._contents.append(_content_hash(request, sort.content) if sort.content else 0)
        self._streams.append(request.stream)
        self._id_hashes.append(hash(request.custom_id))

    def _sort_of(self, verdict: Verdict) -> _Sort:
        """Raises LineProblem where no request of this sort can run."""
        rules = self._rules
        model = rules.model
        if model is None:
            if verdict.model is None:
                raise LineProblem(
                    "missing_required_parameter", 'The body has no "model".', "body.model"
                )
            if not rules.registry.knows(verdict.model):
                raise LineProblem(
                    "model_not_found",
                    f"The model {verdict.model[:200]!r} is not in this server's registry "
                    "(GET /v1/models lists it).",
                    "body.model",
                )
            model = rules.registry.get(verdict.model).name
        if verdict.template_arguments:
            entry = rules.registry.get(model)
            check_template_arguments(verdict.template_arguments, entry.chat_template_kwargs)
        return _Sort(
            verdict,
            (
                min(max(verdict.max_tokens, 0), _MOST_TOKENS),
                self._model_number(model),
                self._endpoint_number(verdict.endpoint),
            ),
            head_of(verdict.head),
            (hash(verdict.endpoint) or 1) if verdict.deterministic else 0,
        )

    def _hand_on(self) -> None:
        places = self._places
        if not places:
            return
        records = np.zeros(len(places), DTYPE)
        records["offset"], records["length"], records["line"] = np.array(places).T
        records["max_tokens"], records["model"], records["endpoint"] = np.array(
            [sort.fixed for sort in self._sorts]
        ).T
        records["content"] = np.array(self._contents, np.uint64)
        records["num_marks"], marks = fingerprints_of(
            [sort.head for sort in self._sorts], self._streams
        )
        found = Found(records, marks, np.array(self._id_hashes, np.int64))
        for taken in (places, self._sorts, self._contents, self._streams, self._id_hashes):
            taken.clear()
        self._on_found(found)


def _content_hash(request: RequestLine, endpoint: int) -> int:
    """64 bits that are the same for requests that ask the same; never 0.

    Python's own hash: keyed anew in each process, but one index is the work of one process.
    """
    return (hash(request.body) ^ endpoint) & 0xFFFFFFFFFFFFFFFF or 1
