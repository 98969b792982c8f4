"""Tables as requests: CSV, Parquet and plain text with a prompt template, row by row.

A row becomes one chat request. Which request a row became can be told again from the table alone
(`--id-column`, else the row's number), so that the results find their rows later.

CSV and text need nothing beyond the standard library, Parquet needs pyarrow (the extra `tables`).
"""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from types import ModuleType
from typing import Any

import orjson

from batch_app.client.source import Source
from batch_app.core import LineError
from batch_app.errors import BadLines, BadRequest
from batch_app.json_lines import escape_line_separators

MAX_CELL_CHARS = 16 << 20
MAX_ERRORS_KEPT = 100
MAX_ID_CHARS = 512
ROWS_AT_A_TIME = 4096
DEFAULT_TEMPLATE_COLUMNS = ("prompt", "text")


class TableFormat(StrEnum):
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    TEXT = "text"

    @classmethod
    def of(cls, name: str) -> TableFormat | None:
        """By a file's name, packed or not; None for one that is no table."""
        name = name.lower().removesuffix(".gz").removesuffix(".zst")
        for suffix, kind in _SUFFIXES.items():
            if name.endswith(suffix):
                return kind
        return None


_SUFFIXES = {
    ".csv": TableFormat.CSV,
    ".tsv": TableFormat.TSV,
    ".parquet": TableFormat.PARQUET,
    ".pq": TableFormat.PARQUET,
    ".txt": TableFormat.TEXT,
}


