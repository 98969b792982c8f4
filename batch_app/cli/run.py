"""`vllm-batch run`: one file, no server. The drop-in for `vllm run-batch`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from batch_app.cli.models import completed_names
from batch_app.cli.options import Json, Models
from batch_app.cli.terminal import say, show_json
from batch_app.core import Batch
from batch_app.errors import BadRequest

app = typer.Typer()
_FLAGS = "vllm-flags"


class RunBatchCommand(TyperCommand):
    """A command that takes vLLM's flags beside its own options."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        from batch_app.cli.run_flags import take_flags

        try:
            rest, ctx.meta[_FLAGS] = take_flags(args, dict(self._own_options(ctx)))
        except BadRequest as error:
            raise typer.BadParameter(error.message, ctx=ctx) from None
        return super().parse_args(ctx, rest)

    def _own_options(self, ctx: Any) -> Iterator[tuple[str, bool]]:
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "option":
                for name in (*parameter.opts, *parameter.secondary_opts):
                    yield name, not getattr(parameter, "is_flag", False)


@app.command(cls=RunBatchCommand, rich_help_panel="One file, no server")
def run(
    ctx: typer.Context,
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
        str,
        typer.Option(
            help="The model that answers: a name of the registry, a folder, or a hub's owner/name.",
            show_default=False,
            autocompletion=completed_names,
        ),
    ] = "",
    models: Models = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer one file without a server. Run it again after a crash, and it goes on.

    Takes the flags of vLLM's run-batch, too, such as --max-model-len 4096: see docs/run.md.
    """
    from batch_app import one_shot
    from batch_app.config import load_settings
    from batch_app.one_shot_model import one_shot_entry

    source, output = source or input_file, output or output_file
    if source is None or output is None or not model:
        raise typer.BadParameter("Name INPUT, OUTPUT and --model.")
    for path in (source, output):
        if str(path).startswith(("http:/", "https:/")):
            raise typer.BadParameter(
                "INPUT and OUTPUT are files here. Fetch the one with `curl -o FILE URL` before, or "
                "send the other with `curl -T FILE URL` after."
            )
    flags = ctx.meta[_FLAGS]
    settings = load_settings(models=models)
    entry = one_shot_entry(
        model,
        settings,
        engine_args=flags.engine_args,
        served_names=flags.served_names,
        revision=flags.revision,
        trust_remote_code=flags.trust_remote_code,
    )
    for note in flags.notes:
        say(note)

    def on_end(batch: Batch) -> None:
        if as_json:
            progress = batch.progress
            counts = {
                "completed": progress.completed,
                "failed": progress.failed,
                "truncated": progress.truncated,
            }
            facts = {"output": str(output), "status": batch.status.value, "total": batch.total}
            show_json(facts | counts | {"error": batch.error_message})

    raise typer.Exit(
        one_shot.main(
            source, output, entry=entry, settings=settings, overwrite=overwrite, on_end=on_end
        )
    )
