"""`vllm-batch keys …`: make, list and revoke API keys. Works beside a running server.

Data goes to stdout, what is said about it to stderr: `KEY=$(vllm-batch keys create ana)` works.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_app.cli.options import DatabaseUrl, DataFolder, Json
from batch_app.cli.terminal import say, show, show_json
from batch_app.core import utc_now
from batch_app.errors import BadRequest, BatchAppError, NotFound
from batch_app.keys import ApiKey, Scope, is_key_id, new_key

if TYPE_CHECKING:
    from batch_app.access import KeyChanges
    from batch_app.audit import AuditLog
    from batch_app.store import Store

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

MAX_NAME_CHARS = 100
_LIFE = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


@dataclass(frozen=True)
class _Keys:
    """The store, and what has to be told of each change."""

    store: Store
    changes: KeyChanges
    audit: AuditLog

    def changed(self, action: str, key: ApiKey) -> None:
        from batch_app.audit import Deed

        self.changes.note()
        who = f"command line (uid {os.getuid()})"
        self.audit.write(Deed(action, key.id, 200, client=who))


@contextmanager
def _opened(
    data_dir: Path | None, database_url: str | None, *, makes: bool = False
) -> Iterator[_Keys]:
    """`makes`: data folder and database, where there are none.

    Raises BatchAppError where the store can't be had; NotFound where it doesn't exist.
    """
    from batch_app.access import KeyChanges
    from batch_app.audit import AuditLog
    from batch_app.config import load_settings
    from batch_app.files import DataDir
    from batch_app.store import Store

    try:
        settings = load_settings(data_dir=data_dir, database_url=database_url)
        file = settings.sqlite_file
        if not makes and not settings.database_url and not file.exists():
            raise NotFound(
                f"There is no database {file}, and so no key. Run this from the server's folder, "
                "or name its data folder: --data-dir."
            )
        data = DataDir(settings.data_dir)
        data.create()
        store = Store(settings.resolved_database_url)
        try:
            store.migrate()
            audit = AuditLog(data.audit_file, settings.audit_max_bytes)
            yield _Keys(store, KeyChanges(data.key_changes_file), audit)
        finally:
            store.close()
    except OSError as error:
        raise BatchAppError(f"The data folder can't be used: {error}") from None


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what it is for.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            help="What it may do; may be given several times. `read`: see what is its own. "
            "`write`: make, cancel and delete it. `admin`: the same with everybody's.",
            show_default="read and write",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 30m, 12h, 90d.", show_default="never")
    ] = None,
    replaces: Annotated[
        str | None,
        typer.Option(help="Id of a key whose files and batches it sees too. Doesn't revoke that."),
    ] = None,
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once."""
    with _opened(data_dir, database_url, makes=True) as keys:
        now = utc_now()
        owner = keys.store.get_key(_checked_id(replaces)).owner if replaces else None
        first = not keys.store.has_keys()
        try:
            key, token = new_key(
                _checked_name(name),
                scope or (Scope.READ, Scope.WRITE),
                now,
                owner=owner,
                expires_at=_end(now, expires),
            )
        except ValueError as error:
            raise BadRequest(f"{error} Add --scope read or --scope write.") from None
        keys.store.add_key(key)
        keys.changed("create_key", key)
    say(
        f"Key {key.id} for {key.name!r} ({', '.join(sorted(key.scopes))}). Keep it: it is shown "
        "this once."
    )
    if first:
        say(
            "It is the first one. From now on the server asks everybody for a key; what was made "
            "before belongs to nobody and is seen by keys with the scope admin."
        )
    if as_json:
        show_json({**_facts(key), "key": token})
    else:
        show(token)


@app.command("list")
def list_keys(
    data_dir: DataFolder = None, database_url: DatabaseUrl = None, as_json: Json = False
) -> None:
    """List all keys that were ever made, without their secrets."""
    with _opened(data_dir, database_url) as keys:
        found = [_facts(key) for key in keys.store.list_keys()]
    if as_json:
        show_json(found)
        return
    if not found:
        say("There are no keys. Make one: vllm-batch keys create NAME")
        return
    columns = ("id", "state", "scopes", "expires_at", "last_used_at", "owner", "name")
    rows = [columns, *(tuple(_cell(facts[column]) for column in columns) for facts in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id, as `keys list` shows it.")],
    data_dir: DataFolder = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """End a key for good, at once. What it made stays."""
    with _opened(data_dir, database_url) as keys:
        key = keys.store.revoke_key(_checked_id(key_id), utc_now())
        keys.changed("revoke_key", key)
    say(f"Key {key.id} ({key.name!r}) is revoked.")
    if as_json:
        show_json(_facts(key))


def _facts(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "owner": key.owner,
        "scopes": sorted(key.scopes),
        "state": key.refusal(utc_now()) or "active",
        "created_at": _time(key.created_at),
        "expires_at": _time(key.expires_at),
        "last_used_at": _time(key.last_used_at),
        "revoked_at": _time(key.revoked_at),
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return "-" if value is None else str(value)


def _checked_id(text: str) -> str:
    if not is_key_id(text):
        raise NotFound(f"{text[:64]!r} is no key's id: vllm-batch keys list shows them.")
    return text


def _checked_name(name: str) -> str:
    name = name.strip()
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise BadRequest(f"A name has 1 to {MAX_NAME_CHARS} characters that can be printed.")
    return name


def _end(now: datetime, life: str | None) -> datetime | None:
    if life is None:
        return None
    match = _LIFE.fullmatch(life)
    if match is None:
        raise BadRequest(f"{life[:64]!r} is no span of time. Say 30m, 12h or 90d.")
    try:
        return now + timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError:
        raise BadRequest(f"{life} is too long. Without --expires a key has no end.") from None
