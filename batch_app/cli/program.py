"""`vllm-batch`: all commands in one program, with one way to end."""

from __future__ import annotations

from collections.abc import Sequence
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
    results,
    run,
    servers,
    submit,
    watch,
)
from batch_app.cli.exit_codes import ExitCode, code_of
from batch_app.cli.figures import plural
from batch_app.cli.terminal import say
from batch_app.core import LineError
from batch_app.errors import BadLines, BatchAppError

MAX_LINES_SHOWN = 10


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


def say_error(error: BatchAppError) -> None:
    """Tell what went wrong, with the first of the bad lines where it was some."""
    if not isinstance(error, BadLines):
        say(f"❌ {error.message}")
        return
    message = error.message
    if error.errors and error.errors[0].message in message:  # it stands below
        message = f"The input can't run: {plural(error.num_errors, 'error')}. Nothing was queued."
    say(f"❌ {message}")
    say_lines(error.errors, error.num_errors)


def say_lines(errors: Sequence[LineError], num_errors: int) -> None:
    """The first of the bad lines; neighbours with the same error together."""
    together: list[list[LineError]] = []
    for bad in errors:
        before = together[-1][-1] if together else None
        is_next = before is not None and bad.line and before.line == bad.line - 1
        if before is not None and is_next and before.message == bad.message:
            together[-1].append(bad)
        else:
            together.append([bad])
    shown = together[:MAX_LINES_SHOWN]
    for group in shown:
        first, last = group[0], group[-1]
        where = f"line {first.line}: " if first.line else ""
        if last is not first:
            where = f"lines {first.line}–{last.line}: "
        say(f"   {where}{first.message}")
    rest = num_errors - sum(map(len, shown))
    if rest > 0:
        say(f"   … and {rest:,} more.")


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
app.add_typer(run.app)
app.add_typer(estimates.app)
app.add_typer(servers.app)
app.add_typer(models.app, name="models", rich_help_panel=servers.SECTION)
app.add_typer(keys.app, name="keys", rich_help_panel=servers.SECTION)
app.add_typer(doctor.app)
app.add_typer(backups.app)
app.add_typer(config.app, name="config", rich_help_panel=servers.SECTION)


def main() -> None:
    app(prog_name="vllm-batch")
