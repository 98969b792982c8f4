"""Run the steps, and write the report.

python -m benchmarks.gpu [--full] [--cpu] [--only STEP,…] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
#: What the steps import, besides the standard library; vLLM installs all of it.
NEEDED = ("msgspec", "psutil", "pydantic", "pydantic_settings", "torch", "vllm")
EXIT_FAILED, EXIT_USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a step failed, 2 if nothing could be run."""
    options = _parser().parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _tell(f"These Python packages are missing for {sys.executable}: {', '.join(missing)}")
        return EXIT_USAGE
    from batch_app import gpus
    from benchmarks.gpu.steps import BUDGETS_S, steps

    on_gpu = not options.cpu
    chosen = steps(full=options.full or bool(options.only), on_gpu=on_gpu)
    if options.show_list:
        usual = {step.name for step in steps(full=False, on_gpu=on_gpu)}
        for step in steps(full=True, on_gpu=on_gpu):
            extra = "" if step.name in usual else " (--full)"
            print(f"{step.name:<16} {step.budget_s:4.0f} s  {step.about}{extra}")
        return 0
    if options.only:
        wanted = [name.strip() for name in options.only.split(",") if name.strip()]
        known = {step.name: step for step in chosen}
        if unknown := [name for name in wanted if name not in known]:
            _tell(f"There is no step {unknown[0]!r}; there are {', '.join(known)}.")
            return EXIT_USAGE
        chosen = [known[name] for name in known if name in wanted]
    if on_gpu and not gpus.list_gpus():
        problem = gpus.why_unavailable()
        _tell(f"NVML lists no GPU ({problem.message if problem else 'none there'}).")
        _tell("Add --cpu to rehearse the steps without one.")
        return EXIT_USAGE
    budget_s = options.budget or BUDGETS_S[options.full or bool(options.only), options.cpu]
    with ExitStack() as stack:
        return _run(chosen, options, on_gpu=on_gpu, budget_s=budget_s, stack=stack)


def _run(
    chosen: Sequence[Any],
    options: argparse.Namespace,
    *,
    on_gpu: bool,
    budget_s: float,
    stack: ExitStack,
) -> int:
    from batch_app.self_check.report import Report
    from batch_app.self_check.runner import run_steps
    from batch_app.self_check.short import options_for, step_folder
    from benchmarks.peer.machine import commit, this_machine, versions

    about = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *_public(sys.argv[1:])]),
        "commit": commit(),
        "profile": {"cpu": options.cpu, "full": options.full, "budget_s": budget_s},
        "machine": this_machine().as_dict(),
        "versions": versions(),
    }
    report = Report(about, options.json)
    report.write()
    folder = stack.enter_context(step_folder())
    shared = options_for(_demo(on_gpu=on_gpu), on_gpu=on_gpu)
    for result in run_steps(
        chosen,
        shared,
        budget_s=budget_s,
        folder=folder,
        on_start=lambda step: _tell(f"{step.name}: {step.about} (at most {step.budget_s:.0f} s)"),
    ):
        report.add(result)
        print(result.line, flush=True)
        for line in result.log_tail:
            _tell(f"    {line}")
    report.finish()
    print(report.summary, flush=True)
    if options.json is not None:
        _tell(f"Report: {options.json}")
    return EXIT_FAILED if report.has_failed else 0


def _demo(*, on_gpu: bool) -> Any:
    """The model that comes with the repository; compiled and captured as any other on a GPU."""
    from batch_app.engine.base import ModelSpec
    from batch_app.self_check.short import DEMO

    folder = REPOSITORY / "models" / "demo"
    if not (folder / "config.json").is_file():
        return None
    arguments: dict[str, Any] = {"max_model_len": 2048}
    if not on_gpu:
        arguments["enforce_eager"] = True
    return ModelSpec(name=DEMO, engine="vllm", source=str(folder), engine_args=arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Prove on an NVIDIA GPU that the engine works, and measure it. Six minutes.",
    )
    parser.add_argument("--full", action="store_true", help="more steps; up to an hour")
    parser.add_argument("--cpu", action="store_true", help="rehearse the steps on a CPU, small")
    parser.add_argument("--only", metavar="STEP,…", help="run these alone; also those of --full")
    parser.add_argument("--list", action="store_true", dest="show_list", help="name the steps")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for all steps together")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the report here, again after every step"
    )
    return parser


def _public(arguments: Sequence[str]) -> list[str]:
    """Without paths of this machine."""
    return [Path(text).name if text.startswith("/") else text for text in arguments]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
