"""`vllm-batch models …`: which models may run, whether they could here, and changes to that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.model_addition import RESTART, add, facts
from batch_app.cli.options import DataFolder, Json, Models
from batch_app.cli.remote import ApiKey, Server, connected
from batch_app.cli.terminal import say, show, show_findings, show_json, show_table
from batch_app.errors import Conflict

if TYPE_CHECKING:
    from batch_app.config import Settings
    from batch_app.doctor.models import ModelCheck
    from batch_app.registry import ModelEntry, ModelRegistry

app = typer.Typer(help="List, check, add and remove models.", no_args_is_help=True)

MAX_LOOKED_AT = 10_000


def completed_names(incomplete: str) -> list[str]:
    """The registry's names, for the shell's completion."""
    from batch_app.config import load_settings
    from batch_app.errors import BatchAppError
    from batch_app.registry import ModelRegistry

    try:
        registry = ModelRegistry.load(load_settings().models)
    except BatchAppError:
        return []
    return [entry.name for entry in registry.entries if entry.name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(help="Its name in the registry, or an alias.", autocompletion=completed_names),
]


@app.command("list")
def list_models(
    models: Models = None, as_json: Json = False, server: Server = None, api_key: ApiKey = None
) -> None:
    """List the models of the registry here; with --server, those of that server."""
    if server and models is None:
        _list_of_server(server, api_key, as_json)
        return
    settings, registry = _registry(models)
    if as_json:
        show_json([facts(entry) for entry in registry.entries])
    elif registry.entries:
        columns = ("model", "engine", "source", "here", "context", "aliases")
        show_table(columns, [_row(entry, settings.models) for entry in registry.entries])
    else:
        say(f"There are no models in {settings.models}.")
        say("Add one: vllm-batch models add HUB_ID_OR_FOLDER")


def _list_of_server(server: str, api_key: str | None, as_json: bool) -> None:
    with connected(server, api_key) as client:
        found = client.models()
    if as_json:
        show_json([model.raw for model in found])
        return
    rows = [
        (
            model.name,
            _count(model.max_model_len),
            _count(model.throughput_tokens_per_s),
            f"{model.throughput_requests_per_s:,.2f}" if model.throughput_requests_per_s else "-",
            str(model.raw.get("last_benchmark") or "never"),
        )
        for model in found
    ]
    show_table(("model", "context", "tokens/s", "requests/s", "measured"), rows)


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Names in the registry, or aliases.",
            show_default="all of them",
            autocompletion=completed_names,
        ),
    ] = None,
    models: Models = None,
    data_dir: DataFolder = None,
    as_json: Json = False,
) -> None:
    """Say whether models could run here: files, configuration, tokenizer, arguments, memory.

    Loads none: whether vLLM takes the arguments shows when it loads (`vllm-batch doctor --load
    NAME`). Exit code 11 where a model could not run.
    """
    from batch_app.doctor.finding import State, worst
    from batch_app.doctor.models import check_model
    from batch_app.files import DataDir
    from batch_app.machine import this_machine

    settings, registry = _registry(models, data_dir)
    chosen = dict.fromkeys(registry.get(name).name for name in names) if names else None
    entries = [e for e in registry.entries if chosen is None or e.name in chosen]
    lowered = DataDir(settings.data_dir).lowered_limits_file
    checks = []
    for number, entry in enumerate(entries):
        found = check_model(entry, this_machine(), lowered)
        checks.append(found)
        if not as_json:
            if number:
                show("")
            show(entry.name)
            show_findings(found.findings)
    if as_json:
        show_json([_check_body(found) for found in checks])
    states = [finding for found in checks for finding in found.findings]
    if worst(states) is State.FAIL:
        bad = [found.entry.name for found in checks if found.state is State.FAIL]
        say(f"❌ Can't run here: {', '.join(bad)}.")
        raise typer.Exit(ExitCode.UNWELL)


app.command()(add)


@app.command()
def remove(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Also where unfinished batches need it: they wait.")
    ] = False,
    models: Models = None,
    data_dir: DataFolder = None,
    as_json: Json = False,
) -> None:
    """Take a model out of the registry. Its files stay where they are."""
    from batch_app.registry_file import RegistryFile

    settings, registry = _registry(models, data_dir)
    entry = registry.get(name)
    if not force:
        num_batches = _num_waiting(settings, entry)
        if num_batches:
            raise Conflict(
                f"{num_batches:,} unfinished batches need {entry.name}: without it they wait. "
                "Wait for them or cancel them (vllm-batch list), or say --force.",
                code="model_in_use",
            )
    file = RegistryFile(settings.models)
    file.remove(name)
    say(f"✅ {entry.name} is no longer in {file.path}. {RESTART}")
    if Path(entry.source).is_dir():
        say(f"   Its files are still in {entry.source}.")
    if as_json:
        show_json(facts(entry))


def _num_waiting(settings: Settings, entry: ModelEntry) -> int:
    """Unfinished batches of this model; 0 where there is no database yet."""
    from batch_app.doctor.storage import has_database
    from batch_app.store import Store

    if not has_database(settings):
        return 0
    store = Store(settings.resolved_database_url)
    try:
        store.migrate()
        names = {entry.name, *entry.aliases}
        return sum(batch.model in names for batch in store.unfinished(MAX_LOOKED_AT))
    finally:
        store.close()


# -- what is shown ---------------------------------------------------------------------------------


def _registry(models: Path | None, data_dir: Path | None = None) -> tuple[Settings, ModelRegistry]:
    from batch_app.config import load_settings
    from batch_app.registry import ModelRegistry

    settings = load_settings(models=models, data_dir=data_dir)
    return settings, ModelRegistry.load(settings.models)


def _row(entry: ModelEntry, registry: Path) -> tuple[str, ...]:
    from batch_app.datasheets import local_folder

    folder = local_folder(entry)
    here = "-" if entry.engine == "sim" else "yes" if folder else "no"
    base = registry.resolve().parent
    source = Path(entry.source)
    shown = source.relative_to(base) if source.is_relative_to(base) else source
    return (
        entry.name,
        entry.engine,
        str(shown),
        here,
        _count(entry.max_model_len),
        ", ".join(entry.aliases) or "-",
    )


def _check_body(found: ModelCheck) -> dict[str, Any]:
    return {
        "model": found.entry.name,
        "status": found.state,
        "folder": str(found.folder) if found.folder else None,
        "engine_args": dict(found.engine_args),
        "findings": [
            {"check": one.subject, "status": one.state, "message": one.message, "fix": one.fix}
            for one in found.findings
        ],
    }


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
