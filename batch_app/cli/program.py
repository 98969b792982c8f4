"""`vllm-batch`: all commands in one program, with one way to end."""

from __future__ import annotations

import gc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from batch_app import __version__
from batch_app.cli import (
    backups,
    batches,
    config,
    doctor,
    estimates,
    keys,
    models,
    remote,
    results,
    run,
    servers,
    submit,
    watch,
    webhooks,
)
from batch_app.cli.exit_codes import ExitCode, code_of
from batch_app.cli.problems import say_error
from batch_app.errors import BatchAppError


class Program(TyperGroup):
    """Shows the commands in sections, and tells an error in a line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        shown = {name: cmd for name, cmd in self.commands.items() if not cmd.hidden}
        width = formatter.width - 6 - max(len(name) for name in shown)
        for name, command in shown.items():
            section = getattr(command, "rich_help_panel", None)
            section = section if isinstance(section, str) else "Commands"
            sections.setdefault(section, []).append((name, command.get_short_help_str(width)))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BatchAppError as error:
            say_error(error)
            raise typer.Exit(code_of(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


app = typer.Typer(
    name="vllm-batch",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables: prompts, keys
    rich_markup_mode=None,
)


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


# In the order in which `--help` shows them. A module's commands become commands of the program;
# those of one that is added under a name, of that name.
app.add_typer(submit.app)
app.add_typer(batches.app)
app.add_typer(watch.app)
app.add_typer(results.app)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=remote.SECTION)
app.add_typer(run.app)
app.add_typer(estimates.app)
app.add_typer(servers.app)
app.add_typer(models.app, name="models", rich_help_panel=servers.SECTION)
app.add_typer(keys.app, name="keys", rich_help_panel=servers.SECTION)
app.add_typer(doctor.app)
app.add_typer(backups.app)
app.add_typer(config.app, name="config", rich_help_panel=servers.SECTION)


def main() -> None:
    try:
        app(prog_name="vllm-batch")
    finally:
        gc.freeze()  # the interpreter's end would look through all of it, for a quarter of a second
