"""`vllm-batch submit` and `validate`: files on their way to a server."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.figures import plural, span
from batch_app.cli.inputs import (
    Body,
    Delimiter,
    EmptyCells,
    Files,
    Format,
    IdColumn,
    MaxTokens,
    System,
    Temperature,
    Template,
    named_files,
    opened,
    request_fields,
)
from batch_app.cli.models import completed_names
from batch_app.cli.options import Json, Models
from batch_app.cli.problems import say_error
from batch_app.cli.remote import SECTION, ApiKey, Server, connected, same_place
from batch_app.cli.results import TABLE_SUFFIXES, ParseJson, check_target, save
from batch_app.cli.terminal import say, show, show_json
from batch_app.cli.waiting import outcome, wait_for
from batch_app.client import Batch
from batch_app.client.tables import Empty, Prompt
from batch_app.errors import BadLines, BadRequest
from batch_app.origins import WEBHOOK_SECRET_VARIABLE

app = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The model that answers, by the registry's name or an alias.",
        show_default="each line's own body.model",
        autocompletion=completed_names,
    ),
]


@app.command(rich_help_panel=SECTION)
def submit(
    files: Files,
    model: Model = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it is done.")] = False,
    download: Annotated[
        Path | None,
        typer.Option(
            "--download",
            "--output",
            "-o",
            help="Wait, then write the results here: JSON lines, or .csv, .tsv or .parquet with "
            "one row a request, beside the table's own columns. A folder for several files.",
            show_default=False,
        ),
    ] = None,
    template: Template = None,
    system: System = None,
    id_column: IdColumn = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    body: Body = None,
    empty: EmptyCells = Empty.ERROR,
    kind: Format = None,
    delimiter: Delimiter = None,
    parse_json: ParseJson = False,
    no_deduplicate: Annotated[
        bool, typer.Option("--no-deduplicate", help="Compute each of several equal requests.")
    ] = False,
    priority: Annotated[
        int | None,
        typer.Option(
            help="Higher goes first. Only without --model.", min=-100, max=100, show_default="0"
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="Time after which it expires: 90m, 12h, 7d. Only without --model.",
            show_default="24h, or none with --model",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            help="Submitting the same again under the same key gets the same batch.",
            show_default=False,
        ),
    ] = None,
    webhook_url: Annotated[
        str | None,
        typer.Option(
            help="Told of the batch's end by a signed POST. Its secret is shown once.",
            show_default=False,
        ),
    ] = None,
    webhook_secret: Annotated[
        str | None,
        typer.Option(
            envvar=WEBHOOK_SECRET_VARIABLE,
            help="A secret of your own for it: whsec_ and 24 to 64 bytes in base64. Rather set the "
            "variable: others on the machine see what stands on a command line.",
            show_default="made by the server",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Send files to the server, each as a batch. Prints the batches' ids."""
    names = named_files(files)
    prompt = Prompt(
        template, system, id_column, empty, request_fields(max_tokens, temperature, body)
    )
    options: dict[str, Any] = {}
    if priority is not None:
        options["priority"] = priority
    if window is not None:
        options["completion_window"] = window
    if model is not None and options:
        raise typer.BadParameter(
            "--priority and --window are for files whose lines name the model."
        )
    if len(names) > 1 and idempotency_key is not None:
        raise typer.BadParameter("--idempotency-key is for one file.")
    if webhook_url is not None:
        options["webhook_url"] = webhook_url
        if webhook_secret is not None:
            options["webhook_secret"] = webhook_secret
    targets = _targets(names, download)
    code = ExitCode.OK
    with connected(server, api_key) as client:
        for name, target in zip(names, targets, strict=True):
            with opened(name, kind, delimiter, prompt) as (source, table):
                if table is not None and model is None:
                    raise BadRequest("Name the model that is to answer: --model.", param="--model")
                batch = client.submit(
                    source,
                    model,
                    deduplicate=not no_deduplicate,
                    idempotency_key=idempotency_key,
                    **options,
                )
                _tell(
                    batch, source.name, waits=wait or target is not None, place=same_place(server)
                )
                webhook = batch.raw.get("webhook")
                if webhook and webhook_secret is None:
                    say(f"Its webhook's secret, shown this once: {webhook['secret']}")
                if not as_json:
                    show(batch.id)
                if wait or target is not None:
                    again = f"vllm-batch wait {batch.id}{same_place(server)}"
                    batch = wait_for(client, batch, timeout_s=None, quiet=quiet, again=again)
                    code = max(code, outcome(batch))
                    if target is not None and batch.has_results:
                        save(client, batch, target, None, table, id_column, parse_json)
                if as_json:
                    show_json(batch.raw)
    raise typer.Exit(code)


