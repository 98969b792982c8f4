"""`vllm-batch results`: what came of the requests, as lines or as a table."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from batch_app.batch_log import truncated_text
from batch_app.cli.inputs import Delimiter, Format, IdColumn, table_of
from batch_app.cli.options import Json
from batch_app.cli.remote import SECTION, ApiKey, BatchId, Server, connected
from batch_app.cli.terminal import say, show_json
from batch_app.client import Batch, BatchClient, Result, Source
from batch_app.client.answers import write_answers
from batch_app.client.results import result_of
from batch_app.client.tables import Table, pyarrow_module
from batch_app.errors import BadRequest, Conflict

app = typer.Typer()

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")

ParseJson = Annotated[
    bool,
    typer.Option("--parse-json", help="For tables: make columns of answers that are JSON objects."),
]


@app.command(rich_help_panel=SECTION)
def results(
    batch: BatchId,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--download",
            "-o",
            help="Where to: JSON lines, or .csv, .tsv or .parquet with one row a request.",
            show_default="standard output",
        ),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only requests that failed.")] = False,
    completed: Annotated[
        bool, typer.Option("--completed", help="Only requests with an answer.")
    ] = False,
    join: Annotated[
        str | None,
        typer.Option(
            help="The table that the batch was made of: its rows then stand beside their answers.",
            show_default=False,
        ),
    ] = None,
    id_column: IdColumn = None,
    kind: Format = None,
    delimiter: Delimiter = None,
    parse_json: ParseJson = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Get a batch's results. While it runs, those so far; then all, in the input's order."""
    if failed and completed:
        raise typer.BadParameter("--failed and --completed together would be everything.")
    is_table = output is not None and output.suffix in TABLE_SUFFIXES
    if (join or parse_json) and not is_table:
        raise typer.BadParameter(
            "--join and --parse-json need an --output of .csv, .tsv or .parquet."
        )
    status = "failed" if failed else "completed" if completed else None
    if output is not None:
        check_target(output, overwrite=overwrite)
    with connected(server, api_key) as client:
        seen = client.get(batch)
        if not seen.is_finished:
            say(f"The batch is {seen.status}: these are the results so far.")
        if output is None:
            for block in client.result_blocks(batch, status=status):
                sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
        elif join is not None:
            with Source.of(join) as source:
                table = table_of(source, join, kind, delimiter)
                if table is None:
                    raise BadRequest(f"{join} is no table: --format says what it is.")
                save(client, seen, output, status, table, id_column, parse_json)
        else:
            save(client, seen, output, status, None, None, parse_json)
        if as_json and output is not None:
            show_json({"batch_id": batch, "output": str(output)})


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Whether results can be written there; before anything is computed.

    Raises:
        Conflict: it exists.
        BadRequest: there is no such folder, or Parquet is asked for and pyarrow is missing.
    """
    if target.is_dir():
        raise BadRequest(f"{target} is a folder. Name a file in it.")
    if target.exists() and not overwrite:
        raise Conflict(f"{target} is there already. Remove it, or name another.")
    if not target.absolute().parent.is_dir():
        raise BadRequest(f"There is no folder {target.absolute().parent}.")
    if target.suffix in (".parquet", ".pq"):
        pyarrow_module("pyarrow.parquet")


def save(
    client: BatchClient,
    batch: Batch,
    target: Path,
    status: str | None,
    table: Table | None,
    id_column: str | None,
    parse_json: bool,
) -> None:
    """Write a batch's results to a file, and say what is in it."""
    if target.suffix not in TABLE_SUFFIXES:
        num_bytes = client.download(batch, target, status=status)
        say(f"Results: {target} ({num_bytes:,} bytes)")
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "results.jsonl"
        client.download(batch, lines, status=status)

        def read() -> Iterator[Result]:
            with lines.open("rb") as file:
                yield from map(result_of, file)

        written = write_answers(
            target, read, table=table, id_column=id_column, parse_json=parse_json
        )
    failed = f", {written.num_failed:,} without an answer" if written.num_failed else ""
    unparsed = f", {written.num_unparsed:,} not a JSON object" if written.num_unparsed else ""
    if written.num_truncated:
        unparsed += f" ({truncated_text(written.num_truncated)})"
    say(f"Results: {target} ({written.num_rows:,} rows{failed}{unparsed})")
    if written.num_reasoning:
        say(_reasoning_warning(written.num_reasoning, batch.model))


def _reasoning_warning(num: int, model: str | None) -> str:
    count = "1 answer contains" if num == 1 else f"{num:,} answers contain"
    of = f" of {model}" if model else ""
    return (
        f"⚠️  {count} the model's reasoning (<think>…</think>) in the response column. To keep it "
        f'out, add reasoning_parser = "…" to the engine_args{of} in models.toml and run the batch '
        f"again. Which parser: vllm-batch models check {model or 'NAME'}"
    )
