"""The usage guide's benchmark: requests of 788 prompt and 308 output tokens on the shape of Gemma 3
4B, through our engine and through what vLLM has for the same job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from batch_app.engine.base import EngineRequest, Outcome
from batch_app.self_check.loaded_engine import loaded
from batch_app.self_check.step import Note, Options, StepFailed, StepSkipped
from benchmarks.gpu.shapes import shape_spec
from benchmarks.peer import contenders, models
from benchmarks.peer.answers import WrongAnswers
from benchmarks.peer.machine import this_machine
from benchmarks.peer.observe import RunFailed
from benchmarks.peer.workloads import WORKLOADS, Line, gemma

OWN_STEP = "guide-shape"
_SEED = 1
#: Of a step's time: when our engine gets no more requests, and what a contender is to take.
_SHARE_OF_TIME, _CONTENDERS_SHARE = 0.7, 0.4
_LEAST_REQUESTS = 4


def ours(options: Options, note: Note) -> str:
    """Answer `num_requests`, or as many as there is time for. Of the options: `shape`."""
    folder, started = Path(options["folder"]), time.monotonic()
    deadline = started + options["timeout_s"] * _SHARE_OF_TIME
    spec = shape_spec(options["shape"], folder, on_gpu=options["on_gpu"])
    lines = gemma(options["num_requests"], _SEED)
    with loaded(spec, folder, options["timeout_s"]) as engine:
        note(load_s=round(engine.info.load_s, 1), max_num_seqs=engine.info.max_num_seqs)
        began = time.monotonic()
        finished: list[Outcome] = []

        def abort_late(found: Sequence[Outcome]) -> Sequence[int]:
            finished.extend(found)
            if time.monotonic() < deadline:
                return ()
            return range(len(lines))

        engine.answer(
            _until(deadline, lines), timeout_s=options["timeout_s"], on_outcomes=abort_late
        )
        seconds = time.monotonic() - began
    if not finished:
        raise StepFailed(f"no request was answered within {seconds:.0f} s")
    for outcome in finished:
        if outcome.status_code != 200 or outcome.completion_tokens != _tokens(lines, outcome):
            raise StepFailed(f"request {outcome.number} has a wrong answer")
    prompt_tokens = sum(outcome.prompt_tokens for outcome in finished)
    output_tokens = sum(outcome.completion_tokens for outcome in finished)
    rates = {
        "num_answered": len(finished),
        "seconds": round(seconds, 1),
        "requests_per_s": round(len(finished) / seconds, 3),
        "output_tokens_per_s": round(output_tokens / seconds, 1),
        "tokens_per_s": round((prompt_tokens + output_tokens) / seconds, 1),
    }
    note(**rates)
    return (
        f"{len(finished):,} of {len(lines):,} requests in {seconds:.0f} s: "
        f"{rates['requests_per_s']:,.2f} requests/s, {rates['output_tokens_per_s']:,.0f} output "
        "tokens/s"
    )


def contender(options: Options, note: Note) -> str:
    """Have one of the contenders of `benchmarks.peer` answer as many as it has time for, at the
    rate of our engine. Of the options: `shape`, `contender`."""
    name, folder = options["contender"], Path(options["folder"])
    rate = options["before"].get(OWN_STEP, {}).get("requests_per_s")
    if rate is None:
        raise StepSkipped(f"the step {OWN_STEP} says how many requests there is time for")
    num = int(rate * options["timeout_s"] * _CONTENDERS_SHARE)
    num = max(_LEAST_REQUESTS, min(num, options["num_requests"]))
    machine = this_machine()
    limits = WORKLOADS["gemma"].limits(num)
    arguments = contenders.engine_arguments(limits, machine, load_format="dummy")
    model = models.ready(options["shape"], folder)
    job = contenders.Job(gemma(num, _SEED), model, arguments, folder)
    job.write()
    try:
        run = contenders.run(name, job, "1")
    except (RunFailed, WrongAnswers) as error:
        raise StepFailed(str(error)) from error
    note(**run.as_dict(), ratio=round(rate / run.requests_per_s, 3))
    return (
        f"{run.num_requests:,} requests, {run.requests_per_s:,.2f} requests/s, "
        f"{run.output_tokens_per_s:,.0f} output tokens/s, {run.wall_s:.0f} s in all"
    )


def _until(deadline: float, lines: Sequence[Line]) -> Iterator[EngineRequest]:
    """The requests, until it's too late to begin another."""
    for number, line in enumerate(lines):
        if time.monotonic() > deadline:
            return
        body: dict[str, Any] = {**line["body"]}
        body.pop("model", None)
        yield EngineRequest(number, line["url"], json.dumps(body).encode())


def _tokens(lines: Sequence[Line], outcome: Outcome) -> int:
    return int(lines[outcome.number]["body"]["max_tokens"])
