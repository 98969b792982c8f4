"""`vllm-batch serve`, `worker` and `up`: the processes of a site."""

from __future__ import annotations

import sys

import typer

from batch_app.cli.options import (
    DatabaseUrl,
    DataFolder,
    Host,
    LogFormat,
    LogJson,
    Models,
    NoAuth,
    Port,
)
from batch_app.cli.remote import address_of
from batch_app.cli.terminal import say

#: Under which `--help` lists what runs or keeps a site.
SECTION = "On the server's machine"

app = typer.Typer()


@app.command(rich_help_panel=SECTION)
def serve(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
    no_auth: NoAuth = False,
    log_format: LogFormat = None,
    as_json: LogJson = False,
) -> None:
    """Run the API server."""
    from batch_app import api_server
    from batch_app.config import load_settings

    settings = load_settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=models,
        database_url=database_url,
        no_auth=no_auth or None,
        log_format=_log_format(log_format, as_json),
    )
    raise typer.Exit(api_server.serve(settings))


@app.command(rich_help_panel=SECTION)
def worker(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
    log_format: LogFormat = None,
    as_json: LogJson = False,
) -> None:
    """Run a worker, which loads models and answers batches."""
    from batch_app import worker as worker_process
    from batch_app.config import load_settings

    settings = load_settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=models,
        database_url=database_url,
        log_format=_log_format(log_format, as_json),
    )
    raise typer.Exit(worker_process.main(settings))


@app.command(rich_help_panel=SECTION)
def up(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
    no_auth: NoAuth = False,
    log_format: LogFormat = None,
    as_json: LogJson = False,
) -> None:
    """Run API server and worker together. Ctrl-C lets both finish what they are at."""
    from batch_app import logs
    from batch_app.api_server import check_address
    from batch_app.config import load_settings
    from batch_app.supervisor import Supervisor

    # Looked at here already, so that a bad setting is said once, by this process.
    settings = load_settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=models,
        database_url=database_url,
        no_auth=no_auth or None,
        log_format=_log_format(log_format, as_json),
    )
    check_address(settings)
    if settings.log_format == "text":
        place = f": {address_of(settings)}/" if settings.port else ""
        say(f"Starting the API server and the worker{place} (Ctrl-C ends both)")
    given = {
        "--host": host,
        "--port": port,
        "--data-dir": data_dir,
        "--models": models,
        "--database-url": database_url,
        "--log-format": _log_format(log_format, as_json),
    }
    flags = [
        text for flag, value in given.items() if value is not None for text in (flag, str(value))
    ]
    start = [sys.executable, "-m", "batch_app.cli"]
    commands = {
        "API server": [*start, "serve", *flags, *(["--no-auth"] if no_auth else [])],
        "worker": [*start, "worker", *flags],
    }
    if settings.log_format == "json":
        logs.set_up(settings.log_format)
        raise typer.Exit(Supervisor(commands, say=logs.say).run())
    raise typer.Exit(Supervisor(commands).run())


def _log_format(said: str | None, as_json: bool) -> str | None:
    if as_json and said == "text":
        raise typer.BadParameter("--json and --log-format text contradict each other.")
    return "json" if as_json else said
