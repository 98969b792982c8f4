"""`vllm-batch estimate` and `bench`: how long it will take, and measuring what that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.models import completed_names
from batch_app.cli.options import Json, Models
from batch_app.cli.problems import say_lines
from batch_app.cli.remote import ApiKey, Server, connected
from batch_app.cli.terminal import say, show, show_json, show_table
from batch_app.client.source import Source
from batch_app.core import LineError

app = typer.Typer()

SECTION = "Estimates"
BenchmarksFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of benchmark records.", show_default="./benchmarks/metadata"),
]
MAX_SHOWN = 10


@app.command(rich_help_panel=SECTION)
def estimate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Requests as JSON lines, also packed (.gz, .zst); - is standard input.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Only this one.",
            show_default="each of the registry",
            autocompletion=completed_names,
        ),
    ] = None,
    models: Models = None,
    benchmarks_dir: BenchmarksFolder = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Say how long a file would take. Which lines would fail, too. Runs nothing.

    By the models and measurements of this machine; with --server, of that server, where the time
    that other batches take before it counts, too.
    """
    if server and models is None and benchmarks_dir is None:
        with connected(server, api_key) as client:
            told = client.estimate(source, model)
    else:
        told = _told_here(source, model, models, benchmarks_dir)
    if as_json:
        show_json(told)
    else:
        _show_table(told)
    if told["num_errors"]:
        raise typer.Exit(ExitCode.BAD_INPUT)


def _told_here(
    name: str, model: str | None, models: Path | None, benchmarks_dir: Path | None
) -> dict[str, Any]:
    """The same as `POST /v1/estimate` answers."""
    from batch_app.benchmarks import BenchmarkFolder
    from batch_app.config import load_settings
    from batch_app.dry_run import DryRuns
    from batch_app.outlook import Outlook
    from batch_app.registry import ModelRegistry
    from batch_app.wire.estimates import dry_run_body

    settings = load_settings(models=models, benchmarks_dir=benchmarks_dir)
    registry = ModelRegistry.load(settings.models)
    outlook = Outlook(lambda: registry, BenchmarkFolder(settings.benchmarks_dir))
    with Source.of(name) as source, source.on_disk() as path, TemporaryDirectory() as folder:
        found = DryRuns(settings, lambda: registry, outlook).of(path, Path(folder), model)
    return dry_run_body(found).model_dump()


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


def _show_table(told: Mapping[str, Any]) -> None:
    """`told`: as `POST /v1/estimate` answers."""
    say(f"{told['num_requests']:,} requests.")
    if told["num_errors"]:
        say(f"❌ {told['num_errors']:,} errors; the file would be refused.")
        errors = [LineError(e["code"], e["message"], e["line"], e["param"]) for e in told["errors"]]
        say_lines(errors, told["num_errors"])
    columns = ("model", "time", "80% range", "prompt tokens", "output", "fail", "rests on")
    show_table(columns, [_cells(row) for row in told["models"]])
    for one in told["models"]:
        if one["lines"]:
            shown = ", ".join(map(str, one["lines"][:MAX_SHOWN]))
            more = " …" if len(one["lines"]) > MAX_SHOWN else ""
            say(f"{one['model']}: would fail: lines {shown}{more}")
        if one["reason"]:
            say(f"{one['model']}: prompt tokens are guessed from bytes: {one['reason']}.")
        wait_s = (one["estimate"] or {}).get("queue_wait_s")
        if wait_s:
            say(f"{one['model']}: {span(wait_s)} for what runs before it come on top.")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    num_failing = f"{row['num_too_long'] + row['num_refused']:,}"
    told = row["estimate"]
    if told is None:
        return (row["model"], "-", "-", "-", "-", num_failing, "nothing measured yet")
    low, high = told["low_s"] or 0.0, told["high_s"] or 0.0
    about = "" if told["prompt_basis"] == "counted" else "~"
    basis = told["basis"]
    return (
        row["model"],
        span(told["estimated_seconds"]),
        f"{span(low)} – {span(high)}",
        f"{about}{told['prompt_tokens'] or 0:,}",
        f"{told['expected_output_tokens'] or 0:,}",
        num_failing,
        f"{told['basis_kind']}: {''.join(basis[:1])}" + (" …" if len(basis) > 1 else ""),
    )


def span(seconds: float) -> str:
    """`42 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
