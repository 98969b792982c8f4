"""`vllm-batch config show`: which settings hold here, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.options import Json
from batch_app.cli.terminal import say, show_json, show_table
from batch_app.origins import Origin, Origins

app = typer.Typer(help="Show the settings.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Show the settings."""


@app.command()
def show(
    changed: Annotated[
        bool, typer.Option("--changed", help="Only those that aren't as they are by default.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show every setting, its value here, and where that comes from. Secrets are masked."""
    from batch_app.origins import origins

    found = origins()
    settings = [one for one in found.settings if not changed or one.source != "default"]
    if as_json:
        show_json(_body(found, settings))
    else:
        rows = [(one.name, _cell(one.value), one.source) for one in (*settings, *found.others)]
        if rows:
            show_table(("setting", "value", "from"), rows)
        state = "" if found.has_config_file else ", which isn't there"
        say(
            f"Settings file: {found.config_file}{state}. Paths start in {Path.cwd()}. "
            "What each setting means: docs/settings.md."
        )
    for name, meant in found.unknown.items():
        hint = f" Did you mean {meant}?" if meant else ""
        say(f"⚠️  {name} is set, but there is no such setting: it has no effect.{hint}")
    if found.problem:
        say(f"❌ {found.problem}")
        raise typer.Exit(ExitCode.FAILED)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    if value is None or value == "":
        return "(empty)"
    return str(value)


def _body(found: Origins, settings: list[Origin]) -> dict[str, Any]:
    return {
        "valid": found.problem is None,
        "problem": found.problem,
        "config_file": str(found.config_file) if found.has_config_file else None,
        "settings": [_row(one) for one in settings],
        "variables": [_row(one) for one in found.others],
        "unknown_variables": list(found.unknown),
    }


def _row(one: Origin) -> dict[str, Any]:
    return {
        "name": one.name,
        "value": one.value,
        "source": one.source,
        "default": one.default,
        "description": one.description,
    }
