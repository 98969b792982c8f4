"""Run workloads: every contender in turn, on one file, as often as asked for.

python -m benchmarks.peer --workload unique --runs 5 --json unique.json
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from batch_app.config import Settings
from benchmarks import around_the_engine
from benchmarks.peer import contenders, models, resume
from benchmarks.peer.answers import WrongAnswers
from benchmarks.peer.comparison import Comparison
from benchmarks.peer.contenders import ABOUT, CONTENDERS, Job, Run, Skipped
from benchmarks.peer.infinite_cache import infinite_hit_share, tokenized
from benchmarks.peer.machine import Machine, commit, this_machine, versions
from benchmarks.peer.observe import RunFailed
from benchmarks.peer.plot import NoMatplotlib, plot
from benchmarks.peer.report import MOST_MB, print_report, write_report
from benchmarks.peer.workloads import HIT_OF_INFINITE, WORKLOADS, DataMissing, Limits, Workload

REPOSITORY = Path(__file__).parents[2]
DEFAULT_FOLDER = REPOSITORY / "data" / "bench"
MILLION, RESUME, ALL = "million", "resume", "all"
SPECIAL = {
    MILLION: "a million requests around the simulated engine: rates, and memory of each process",
    RESUME: "kill -9 at 90% and a second run: what was computed twice",
}
Report = dict[str, Any]
#: Of tables that go to a file.
PLAIN_WIDTH = 120


class EngineChoice(StrEnum):
    VLLM = "vllm"
    SIM = "sim"


@dataclass(frozen=True)
class Wish:
    """What was asked for on the command line."""

    runs: int
    num_requests: int | None
    seed: int
    model: str | None
    load_format: str | None
    contenders: tuple[str, ...]
    limits: dict[str, int]
    data: Path | None
    folder: Path
    engine: EngineChoice


console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console = Console(highlight=False, soft_wrap=True, width=PLAIN_WIDTH)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    workload: Annotated[
        list[str] | None, typer.Option(help='Which, again for several; "all" for all of them.')
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Rounds; in each, every contender once.")] = 3,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Write the report here; with several workloads, a folder."),
    ] = None,
    plot_out: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw it (.svg, .png); with several workloads, a folder."),
    ] = None,
    contender: Annotated[
        str, typer.Option(help="Only these, with commas between; --list names them.")
    ] = "",
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many; limits that depend on it follow.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated prompts.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder or hub id instead of a model made on the spot. To have it downloaded, "
            "set HF_HUB_OFFLINE=0."
        ),
    ] = None,
    load_format: Annotated[
        str | None, typer.Option(help="vLLM's; dummy for a model without weights.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="For all but run_batch.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="For all but run_batch.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the traces.",
            envvar="VLLM_BATCH_BENCH_DATA",
            show_default="../shared/data",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where models are kept.", show_default="data/bench")
    ] = DEFAULT_FOLDER,
    engine: Annotated[
        EngineChoice, typer.Option(help="sim: a try without vLLM, ours alone.")
    ] = EngineChoice.VLLM,
    show_list: Annotated[
        bool, typer.Option("--list", help="Name workloads and contenders, and end.")
    ] = False,
) -> None:
    """Ours beside vLLM's batch runner and LLM.chat: same file, model, limits and machine."""
    if show_list:
        _print_list()
        return
    names = _workload_names(workload or ["unique"])
    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "kv_cache_tokens": kv_cache_tokens,
    }
    wish = Wish(
        runs=runs,
        num_requests=requests,
        seed=seed,
        model=model,
        load_format=load_format,
        contenders=_contender_names(contender),
        limits={name: value for name, value in limits.items() if value is not None},
        data=data or _usual_data(),
        folder=folder.absolute(),
        engine=engine,
    )
    machine = this_machine()
    all_well = True
    for name in names:
        if name == "gemma" and machine.gpu is None and len(names) > 1:
            console.print("gemma was left out: it is for a GPU. Name it alone to run it anyway.")
            continue
        several = len(names) > 1
        path = json_out / f"{name}.json" if json_out is not None and several else json_out

        def save(report: Report, path: Path | None = path) -> None:
            if path is not None:
                write_report(path, report)

        try:
            report = _measure(name, wish, machine, save)
        except (RunFailed, WrongAnswers, DataMissing) as error:
            console.print(f"{name} did not work: {error}", style="bold red", markup=False)
            all_well = False
            continue
        save(report)
        _print(report)
        all_well &= not report.get("problems")
        if plot_out is not None and "contenders" in report:
            try:
                plot(report, plot_out / f"{name}.svg" if several else plot_out)
            except NoMatplotlib as error:
                console.print(str(error))
    raise typer.Exit(0 if all_well else 1)


def _print_list() -> None:
    console.print("Workloads")
    for workload in WORKLOADS.values():
        console.print(f"  {workload.name:15} {workload.about}", markup=False)
    for name, about in SPECIAL.items():
        console.print(f"  {name:15} {about}", markup=False)
    console.print("Contenders")
    for name, about in ABOUT.items():
        console.print(f"  {name:22} {about}", markup=False)


def _workload_names(asked: list[str]) -> list[str]:
    known = [*WORKLOADS, *SPECIAL]
    names = known if ALL in asked else list(dict.fromkeys(asked))
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"There is no workload {name!r}; there are {', '.join(known)}."
            )
    return names


def _contender_names(asked: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in asked.split(",") if name.strip())
    for name in names:
        if name not in CONTENDERS:
            raise typer.BadParameter(
                f"There is no contender {name!r}; there are {', '.join(CONTENDERS)}."
            )
    return names


