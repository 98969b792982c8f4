"""`vllm-batch backup`, `restore` and `copy-database`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batch_app.cli.options import DatabaseUrl, DataFolder, Json
from batch_app.cli.servers import SECTION
from batch_app.cli.terminal import say, show_json
from batch_app.errors import BatchAppError

app = typer.Typer()


@app.command(rich_help_panel=SECTION)
def backup(
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Copy database and files to a folder. Also while server and worker run."""
    from batch_app.backup import back_up
    from batch_app.config import load_settings
    from batch_app.files import DataDir

    settings = load_settings(data_dir=data_dir, database_url=database_url)
    try:
        made = back_up(DataDir(settings.data_dir), settings.resolved_database_url, target)
    except OSError as error:
        raise BatchAppError(str(error)) from None
    _tell(made.num_files, made.num_bytes, target, as_json)
    if settings.storage_url and not as_json:
        say(f"What is only in {settings.storage_url} is not in it: see docs/object_storage.md.")


@app.command(rich_help_panel=SECTION)
def restore(
    source: Annotated[Path, typer.Argument(help="Folder that `backup` made.")],
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Check a back-up and put it into an empty data folder. Unfinished batches go on from it."""
    from batch_app import backup as backups
    from batch_app.config import load_settings
    from batch_app.files import DataDir

    settings = load_settings(data_dir=data_dir, database_url=database_url)
    try:
        data = DataDir(settings.data_dir)
        restored = backups.restore(source, data, settings.resolved_database_url)
    except OSError as error:
        raise BatchAppError(str(error)) from None
    _tell(restored.num_files, restored.num_bytes, settings.data_dir, as_json)


@app.command(rich_help_panel=SECTION)
def copy_database(
    target: Annotated[str, typer.Argument(help="URL of an empty database: postgresql://…")],
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Copy what the database has to another, such as PostgreSQL.

    Stop server and workers first; `database_url` then names the new one. Files stay in place.
    """
    from batch_app.config import load_settings
    from batch_app.database import shown
    from batch_app.store import copying

    settings = load_settings(data_dir=data_dir, database_url=database_url)
    num_rows = copying.copy_database(settings.resolved_database_url, target)
    if as_json:
        show_json({"database": shown(target), "num_rows": num_rows})
    else:
        say(f"✅ {num_rows:,} rows in {shown(target)}")


def _tell(num_files: int, num_bytes: int, place: Path, as_json: bool) -> None:
    if as_json:
        show_json({"folder": str(place), "num_files": num_files, "num_bytes": num_bytes})
    else:
        say(f"✅ {num_files:,} files, {num_bytes:,} bytes in {place}")
