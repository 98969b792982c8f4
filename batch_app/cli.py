"""The command line, `vllm-batch`. Flags win over the environment, that over vllm-batch.toml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from batch_app import __version__, key_commands
from batch_app.config import Settings, load_settings
from batch_app.errors import BatchAppError

app = typer.Typer(
    name="vllm-batch",
    help="Large batches of LLM requests on your own GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they show local variables: prompts, keys
    rich_markup_mode=None,
)
app.add_typer(key_commands.app, name="keys")

Host = Annotated[
    str | None, typer.Option(help="Address the API server listens on.", show_default="127.0.0.1")
]
Port = Annotated[
    int | None,
    typer.Option(
        help="Port of the API server; 0 picks one.", min=0, max=65535, show_default="8080"
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of uploads, results, logs and database.", show_default="./data"),
]
Models = Annotated[
    Path | None, typer.Option(help="The model registry.", show_default="./models.toml")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="SQLAlchemy URL of the database.", show_default="SQLite in the data folder"),
]
NoAuth = Annotated[
    bool,
    typer.Option(
        "--no-auth", help="Let others in without API keys. Only in a network of your own."
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"vllm-batch {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and end."
        ),
    ] = False,
) -> None:
    """Large batches of LLM requests on your own GPU."""


def _settings(**flags: object) -> Settings:
    try:
        return load_settings(**flags)
    except BatchAppError as error:
        raise _ended(error) from None


def _ended(error: BatchAppError) -> typer.Exit:
    print(f"❌ {error.message}", file=sys.stderr)
    return typer.Exit(1)


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
    no_auth: NoAuth = False,
) -> None:
    """Run the API server."""
    from batch_app import api_server

    settings = _settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=models,
        database_url=database_url,
        no_auth=no_auth or None,
    )
    raise typer.Exit(api_server.serve(settings))


@app.command()
def worker(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Run a worker, which loads models and answers batches."""
    from batch_app import worker as worker_process

    settings = _settings(
        host=host, port=port, data_dir=data_dir, models=models, database_url=database_url
    )
    raise typer.Exit(worker_process.main(settings))


@app.command()
def up(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
    no_auth: NoAuth = False,
) -> None:
    """Run API server and worker together. Ctrl-C lets both finish what they are at."""
    from batch_app.api_server import check_address
    from batch_app.supervisor import Supervisor

    # Looked at here already, so that a bad setting is said once, by this process.
    settings = _settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=models,
        database_url=database_url,
        no_auth=no_auth or None,
    )
    try:
        check_address(settings)
    except BatchAppError as error:
        raise _ended(error) from None
    given = {
        "--host": host,
        "--port": port,
        "--data-dir": data_dir,
        "--models": models,
        "--database-url": database_url,
    }
    flags = [
        text for flag, value in given.items() if value is not None for text in (flag, str(value))
    ]
    start = [sys.executable, "-m", "batch_app.cli"]
    commands = {
        "API server": [*start, "serve", *flags, *(["--no-auth"] if no_auth else [])],
        "worker": [*start, "worker", *flags],
    }
    raise typer.Exit(Supervisor(commands).run())


@app.command()
def run(
    source: Annotated[Path | None, typer.Argument(metavar="INPUT", show_default=False)] = None,
    output: Annotated[Path | None, typer.Argument(metavar="OUTPUT", show_default=False)] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input-file", "-i", help="INPUT, as vLLM's run-batch calls it.")
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output-file", "-o", help="OUTPUT, as vLLM's run-batch calls it."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="The registry's name of the model that answers.", show_default=False)
    ] = "",
    models: Models = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
) -> None:
    """Answer one file without a server. Run it again after a crash, and it goes on."""
    from batch_app import one_shot

    source, output = source or input_file, output or output_file
    if source is None or output is None or not model:
        raise typer.BadParameter("Name INPUT, OUTPUT and --model.")
    settings = _settings(models=models)
    try:
        code = one_shot.main(source, output, model=model, settings=settings, overwrite=overwrite)
    except BatchAppError as error:
        raise _ended(error) from None
    raise typer.Exit(code)


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Copy database and files to a folder, also while server and worker run."""
    from batch_app.backup import back_up
    from batch_app.files import DataDir

    settings = _settings(data_dir=data_dir, database_url=database_url)
    try:
        made = back_up(DataDir(settings.data_dir), settings.resolved_database_url, target)
    except BatchAppError as error:
        raise _ended(error) from None
    except OSError as error:
        raise _ended(BatchAppError(str(error))) from None
    print(f"✅ {made.num_files:,} files, {made.num_bytes:,} bytes in {target}")


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="Folder that `backup` made.")],
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Check a back-up and put it into an empty data folder. Unfinished batches go on from it."""
    from batch_app import backup as backups
    from batch_app.files import DataDir

    settings = _settings(data_dir=data_dir, database_url=database_url)
    try:
        data = DataDir(settings.data_dir)
        restored = backups.restore(source, data, settings.resolved_database_url)
    except BatchAppError as error:
        raise _ended(error) from None
    except OSError as error:
        raise _ended(BatchAppError(str(error))) from None
    print(f"✅ {restored.num_files:,} files, {restored.num_bytes:,} bytes in {settings.data_dir}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