class Empty(StrEnum):
    """What becomes of a row that has nothing where the template asks for something."""

    ERROR = "error"
    BLANK = "blank"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table. `number` counts from 1, without the header; `problem`: it is malformed."""

    number: int
    values: Mapping[str, Any]
    problem: str | None = None


class Table:
    """The rows of a file, to be read as often as needed."""

    def __init__(self, source: Source, kind: TableFormat, *, delimiter: str | None = None) -> None:
        self.source = source
        self.kind = kind
        self._delimiter = delimiter or ("\t" if kind is TableFormat.TSV else None)
        if self._delimiter is not None and len(self._delimiter) != 1:
            raise BadRequest("The delimiter must be a single character.", param="--delimiter")

    def columns(self) -> list[str]:
        """Raises BadRequest where the file has none that could be told apart."""
        if self.kind is TableFormat.TEXT:
            return ["line", "text"]
        if self.kind is TableFormat.PARQUET:
            with self.parquet() as file:
                return list(file.schema_arrow.names)
        with self._csv() as reader:
            return list(reader[0])

    def _separator(self, header: str) -> str:
        """What was said; else a comma, or what the header has in place of any: where numbers have
        commas, spreadsheets write something else."""
        if self._delimiter is not None:
            return self._delimiter
        return next((one for one in (",", ";", "\t") if one in header), ",")

    def rows(self) -> Iterator[Row]:
        """All rows, malformed ones with their `problem`."""
        if self.kind is TableFormat.TEXT:
            yield from self._text_rows()
        elif self.kind is TableFormat.PARQUET:
            with self.parquet() as file:
                number = 0
                for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME):
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(number, values)
        else:
            yield from self._csv_rows()

    @contextmanager
    def parquet(self) -> Iterator[Any]:
        """The open file, as pyarrow's ParquetFile."""
        parquet, arrow = pyarrow_module("pyarrow.parquet"), pyarrow_module("pyarrow")
        with self.source.seekable() as file:
            try:
                yield parquet.ParquetFile(file)
            except (arrow.ArrowException, OSError) as error:
                raise BadRequest(f"{self.source.name} can't be read as Parquet: {error}") from error

    @contextmanager
    def _csv(self) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
        csv.field_size_limit(MAX_CELL_CHARS)
        with self.source.opened() as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            try:
                first = text.readline()
                reader = csv.reader(
                    chain([first], text), delimiter=self._separator(first), strict=True
                )
                header = [name.strip() for name in next(reader, [])]
            except (csv.Error, UnicodeDecodeError) as error:
                raise BadRequest(f"{self.source.name}, header: {_said(error)}.") from error
            if not any(header):
                raise BadRequest(f"{self.source.name} is empty: it needs a header and rows.")
            twice = {name for name in header if header.count(name) > 1}
            if twice:
                names = ", ".join(repr(name) for name in sorted(twice))
                raise BadRequest(f"{self.source.name} has more than one column {names}.")
            yield header, reader

    def _csv_rows(self) -> Iterator[Row]:
        with self._csv() as (header, reader):
            number = 0
            while True:
                number += 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    # After this the reader may be anywhere: the rest can't be trusted.
                    yield Row(number, {}, f"{_said(error)}; what follows was not read")
                    return
                except UnicodeDecodeError as error:
                    yield Row(number, {}, f"{_said(error)}; what follows was not read")
                    return
                if cells is None:
                    return
                if not cells:
                    number -= 1  # a blank line is no row
                    continue
                problem = None
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells for {len(header)} columns"
                yield Row(number, dict(zip(header, cells, strict=False)), problem)

    def _text_rows(self) -> Iterator[Row]:
        number = 0
        with self.source.opened() as raw:
            for line_number, raw_line in enumerate(raw, start=1):
                try:
                    text = raw_line.decode("utf-8-sig" if line_number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    number += 1
                    yield Row(number, {"line": line_number, "text": ""}, _said(error))
                    continue
                if text:
                    number += 1
                    yield Row(number, {"line": line_number, "text": text})


@dataclass(frozen=True)
class Prompt:
    """How a row becomes a request. `template` and `system` name columns in braces.

    `body` goes into every request: `max_tokens`, `temperature` and the like.
    """

    template: str | None = None
    system: str | None = None
    id_column: str | None = None
    empty: Empty = Empty.ERROR
    body: Mapping[str, Any] = field(default_factory=dict)

    def bound(self, columns: Sequence[str]) -> BoundPrompt:
        """Raises BadRequest where it names a column that isn't there."""
        template = self.template
        if template is None:
            found = [name for name in DEFAULT_TEMPLATE_COLUMNS if name in columns]
            if not found:
                raise BadRequest(
                    "Say what to ask with --template, as in --template 'Summarise: "
                    f"{{{columns[0]}}}'. Columns: {', '.join(columns)}.",
                    param="--template",
                )
            template = f"{{{found[0]}}}"
        return BoundPrompt(
            self,
            _parts(template, columns, "--template"),
            _parts(self.system, columns, "--system") if self.system is not None else None,
            columns,
        )


#: Text to stand as it is, or a column with how to format it.
_Part = tuple[str, str | None, str]


class BoundPrompt:
    """A prompt whose columns are those of a table."""

    def __init__(
        self,
        prompt: Prompt,
        template: list[_Part],
        system: list[_Part] | None,
        columns: Sequence[str],
    ) -> None:
        self._prompt = prompt
        self._template = template
        self._system = system
        if prompt.id_column is not None and prompt.id_column not in columns:
            raise BadRequest(
                f"There is no column {prompt.id_column!r}. Columns: {', '.join(columns)}.",
                param="--id-column",
            )

    def custom_id(self, row: Row) -> str:
        """Raises BadCell where the row has none that could be used."""
        if self._prompt.id_column is None:
            return f"row-{row.number}"
        value = row.values.get(self._prompt.id_column)
        text = "" if value is None else str(value).strip()
        if not text:
            raise BadCell(self._prompt.id_column, "is empty, and the id")
        if len(text) > MAX_ID_CHARS:
            raise BadCell(self._prompt.id_column, f"has more than {MAX_ID_CHARS} characters")
        return text

    def request(self, row: Row) -> dict[str, Any] | None:
        """The row's request; None for one that is skipped. Raises BadCell."""
        if row.problem is not None:
            raise BadCell(None, row.problem)
        custom_id = self.custom_id(row)
        messages = []
        try:
            if self._system is not None:
                messages.append({"role": "system", "content": self._filled(self._system, row)})
            messages.append({"role": "user", "content": self._filled(self._template, row)})
        except _Skipped:
            return None
        return {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": messages, **self._prompt.body},
        }

    def _filled(self, parts: list[_Part], row: Row) -> str:
        texts = []
        for literal, column, spec in parts:
            texts.append(literal)
            if column is None:
                continue
            value = row.values.get(column)
            if value is None or value == "" or value != value:  # the last: not a number
                if self._prompt.empty is Empty.ERROR:
                    raise BadCell(column, "is empty")
                if self._prompt.empty is Empty.SKIP:
                    raise _Skipped
                continue
            try:
                texts.append(format(value, spec) if spec else str(value))
            except (ValueError, TypeError) as error:
                raise BadCell(column, f"does not fit {{{column}:{spec}}}: {error}") from None
        return "".join(texts)


class BadCell(Exception):
    """A row that can't become a request, because of this column."""

    def __init__(self, column: str | None, problem: str) -> None:
        super().__init__(problem)
        self.column = column
        self.problem = problem


class _Skipped(Exception):
    """The row has nothing to ask."""


def requests_of(table: Table, prompt: Prompt) -> Source:
    """The table's requests, in a temporary file.

    Raises:
        BadLines: rows that can't be requests; `line` is the row's number, the message names the
            column.
        BadRequest: the file can't be read, or a column isn't there.
    """
    bound = prompt.bound(table.columns())
    errors: list[LineError] = []
    num_errors = num_requests = 0
    seen: set[int] | None = set() if prompt.id_column is not None else None

    def lines() -> Iterator[bytes]:
        nonlocal num_errors, num_requests
        for row in table.rows():
            try:
                request = bound.request(row)
                if request is None:
                    continue
                if seen is not None:
                    known = hash(request["custom_id"])
                    if known in seen:
                        raise BadCell(
                            prompt.id_column, f"{request['custom_id']!r} stands in an earlier row"
                        )
                    seen.add(known)
            except BadCell as bad:
                num_errors += 1
                if len(errors) < MAX_ERRORS_KEPT:
                    where = f", column {bad.column!r}" if bad.column else ""
                    errors.append(
                        LineError("invalid_request", f"row {row.number}{where}: {bad.problem}.")
                    )
                continue
            num_requests += 1
            if not num_errors:
                yield escape_line_separators(orjson.dumps(request)) + b"\n"

    source = Source.spooled(table.source.name, lines())
    if num_errors or not num_requests:
        source.close()
    if num_errors:
        raise BadLines(
            f"{table.source.name}: {num_errors:,} rows can't be requests. Nothing was sent. "
            "(--empty skip or blank lets empty cells pass.)",
            errors,
            num_errors,
        )
    if not num_requests:
        raise BadRequest(f"{table.source.name} has no rows to ask about.")
    return source


def pyarrow_module(name: str) -> ModuleType:
    """Raises BadRequest, naming the command that installs it, where pyarrow is missing."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadRequest(
            "Parquet needs pyarrow: pip install 'vllm-batch-server[tables]'. CSV works without it."
        ) from error


def _parts(template: str, columns: Sequence[str], flag: str) -> list[_Part]:
    parts: list[_Part] = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadRequest(
            f"{flag} {template!r}: {error}. A brace that is meant as one is doubled.", param=flag
        ) from error
    for literal, column, spec, conversion in pieces:
        if column is not None and (column not in columns or conversion):
            raise BadRequest(
                f"{flag} asks for {{{column}}}, and there is no such column. Columns: "
                f"{', '.join(columns)}. A brace that is meant as one is doubled.",
                param=flag,
            )
        parts.append((literal, column, spec or ""))
    return parts


def _said(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "this isn't UTF-8 text"
    return str(error)
