"""`vllm-batch run`: one file, no server. The drop-in for `vllm run-batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batch_app.cli.options import Models

app = typer.Typer()


@app.command(rich_help_panel="One file, no server")
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
    from batch_app.config import load_settings

    source, output = source or input_file, output or output_file
    if source is None or output is None or not model:
        raise typer.BadParameter("Name INPUT, OUTPUT and --model.")
    settings = load_settings(models=models)
    raise typer.Exit(
        one_shot.main(source, output, model=model, settings=settings, overwrite=overwrite)
    )
