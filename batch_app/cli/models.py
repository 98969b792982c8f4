"""`vllm-batch models …`: which models may run, whether they could here, and changes to that."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.options import DataFolder, Json, Models
from batch_app.cli.remote import ApiKey, Server, connected
from batch_app.cli.terminal import say, show, show_findings, show_json, show_table
from batch_app.errors import BadRequest, Conflict

if TYPE_CHECKING:
    from batch_app.config import Settings
    from batch_app.doctor.models import ModelCheck
    from batch_app.registry import ModelEntry, ModelRegistry

app = typer.Typer(help="List, check, add and remove models.", no_args_is_help=True)

MAX_LOOKED_AT = 10_000
RESTART = "Start the API server again, so that it knows. (The worker looks by itself.)"


class Engine(StrEnum):
    VLLM = "vllm"
    RAY = "ray"
    SIM = "sim"


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
        show_json([_facts(entry) for entry in registry.entries])
    elif registry.entries:
        columns = ("model", "engine", "source", "here", "context", "aliases")
        show_table(columns, [_row(entry, settings.models) for entry in registry.entries])
    else:
        say(f"There are no models in {settings.models}. Add one: vllm-batch models add NAME")


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


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What requests will call it.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="Its id on the model hub, as ORGANISATION/NAME.", show_default="NAME"
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option("--path", help="The folder of its files, instead.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit on the hub.", show_default="the hub's default branch"
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="Another name; may be repeated.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-arg",
            "-e",
            metavar="NAME=VALUE",
            help="An argument by vLLM's own name, as max_model_len=8192; may be repeated.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the Python code that comes with the model."),
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            help="ray: replicas on a Ray cluster, as -e 'ray={\"max_replicas\": 8}' says; "
            "sim: the simulated engine, which runs no model."
        ),
    ] = Engine.VLLM,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Add a model to the registry. The rest of the file stays as it is."""
    from batch_app.config import load_settings
    from batch_app.registry import ModelEntry
    from batch_app.registry_file import RegistryFile, engine_argument

    file = RegistryFile(load_settings(models=models).models)
    if path is not None and source is not None:
        raise typer.BadParameter("Give --source or --path, not both.")
    entry: dict[str, Any] = {"name": name, "source": source or name}
    if path is not None:
        entry["source"] = _folder(path, file.path.parent)
    elif engine is Engine.SIM:
        entry["source"] = "sim"
    if revision is not None:
        entry["revision"] = revision
    if alias:
        entry["aliases"] = alias
    if engine is not Engine.VLLM:
        entry["engine"] = engine.value
    if trust_remote_code:
        entry["trust_remote_code"] = True
    if engine_arg:
        entry["engine_args"] = dict(engine_argument(text) for text in engine_arg)
    file.add(entry)
    say(f"✅ {name} is in {file.path}. {RESTART}")
    say(f"   Could it run here? vllm-batch models check {name}")
    if as_json:
        show_json(_facts(ModelEntry.model_validate(entry)))


def _folder(path: Path, base: Path) -> str:
    """As the registry names it: relative to its own folder where it lies beneath."""
    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise BadRequest(f"There is no folder {path}.", param="--path")
    if not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise BadRequest(f"{path} holds no model: it has no config.json.", param="--path")
    return str(folder.relative_to(base)) if folder.is_relative_to(base) else str(folder)


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
        show_json(_facts(entry))


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


def _facts(entry: ModelEntry) -> dict[str, Any]:
    from batch_app.datasheets import local_folder

    folder = None if entry.engine == "sim" else local_folder(entry)
    return {**entry.model_dump(mode="json"), "folder": str(folder) if folder else None}


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
