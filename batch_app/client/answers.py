"""Answers as a table: one row a request, beside the columns that it was made from.

Read and written row by row. Where answers are parsed as JSON, they are read twice: a Parquet file
says its columns and their types at its beginning.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from batch_app.client.results import Result
from batch_app.client.tables import Prompt, Row, Table, TableFormat, pyarrow_module
from batch_app.errors import BadRequest

MAX_PARSED_COLUMNS = 1000
SKIPPED = "skipped: the row has nothing to ask"
_RESULT_COLUMNS: Mapping[str, type] = {
    "response": str,
    "error": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
}

#: Opens the results at their beginning; called once or twice.
Results = Callable[[], Iterator[Result]]


@dataclass(frozen=True, slots=True)
class Written:
    """What a table of answers has. `num_unparsed`: answers that are not a JSON object;
    `num_truncated`: of these, answers that were cut off at `max_tokens`; `num_reasoning`: answers
    whose text has the model's reasoning."""

    num_rows: int
    num_failed: int
    num_unparsed: int
    num_truncated: int = 0
    num_reasoning: int = 0


def write_answers(
    target: Path,
    results: Results,
    *,
    table: Table | None = None,
    id_column: str | None = None,
    parse_json: bool = False,
) -> Written:
    """Write results to a CSV, TSV or Parquet file, which appears whole or not at all.

    `table`: what the batch was made of; each of its rows then stands beside its answer, whether it
    has one or not. `parse_json`: each key of an answer that is a JSON object becomes a column.

    Raises:
        BadRequest: the results don't belong to the table, or the target's format is unknown.
    """
    kind = TableFormat.of(target.name)
    if kind is None or kind is TableFormat.TEXT:
        raise BadRequest(f"{target}: answers can be written as .csv, .tsv or .parquet.")
    columns = table.columns() if table is not None else ["custom_id"]
    names = _Names(columns)
    parsed = _parsed_columns(results(), names) if parse_json else {}
    types: dict[str, type] = {names.of[name]: kind for name, kind in _RESULT_COLUMNS.items()}
    types |= dict(parsed.values())
    part = target.with_name(f".{target.name}.part")
    num_rows = num_failed = num_unparsed = num_truncated = num_reasoning = 0
    try:
        with _writer(kind, part, columns, types, table) as write:
            for values, result in _pairs(results(), table, id_column):
                answer = _answer(result, names, parsed if parse_json else None)
                write.row({**values, **answer.values})
                num_rows += 1
                num_failed += answer.is_failed
                num_unparsed += answer.is_unparsed
                if result is not None:
                    num_reasoning += result.has_reasoning
                    num_truncated += answer.is_unparsed and result.finish_reason == "length"
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return Written(num_rows, num_failed, num_unparsed, num_truncated, num_reasoning)


