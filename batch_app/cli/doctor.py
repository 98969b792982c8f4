"""`vllm-batch doctor`: what is wrong here, and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.models import completed_names
from batch_app.cli.options import DataFolder, Json, Models
from batch_app.cli.servers import SECTION
from batch_app.cli.terminal import say, show, show_findings, show_json

if TYPE_CHECKING:
    from batch_app.self_check.report import Report

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
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            help="Also run the engine: use the device as the worker does, load the model demo (or "
            "that of --load), and check its answers. About a minute, and the whole device. Attach "
            "the output to a bug report.",
        ),
    ] = False,
    models: Models = None,
    data_dir: DataFolder = None,
    as_json: Json = False,
) -> None:
    """Look for what is wrong here, and say the fix.

    Looks at engine, device, disk, database, server, worker and models.

    Changes nothing. Exit code 11 where something would keep batches from running, or a step of
    --run fails; warnings don't count.
    """
    from batch_app.doctor.examination import examine
    from batch_app.doctor.finding import State, worst

    findings = []
    for finding in examine(data_dir=data_dir, models=models, load=load, say=say):
        findings.append(finding)
        if not as_json:
            show_findings([finding], width=SUBJECT_WIDTH)
    state = worst(findings)
    report = _run(load, models, data_dir, quiet=as_json) if run else None
    if as_json:
        rows = [
            {"check": one.subject, "status": one.state, "message": one.message, "fix": one.fix}
            for one in findings
        ]
        failed = report is not None and report.has_failed
        answer: dict[str, object] = {
            "status": State.FAIL if failed else state,
            "findings": rows,
        }
        show_json(answer if report is None else {**answer, "run": report.as_dict()})
    num = {kind: sum(one.state is kind for one in findings) for kind in State}
    say(
        "✅ All is well."
        if state is State.OK
        else f"{'❌' if state is State.FAIL else '⚠️ '} {num[State.FAIL]} wrong, "
        f"{num[State.WARN]} to look at, {num[State.OK]} well."
    )
    if report is not None:
        say(f"Run: {report.summary}.")
    if state is State.FAIL or (report is not None and report.has_failed):
        raise typer.Exit(ExitCode.UNWELL)


def _run(load: str | None, models: Path | None, data_dir: Path | None, *, quiet: bool) -> Report:
    """Run the short steps of the self-check; a line for each on standard output, unless `quiet`."""
    from batch_app.config import load_settings
    from batch_app.errors import ConfigError
    from batch_app.machine import this_machine
    from batch_app.self_check import short
    from batch_app.self_check.report import Report
    from batch_app.self_check.runner import run_steps

    machine = this_machine()
    try:
        spec = short.registered(load, load_settings(data_dir=data_dir, models=models))
    except ConfigError:
        spec = None
    report = Report({"device": machine.device, "model": spec.name if spec else None})
    options = short.options_for(spec, on_gpu=machine.device_type == "gpu")
    with short.step_folder() as folder:
        for result in run_steps(
            short.short_steps(),
            options,
            budget_s=short.BUDGET_S,
            folder=folder,
            on_start=lambda step: say(f"{step.about} …"),
        ):
            report.add(result)
            if not quiet:
                show(result.line)
                for line in result.log_tail:
                    show(f"    {line}")
    report.finish()
    return report
