"""`vllm-batch estimate` and `bench`: how long it will take, and measuring what that rests on."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.models import completed_names
from batch_app.cli.options import Json, Models
from batch_app.cli.terminal import say, show, show_json

if TYPE_CHECKING:
    from batch_app.dry_run import DryRun, ModelOutlook

app = typer.Typer()

SECTION = "Estimates"
BenchmarksFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of benchmark records.", show_default="./benchmarks/metadata"),
]
MAX_SHOWN = 10


@app.command(rich_help_panel=SECTION)
def estimate(
    source: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Only this one.",
            show_default="each of the registry",
            autocompletion=completed_names,
        ),
    ] = None,
    models: Models = None,
    benchmarks_dir: BenchmarksFolder = None,
    as_json: Json = False,
) -> None:
    """Say how long a file would take. Which lines would fail, too. Runs nothing."""
    from batch_app.benchmarks import BenchmarkFolder
    from batch_app.config import load_settings
    from batch_app.dry_run import DryRuns
    from batch_app.errors import BadRequest
    from batch_app.outlook import Outlook
    from batch_app.registry import ModelRegistry
    from batch_app.wire.estimates import dry_run_body

    settings = load_settings(models=models, benchmarks_dir=benchmarks_dir)
    if not source.is_file():
        raise BadRequest(f"There is no input file {source}.")
    registry = ModelRegistry.load(settings.models)
    outlook = Outlook(lambda: registry, BenchmarkFolder(settings.benchmarks_dir))
    with TemporaryDirectory() as folder:
        found = DryRuns(settings, registry, outlook).of(source, Path(folder), model)
    if as_json:
        show_json(dry_run_body(found).model_dump())
    else:
        _show_table(found)
    if found.num_errors:
        raise typer.Exit(ExitCode.BAD_INPUT)


@app.command(rich_help_panel=SECTION)
def bench(
    model: Annotated[
        str,
        typer.Argument(help="The registry's name of the model.", autocompletion=completed_names),
    ],
    num_requests: Annotated[
        int, typer.Option(help="Of each of the three shapes.", min=10, max=100_000)
    ] = 200,
    models: Models = None,
    benchmarks_dir: BenchmarksFolder = None,
    as_json: Json = False,
) -> None:
    """Measure a model on this machine. Estimates rest on it.

    With short, medium and long requests.
    """
    from batch_app.bench import measure
    from batch_app.config import load_settings
    from batch_app.registry import ModelRegistry

    settings = load_settings(models=models, benchmarks_dir=benchmarks_dir)
    entry = ModelRegistry.load(settings.models).get(model)
    records = measure(entry, settings, num_requests=num_requests, say=say)
    if as_json:
        show_json([record.model_dump(mode="json") for record in records])
        return
    for record in records:
        results = record.results
        show(
            f"{results.num_requests:,} requests, {results.mean_prompt_tokens or 0:,.0f} prompt and "
            f"{results.mean_completion_tokens or 0:,.0f} output tokens each: "
            f"{results.inference_time_s:,.1f} s, {results.throughput_requests_per_s:,.2f} "
            f"requests/s, {results.throughput_tokens_per_s:,.0f} tokens/s  ({record.test_id})"
        )


# -- the table -------------------------------------------------------------------------------------


def _show_table(found: DryRun) -> None:
    say(f"{found.num_requests:,} requests.")
    if found.num_errors:
        say(f"❌ {found.num_errors:,} errors; the file would be refused.")
    for error in found.errors[:MAX_SHOWN]:
        where = f"line {error.line}: " if error.line else ""
        say(f"   {where}{error.message}")
    columns = ("model", "time", "80% range", "prompt tokens", "output", "fail", "rests on")
    rows = [columns, *(_cells(row) for row in found.models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for one in found.models:
        if one.lines:
            shown = ", ".join(map(str, one.lines[:MAX_SHOWN]))
            more = " …" if len(one.lines) > MAX_SHOWN else ""
            say(f"{one.model}: would fail: lines {shown}{more}")
        if one.reason:
            say(f"{one.model}: prompt tokens are guessed from bytes: {one.reason}.")


def _cells(row: ModelOutlook) -> tuple[str, ...]:
    num_failing = f"{row.num_too_long + row.num_refused:,}"
    told = row.estimate
    if told is None:
        return (row.model, "-", "-", "-", "-", num_failing, "nothing measured yet")
    low, high = told.low_s or 0.0, told.high_s or 0.0
    about = "" if told.prompt_basis == "counted" else "~"
    return (
        row.model,
        span(told.duration_s),
        f"{span(low)} – {span(high)}",
        f"{about}{told.prompt_tokens or 0:,}",
        f"{told.expected_output_tokens or 0:,}",
        num_failing,
        f"{told.basis_kind}: {''.join(told.basis[:1])}" + (" …" if len(told.basis) > 1 else ""),
    )


def span(seconds: float) -> str:
    """`42 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
