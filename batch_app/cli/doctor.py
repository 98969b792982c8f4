"""`vllm-batch doctor`: what is wrong here, and the fix."""

from __future__ import annotations

from typing import Annotated

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.models import completed_names
from batch_app.cli.options import DataFolder, Json, Models
from batch_app.cli.servers import SECTION
from batch_app.cli.terminal import say, show_findings, show_json

#: Of the column of what is looked at: the findings come one by one.
SUBJECT_WIDTH = 14

app = typer.Typer()


@app.command(rich_help_panel=SECTION)
def doctor(
    load: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also load this model for real, as the worker would, and ask it something. "
            "Takes a while, and the whole device.",
            show_default=False,
            autocompletion=completed_names,
        ),
    ] = None,
    models: Models = None,
    data_dir: DataFolder = None,
    as_json: Json = False,
) -> None:
    """Look for what is wrong here, and say the fix.

    Looks at engine, device, disk, database, server, worker and models.

    Changes nothing. Exit code 11 where something would keep batches from running; warnings don't
    count.
    """
    from batch_app.doctor.examination import examine
    from batch_app.doctor.finding import State, worst

    findings = []
    for finding in examine(data_dir=data_dir, models=models, load=load, say=say):
        findings.append(finding)
        if not as_json:
            show_findings([finding], width=SUBJECT_WIDTH)
    state = worst(findings)
    if as_json:
        rows = [
            {"check": one.subject, "status": one.state, "message": one.message, "fix": one.fix}
            for one in findings
        ]
        show_json({"status": state, "findings": rows})
    num = {kind: sum(one.state is kind for one in findings) for kind in State}
    say(
        "✅ All is well."
        if state is State.OK
        else f"{'❌' if state is State.FAIL else '⚠️ '} {num[State.FAIL]} wrong, "
        f"{num[State.WARN]} to look at, {num[State.OK]} well."
    )
    if state is State.FAIL:
        raise typer.Exit(ExitCode.UNWELL)