def _tell(batch: Batch, name: str, *, waits: bool, place: str) -> None:
    estimate = f" About {span(batch.estimate)}." if batch.estimate else ""
    model = f", model {batch.model}" if batch.model else ""
    then = "" if waits else f" Watch it: vllm-batch watch {batch.id}{place}"
    say(f"Submitted {name}: {batch.progress.total:,} requests{model}.{estimate}{then}")


def _targets(names: list[str], download: Path | None) -> list[Path | None]:
    """Where each file's results go. Checked before anything is sent."""
    if download is None:
        return [None] * len(names)
    if len(names) == 1 and not download.is_dir():
        check_target(download)
        return [download]
    if len(names) > 1 and download.suffix in (*TABLE_SUFFIXES, ".jsonl"):
        raise BadRequest(f"There are {len(names)} files: --download must name a folder.")
    download.mkdir(parents=True, exist_ok=True)
    targets = [download / f"{Path(name).name.split('.')[0]}_results.jsonl" for name in names]
    if len(set(targets)) < len(targets):
        raise BadRequest("Some files have the same name: submit them one by one.")
    for target in targets:
        check_target(target)
    return list(targets)


@app.command(rich_help_panel=SECTION)
def validate(
    files: Files,
    model: Model = None,
    template: Template = None,
    system: System = None,
    id_column: IdColumn = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    body: Body = None,
    empty: EmptyCells = Empty.ERROR,
    kind: Format = None,
    delimiter: Delimiter = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Check files as the server would. Nothing is sent, and no server is asked."""
    prompt = Prompt(
        template, system, id_column, empty, request_fields(max_tokens, temperature, body)
    )
    code = ExitCode.OK
    for name in named_files(files):
        try:
            with opened(name, kind, delimiter, prompt) as (source, table):
                found = _checked(source.blocks(), source.name, model, models, table is not None)
        except BadLines as refusal:
            code = ExitCode.BAD_INPUT
            if as_json:
                errors = [
                    {"line": e.line, "code": e.code, "param": e.param, "message": e.message}
                    for e in refusal.errors
                ]
                show_json(
                    {
                        "file": name,
                        "valid": False,
                        "num_errors": refusal.num_errors,
                        "errors": errors,
                    }
                )
            else:
                say_error(refusal)
            continue
        if as_json:
            show_json({"file": name, "valid": True, **found})
        else:
            where = ", ".join(found["models"]) or "unknown"
            show(f"{name}: {found['num_requests']:,} good requests, model {where}")
    raise typer.Exit(code)


def _checked(
    blocks: Any, name: str, model: str | None, models: Path | None, is_table: bool
) -> dict[str, Any]:
    from batch_app.config import load_settings
    from batch_app.intake import IntakeRules, index_file
    from batch_app.registry import AnyModel, ModelRegistry
    from batch_app.shapes import BodyLimits

    settings = load_settings(models=models)
    registry: ModelRegistry
    if settings.models.exists():
        registry = ModelRegistry.load(settings.models)
        model = registry.get(model).name if model is not None else None
    else:
        say(f"There is no {settings.models} here: the models' names aren't checked.")
        registry = AnyModel()
    if is_table and model is None:
        model = "any"
        registry = AnyModel()
    rules = IntakeRules(
        registry,
        model=model,
        max_line_bytes=settings.max_line_bytes,
        max_requests=settings.max_requests_per_batch,
        max_errors=settings.max_line_errors,
        limits=BodyLimits.of(settings),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        with path.open("wb") as copy:
            copy.writelines(blocks)
        try:
            summary = index_file(path, Path(folder), rules)
        except BadLines as refusal:
            message = f"{name}: {plural(refusal.num_errors, 'error')}."
            raise BadLines(message, refusal.errors, refusal.num_errors) from None
    return {
        "num_requests": summary.num_requests,
        "models": [one for one in summary.models if one != "any"],
        "endpoints": list(summary.endpoints),
    }
