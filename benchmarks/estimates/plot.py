"""A report as a picture: expected against actual, and the error while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates.figures import KINDS, live_error
from benchmarks.estimates.trial import LOOKS

COLORS = {"set": "#2c7fb8", "cut": "#7fcdbb", "natural": "#f0923b"}
WORDS = {
    "set": "lengths set by the requests",
    "cut": "most answers cut by their limit",
    "natural": "lengths left to the model",
}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture as SVG. Needs matplotlib, of the extra `bench`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trials = report["trials"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind, color in COLORS.items():
        chosen = [one for one in trials if KINDS.get(one["shape"], "set") == kind]
        if not chosen:
            continue
        actual = np.array([one["actual_s"] for one in chosen])
        ratio = np.array([one["expected_s"] for one in chosen]) / actual
        low = np.array([one["low_s"] for one in chosen]) / actual
        high = np.array([one["high_s"] for one in chosen]) / actual
        left.vlines(actual, low, high, color=color, alpha=0.35, linewidth=1)
        left.plot(actual, ratio, ".", color=color, label=WORDS[kind])
    left.axhline(1.0, color="black", linewidth=0.8)
    left.axhspan(0.9, 1.1, color="#dddddd", zorder=0)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_yticks([0.5, 0.7, 0.9, 1.1, 1.5, 2.0], ["0.5", "0.7", "0.9", "1.1", "1.5", "2"])
    left.minorticks_off()
    left.set_xlabel("actual seconds")
    left.set_title("before the run: expected / actual, with the 80% range", fontsize=9)
    left.legend(fontsize=7)
    medians: list[list[float]] = [[], [], []]
    shares = []
    for place, share in enumerate(LOOKS):
        seen = [(one, one["lives"][place]) for one in trials if len(one["lives"]) > place]
        if not seen:
            continue
        shares.append(100 * share)
        errors = [live_error(one, live) for one, live in seen]
        naive = [abs(live["naive_s"] - live["actual_s"]) / one["actual_s"] for one, live in seen]
        medians[0].append(100 * float(np.median(errors)))
        medians[1].append(100 * float(np.quantile(errors, 0.9)))
        medians[2].append(100 * float(np.median(naive)))
    right.plot(shares, medians[0], "o-", color="#2c7fb8", label="median")
    right.plot(shares, medians[1], "o--", color="#2c7fb8", label="90th percentile")
    right.plot(shares, medians[2], "o:", color="#999999", label="by requests a second, median")
    right.set_xlabel("% of the requests done")
    right.set_ylim(0, max(40.0, min(max(medians[2], default=0) * 1.1, 60)))
    right.set_title("while it runs: error of the whole run's time, %", fontsize=9)
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "estimates"}):
        figure.savefig(path, metadata={"Date": None})
