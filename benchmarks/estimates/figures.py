"""From trials to figures: errors, coverage, targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.estimates.real_shapes import REAL_SHAPES
from benchmarks.estimates.shapes import SHAPES
from benchmarks.estimates.trial import LOOKS

Trials = Sequence[Mapping[str, Any]]
KINDS = {name: shape.lengths for name, shape in REAL_SHAPES.items()} | {
    shape.name: shape.lengths for shape in SHAPES
}


def error(trial: Mapping[str, Any]) -> float:
    """Before the run: of its time."""
    return abs(trial["expected_s"] / trial["actual_s"] - 1.0)


def is_within(trial: Mapping[str, Any]) -> bool:
    """Whether the time lay in the range that was told before the run."""
    return bool(trial["low_s"] <= trial["actual_s"] <= trial["high_s"])


def live_error(trial: Mapping[str, Any], live: Mapping[str, Any]) -> float:
    """While it runs: of the whole run's time, as expected then."""
    return abs(live["expected_s"] - live["actual_s"]) / trial["actual_s"]


def left_error(live: Mapping[str, Any]) -> float:
    """While it runs: of what was left then."""
    return abs(live["expected_s"] / live["actual_s"] - 1.0)


def figures(trials: Trials) -> dict[str, Any]:
    """What the report's tables say; errors as shares, not percent."""
    found: dict[str, Any] = {"before": _spread(error(trial) for trial in trials)}
    found["before"]["within"] = _share(is_within(trial) for trial in trials)
    found["informed"] = _spread(abs(t["informed_s"] / t["actual_s"] - 1.0) for t in trials)
    found["scaled"] = _spread(abs(t["scaled_s"] / t["actual_s"] - 1.0) for t in trials)
    found["kinds"] = {
        kind: _spread(error(trial) for trial in trials if KINDS.get(trial["shape"]) == kind)
        for kind in ("set", "cut", "natural")
        if any(KINDS.get(trial["shape"]) == kind for trial in trials)
    }
    found["shapes"] = {
        shape: _spread(error(trial) for trial in trials if trial["shape"] == shape)
        for shape in dict.fromkeys(trial["shape"] for trial in trials)
    }
    found["machines"] = {
        machine: _spread(error(trial) for trial in trials if trial["machine"] == machine)
        for machine in dict.fromkeys(trial["machine"] for trial in trials)
    }
    found["seeds"] = {}
    for seed in dict.fromkeys(trial["seed"] for trial in trials):
        chosen = [trial for trial in trials if trial["seed"] == seed]
        found["seeds"][str(seed)] = _spread(error(trial) for trial in chosen) | {
            "within": _share(is_within(trial) for trial in chosen)
        }
    found["live"] = {}
    for place, share in enumerate(LOOKS):
        seen = [(trial, trial["lives"][place]) for trial in trials if len(trial["lives"]) > place]
        if not seen:
            continue
        found["live"][f"{share:g}"] = {
            "whole": _spread(live_error(trial, live) for trial, live in seen),
            "left": _spread(left_error(live) for _, live in seen),
            "naive": _spread(
                abs(live["naive_s"] - live["actual_s"]) / trial["actual_s"] for trial, live in seen
            ),
            "within": _share(
                live["low_s"] <= live["actual_s"] <= live["high_s"] for _, live in seen
            ),
        }
    return found


def _spread(errors: Iterable[float]) -> dict[str, Any]:
    values = np.array(list(errors))
    if not len(values):
        return {"num": 0, "median": None, "p90": None}
    return {
        "num": len(values),
        "median": round(float(np.median(values)), 4),
        "p90": round(float(np.quantile(values, 0.9)), 4),
    }


def _share(flags: Iterable[bool]) -> float:
    return round(float(np.mean(list(flags))), 4)