class _Names:
    """What the result's columns are called where the table has columns of their names."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.taken = set(columns)
        self.of = {name: self.free(name) for name in _RESULT_COLUMNS}

    def free(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


@dataclass(frozen=True, slots=True)
class _Answer:
    values: dict[str, Any]
    is_failed: bool = False
    is_unparsed: bool = False


def _answer(
    result: Result | None, names: _Names, parsed: Mapping[str, tuple[str, type]] | None
) -> _Answer:
    if result is None:
        return _Answer({names.of["error"]: SKIPPED})
    if result.error is not None:
        message = f"{result.error.code}: {result.error.message}"
        return _Answer({names.of["error"]: message}, is_failed=True)
    values: dict[str, Any] = {
        names.of["response"]: _said(result),
        names.of["finish_reason"]: result.finish_reason,
        names.of["prompt_tokens"]: result.tokens("prompt"),
        names.of["completion_tokens"]: result.tokens("completion"),
    }
    if parsed is None:
        return _Answer(values)
    found = _parsed(result)
    if found is None:
        values[names.of["error"]] = f"the answer is not a JSON object{_cut_off(result)}"
        return _Answer(values, is_unparsed=True)
    for key, value in found.items():
        column, kind = parsed[key]
        values[column] = _as(kind, value)
    return _Answer(values)


def _cut_off(result: Result) -> str:
    """` (cut off at max_tokens=60)`; empty for an answer that was not cut off."""
    if result.finish_reason != "length":
        return ""
    limit = "" if result.max_tokens is None else f"={result.max_tokens}"
    return f" (cut off at max_tokens{limit})"


def _said(result: Result) -> str:
    """The text; for an endpoint that answers none, what it answers, as JSON."""
    if result.text is not None:
        return result.text
    body = result.body or {}
    data, choices = body.get("data"), body.get("choices")
    if isinstance(data, list) and len(data) == 1 and _has(data[0], "embedding"):
        return _as_json(data[0]["embedding"])
    if isinstance(choices, list) and choices and _has(choices[0], "message"):
        return _as_json(choices[0]["message"])  # calls of tools
    return _as_json(body)


def _as_json(value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # deeper than it writes, though it reads as much
        with suppress(RecursionError):
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return "(nested too deeply)"


def _has(value: object, name: str) -> bool:
    return isinstance(value, dict) and name in value


def _parsed(result: Result) -> dict[str, Any] | None:
    try:
        found = result.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _parsed_columns(results: Iterator[Result], names: _Names) -> dict[str, tuple[str, type]]:
    """Of each key: its column and the type that all its values fit."""
    kinds: dict[str, set[type]] = {}
    for result in results:
        for key, value in (_parsed(result) or {}).items() if result.ok else ():
            kinds.setdefault(key, set()).add(type(value))
        if len(kinds) > MAX_PARSED_COLUMNS:
            raise BadRequest(
                f"The answers have more than {MAX_PARSED_COLUMNS} different keys: too many to be "
                "columns. Leave out --parse-json."
            )
    return {key: (names.free(key), _common(found)) for key, found in kinds.items()}


def _common(kinds: set[type]) -> type:
    kinds = kinds - {type(None)}
    if kinds == {bool}:
        return bool
    if kinds == {int}:
        return int
    return float if kinds and kinds <= {int, float} else str


def _as(kind: type, value: Any) -> Any:
    if value is None:
        return None
    if kind is int and not -(2**63) <= value < 2**63:
        return None
    if kind is str:
        return value if isinstance(value, str) else _as_json(value)
    return kind(value)


def _pairs(
    results: Iterator[Result], table: Table | None, id_column: str | None
) -> Iterator[tuple[Mapping[str, Any], Result | None]]:
    """Each row with its result, both in their order; a row that was skipped has none."""
    if table is None:
        for result in results:
            yield {"custom_id": result.custom_id}, result
        return
    bound = Prompt(id_column=id_column, template="").bound(table.columns())
    waiting = next(results, None)
    for row in table.rows():
        if waiting is not None and bound.custom_id(row) == waiting.custom_id:
            yield row.values, waiting
            waiting = next(results, None)
        else:
            yield _whole(row), None
    if waiting is not None:
        raise BadRequest(
            f"The result {waiting.custom_id!r} has no row in {table.source.name}, or stands in "
            "another order: is it the table that the batch was made of, with the same --id-column?"
        )


def _whole(row: Row) -> Mapping[str, Any]:
    if row.problem is not None:
        raise BadRequest(f"Row {row.number}: {row.problem}.")
    return row.values


# -- files -----------------------------------------------------------------------------------------


class _Writer(Protocol):
    def __enter__(self) -> _Writer: ...

    def __exit__(self, *error: object) -> None: ...

    def row(self, values: Mapping[str, Any]) -> None: ...


def _writer(
    kind: TableFormat,
    path: Path,
    columns: Sequence[str],
    types: Mapping[str, type],
    table: Table | None,
) -> _Writer:
    if kind is TableFormat.PARQUET:
        return _ParquetWriter(path, columns, types, table)
    return _CsvWriter(path, [*columns, *types], "\t" if kind is TableFormat.TSV else ",")


class _CsvWriter:
    def __init__(self, path: Path, columns: Sequence[str], delimiter: str) -> None:
        self._columns = columns
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, delimiter=delimiter)
        self._writer.writerow(columns)

    def __enter__(self) -> _CsvWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def row(self, values: Mapping[str, Any]) -> None:
        self._writer.writerow([values.get(column) for column in self._columns])


class _ParquetWriter:
    """Keeps the types of a Parquet table's own columns; those of other tables are text."""

    _ROWS_A_GROUP = 10_000

    def __init__(
        self, path: Path, columns: Sequence[str], types: Mapping[str, type], table: Table | None
    ) -> None:
        self._arrow = pyarrow_module("pyarrow")
        parquet = pyarrow_module("pyarrow.parquet")
        kinds = {
            str: self._arrow.string(),
            int: self._arrow.int64(),
            float: self._arrow.float64(),
            bool: self._arrow.bool_(),
        }
        if table is not None and table.kind is TableFormat.PARQUET:
            with table.parquet() as file:
                own = list(file.schema_arrow)
        else:
            own = [
                self._arrow.field(
                    name, kinds[int] if name == "line" and _is_text(table) else kinds[str]
                )
                for name in columns
            ]
        added = [self._arrow.field(name, kinds[kind]) for name, kind in types.items()]
        self._schema = self._arrow.schema([*own, *added])
        self._file = parquet.ParquetWriter(path, self._schema)
        self._rows: list[Mapping[str, Any]] = []

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._file.close()

    def row(self, values: Mapping[str, Any]) -> None:
        self._rows.append(values)
        if len(self._rows) >= self._ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _is_text(table: Table | None) -> bool:
    return table is not None and table.kind is TableFormat.TEXT
