"""A report as a picture: of each contender the steady rate, the wall time and the memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS = (
    ("requests_per_s", "requests/s, steady (more is better)"),
    ("wall_s", "whole wall time, s (less is better)"),
    ("peak_mb", "peak memory, MB (less is better)"),
)


class NoMatplotlib(Exception):
    """The optional extra `bench` isn't installed."""


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture; its format is by the path's suffix (.svg, .png).

    Raises NoMatplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NoMatplotlib(
            "A plot needs matplotlib: pip install 'vllm-batch-server[bench]'."
        ) from None
    names = list(report["contenders"])
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report['workload']}: {report['about']}", fontsize=10)
    axes = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
    for axis, (metric, title) in zip(axes, PANELS, strict=True):
        spreads = [report["contenders"][name][metric] for name in names]
        medians = [spread["median"] for spread in spreads]
        below = [spread["median"] - spread["min"] for spread in spreads]
        above = [spread["max"] - spread["median"] for spread in spreads]
        colors = ["#2c7fb8" if name.startswith("ours") else "#bdbdbd" for name in names]
        axis.barh(names, medians, xerr=[below, above], color=colors, capsize=3)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
