"""Runs the steps of a self-check one after the other, within a time budget for all of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from batch_app.self_check.process import run_step
from batch_app.self_check.step import Figures, Options, Status, Step, StepResult


def run_steps(
    steps: Sequence[Step],
    options: Options,
    *,
    budget_s: float,
    folder: Path,
    on_start: Callable[[Step], None] = lambda _: None,
) -> Iterator[StepResult]:
    """Run them in this order and yield what came of each; nothing that a step does stops this.

    Each gets `options` besides its own, and as `before` the figures of those that ran before it,
    by name. Takes `budget_s` seconds at most: a step for which too little is left is skipped, one
    that the end of the budget catches is killed. `folder` gets their files.
    """
    deadline = time.monotonic() + budget_s
    before: dict[str, Figures] = {}
    for step in steps:
        left_s = deadline - time.monotonic()
        if left_s < step.least_s:
            message = f"{max(left_s, 0):.0f} s are left; it needs at least {step.least_s:.0f} s"
            yield StepResult(step.name, Status.SKIP, 0.0, message, out_of_budget=True)
            continue
        on_start(step)
        timeout_s = min(step.budget_s, left_s)
        found = run_step(
            step,
            {**options, "before": before, "timeout_s": timeout_s},
            timeout_s=timeout_s,
            folder=folder,
        )
        before[step.name] = found.figures
        if found.status is Status.FAIL and left_s < step.budget_s and found.seconds >= left_s:
            found = dataclasses.replace(
                found,
                status=Status.SKIP,
                out_of_budget=True,
                message=f"cut off after {found.seconds:.0f} s, at the end of the run's budget",
            )
        yield found