def _usual_data() -> Path | None:
    """A folder `shared/data` beside the repository, where there is one."""
    path = REPOSITORY.parent / "shared" / "data"
    return path if path.is_dir() else None


# -- measuring -------------------------------------------------------------------------------------


def _measure(name: str, wish: Wish, machine: Machine, save: Callable[[Report], None]) -> Report:
    report: Report = {
        "workload": name,
        "about": WORKLOADS[name].about if name in WORKLOADS else SPECIAL[name],
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.peer", *_public(sys.argv[1:])]),
        "commit": commit(),
        "machine": machine.as_dict(),
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory(prefix="vllm-batch-bench-") as place:
        if name == MILLION:
            return report | _million(Path(place), wish)
        workload = WORKLOADS["unique" if name == RESUME else name]
        job, parameters = _job(workload, wish, machine, Path(place))
        report["parameters"] = parameters
        if name == RESUME:
            # Twice max_num_seqs, unless somebody has set it otherwise.
            factor = Settings.model_fields["window_factor"].default
            window = int(job.engine_args["max_num_seqs"] * factor)
            kills = [resume.measure(job, window=window) for _ in range(wish.runs)]
            return report | {"resume": kills}
        return report | _compare(
            workload, wish, machine, job, lambda figures: save(report | figures)
        )


def _public(arguments: list[str]) -> list[str]:
    """The command's arguments without paths of this machine."""
    return [Path(text).name if text.startswith("/") else text for text in arguments]


def _job(
    workload: Workload, wish: Wish, machine: Machine, place: Path
) -> tuple[Job, dict[str, Any]]:
    num_requests = wish.num_requests or workload.num_requests
    requests = workload.generate(num_requests, wish.seed, wish.data)
    limits = Limits(**(vars(workload.limits(num_requests)) | wish.limits))
    load_format = wish.load_format
    if wish.engine is EngineChoice.SIM:
        model = Path("sim")
    elif wish.model is not None:
        given = Path(wish.model).expanduser()
        model = given.absolute() if given.is_dir() else given
    else:
        model = models.ready(workload.model, wish.folder / "models")
        load_format = load_format or ("dummy" if workload.model == "gemma" else None)
    arguments = contenders.engine_arguments(limits, machine, load_format=load_format)
    job = Job(requests, model, arguments, place, wish.engine.value)
    job.write()
    return job, {
        "num_requests": len(requests),
        "seed": wish.seed,
        "model": model.name if wish.model is None or given.is_dir() else wish.model,
        "engine": wish.engine.value,
        "engine_args": arguments,
        "traces": wish.data is not None,
    }


def _compare(
    workload: Workload, wish: Wish, machine: Machine, job: Job, save: Callable[[Report], None]
) -> Report:
    """Round after round; `save` gets what there is after each."""
    share = None
    if any(target.metric == HIT_OF_INFINITE for target in workload.targets):
        share = _infinite_share(job, machine)
    comparison = Comparison(workload, machine, share)
    names = wish.contenders or workload.contenders
    for number in range(1, wish.runs + 1):
        runs: dict[str, Run] = {}
        for name in names:
            if name in comparison.skipped:
                continue
            try:
                run = contenders.run(name, job, str(number))
            except Skipped as reason:
                comparison.skipped[name] = str(reason)
                continue
            runs[name] = run
            comparison.check(run)
            console.print(f"round {number}/{wish.runs}  {_in_a_line(run)}", markup=False)
        comparison.rounds.append(runs)
        save(comparison.report())
    return comparison.report()


def _in_a_line(run: Run) -> str:
    return (
        f"{run.contender:22} {run.requests_per_s:9,.1f} requests/s  {run.wall_s:7.1f} s  "
        f"{run.peak_mb:7,.0f} MB  {run.hit_share:6.1%} cached  {run.num_computed:,} computed"
    )


def _infinite_share(job: Job, machine: Machine) -> float | None:
    if job.engine != "vllm":
        return None
    prompts = tokenized(job.requests, job.model)
    size = contenders.block_size(job.engine_args, machine)
    return round(infinite_hit_share(prompts, size), 4)


def _million(place: Path, wish: Wish) -> Report:
    num_requests = wish.num_requests or 1_000_000
    figures = vars(around_the_engine.measure(place, num_requests, 300))
    largest = max(figures["api_peak_mb"], figures["worker_peak_mb"])
    return {
        "parameters": {"num_requests": num_requests, "engine": "sim", "prompt_bytes": 300},
        "figures": {
            **{name: round(value, 2) for name, value in figures.items()},
            "upload_mb_per_s": round(figures["upload_bytes"] / figures["upload_s"] / 1e6, 1),
            "durable_results_per_s": round(num_requests / figures["run_s"], 1),
        },
        "reached": largest < MOST_MB,
    }


def _print(report: Report) -> None:
    if "contenders" in report:
        print_report(report, console)
        same = ", ".join(f"{name} {value:.1%}" for name, value in report["equal_answers"].items())
        console.print(f"Same answers as the first: {same}", markup=False)
        for problem in report["problems"]:
            console.print(problem, style="bold red", markup=False)
        return
    console.print(f"\n{report['workload']}: {report['about']}", markup=False)
    for figures in [report["figures"]] if "figures" in report else report["resume"]:
        for name, value in figures.items():
            shown = str(value) if isinstance(value, bool) else f"{value:,}"
            console.print(f"  {name:24} {shown}", markup=False)
        console.print()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
