"""The inputs that a person names on the command line: files, patterns, standard input, tables."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from batch_app.client.source import STDIN, Source
from batch_app.client.tables import Empty, Prompt, Table, TableFormat, requests_of
from batch_app.errors import BadRequest


class InputFormat(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    TEXT = "text"


Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE",
        help="Requests as JSON lines, or a table (.csv, .tsv, .parquet, .txt) with --template; "
        "also packed (.gz, .zst). Patterns in quotes are looked up; - is standard input. Each "
        "file becomes a batch.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        "-t",
        help="For tables: what to ask about each row, with columns in braces: "
        "'Summarise: {text}'. Of plain text, {text} is a line.",
        show_default="the column prompt or text",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        help="For tables: the system message, with columns in braces.", show_default=False
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        help="For tables: the column that identifies a row, as custom_id.",
        show_default="the row's number",
    ),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        help="For CSV: what stands between cells.", show_default=", else ; or tab, by the header"
    ),
]
EmptyCells = Annotated[
    Empty,
    typer.Option(
        help="For tables: what to do with a row that has an empty cell in the template: refuse the "
        "table, leave the place blank, or skip the row."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="For tables: longest answer, in tokens.", min=1, show_default="the model's"),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="For tables: 0 is deterministic.", min=0.0, show_default="the model's"),
]
Body = Annotated[
    str | None,
    typer.Option(
        help="For tables: more fields of each request, as a JSON object.", show_default=False
    ),
]
Format = Annotated[
    InputFormat | None,
    typer.Option("--format", help="What the input is.", show_default="by the file's name"),
]


def named_files(patterns: Sequence[str]) -> list[str]:
    """The files, each once, in the order they are named.

    Raises:
        BadRequest: a pattern finds nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern == STDIN or Path(pattern).exists() or not glob.has_magic(pattern):
            names = [pattern]
        else:
            names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
            if not names:
                raise BadRequest(f"No file fits {pattern!r}.")
        found |= dict.fromkeys(names)
    return list(found)


def request_fields(
    max_tokens: int | None, temperature: float | None, body: str | None
) -> dict[str, Any]:
    """What goes into each request of a table. Raises BadRequest for a body that is no object."""
    try:
        fields = orjson.loads(body) if body is not None else {}
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"--body is not JSON: {error}.", param="--body") from error
    if not isinstance(fields, dict):
        raise BadRequest("--body must be a JSON object: '{\"top_p\": 0.9}'.", param="--body")
    given = {"max_tokens": max_tokens, "temperature": temperature}
    return fields | {name: value for name, value in given.items() if value is not None}


def table_of(
    source: Source, name: str, kind: InputFormat | None, delimiter: str | None
) -> Table | None:
    """The input as a table; None where it is JSON lines."""
    if kind is InputFormat.JSONL:
        return None
    table = TableFormat(kind.value) if kind is not None else TableFormat.of(name)
    return None if table is None else Table(source, table, delimiter=delimiter)


@contextmanager
def opened(
    name: str, kind: InputFormat | None, delimiter: str | None, prompt: Prompt
) -> Iterator[tuple[Source, Table | None]]:
    """The requests of an input, and the table they were made of, if it is one.

    Raises:
        BadLines: rows of a table can't be requests.
        BadRequest: the input can't be read; or what is for tables is said of JSON lines.
    """
    with Source.of(name) as source:
        table = table_of(source, name, kind, delimiter)
        if table is not None:
            with requests_of(table, prompt) as requests:
                yield requests, table
            return
        if prompt != Prompt():
            raise BadRequest(
                f"{source.name} has whole requests already: --template, --system, --id-column, "
                "--empty, --max-tokens, --temperature and --body are for tables. "
                "(--format says what an input is where its name doesn't.)"
            )
        yield source, None
