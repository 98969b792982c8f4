"""The computed part of docs/scale.md, and its picture, from the reports that are committed.

python -m benchmarks.scale.markdown
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.scale.model import MEASURED

REPORT = Path(__file__).parent / "reports" / "scale.json"
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
PLOT = PAGE.parent / "plots" / "scale.svg"
BEGIN = "<!-- Made by `python -m benchmarks.scale.markdown`. Do not edit. -->"
END = "<!-- End of what is made. -->"

Report = Mapping[str, Any]


def render() -> str:
    """The section's text."""
    measured = json.loads(MEASURED.read_text())
    report = json.loads(REPORT.read_text())
    machine, planner = measured["machine"], measured["planner"]
    lines = [
        "### What was measured\n",
        (
            f"`{measured['command']}`, {measured['date']}: PostgreSQL {measured['postgresql']}, "
            f"fsync on; {machine['num_cores']} cores of {machine['cpu']}, shared with callers.\n"
        ),
        "| call | workers | connections | calls/s | median, ms | PostgreSQL's processor, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['call']} | {one['num_workers']:,} | {one['num_connections']} "
        f"| {one['calls_per_s']:,.1f} | {one['median_ms']:,.1f} | {1e3 * one['database_s']:.2f} |"
        for one in measured["rates"]
    ]
    lines += [
        "",
        (
            f"A connection's process takes {measured['connection_mb']:g} MB. Ordering "
            f"{planner['num_requests']:,} requests takes {planner['seconds']:g} s and "
            f"{planner['bytes_per_request']:.0f} bytes a request at the peak; the index has "
            f"{planner['index_bytes_per_request']:.0f}.\n"
        ),
        "### Where each part is used up, in replicas\n",
    ]
    parts = list(next(iter(report["scenarios"].values()))["limits"])
    lines += [
        "| | " + " | ".join(parts) + " | requests/s of 1,000 replicas |",
        "|---" * (len(parts) + 2) + "|",
    ]
    for name, found in report["scenarios"].items():
        cells = []
        for part in parts:
            limit = found["limits"][part]
            first = limit == min(value for value in found["limits"].values() if value is not None)
            text = "never" if limit is None else f"{limit:,.0f}"
            cells.append(f"**{text}**" if first else text)
        rate = dict(found["sweep"])[1000]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {rate:,.0f} |")
    last = list(report["scenarios"].values())[-1]["day_at_1000"]
    billion, prices = report["billion"], report["prices"]
    lines += [
        "",
        (
            "A day of the last line, 1,000 replicas at 90% load, batches of random sizes: of "
            f"{last['arrived']:,} requests {last['finished']:,} finished, {last['running']:,} were "
            f"in batches that ran, {last['waiting']:,} waited; 95% of the batches waited at most "
            f"{last['wait_p95_s']:,.0f} s.\n"
        ),
        "![Throughput by replicas](plots/scale.svg)\n",
        "### A billion requests a day\n",
        "| | | at | a day |",
        "|---|---|---|---|",
        (
            f"| GPUs | {billion['replicas']:,} | ${prices['gpu_usd_per_h']:g}/h "
            f"| ${billion['gpu_usd_per_day']:,} |"
        ),
        (
            f"| cores used by PostgreSQL and API servers | {billion['cores']:,} "
            f"| ${prices['core_usd_per_h']:g}/h | ${billion['core_usd_per_day']:,} |"
        ),
        (
            f"| kept for a month, of each day | {billion['gb_per_day']:,} GB "
            f"| ${prices['gb_month_usd']:g}/GB | ${billion['storage_usd_per_month']:,} |"
        ),
        "",
    ]
    return "\n".join(lines)


def page_with(section: str, page: str) -> str:
    """The page with this section between its marks. Raises ValueError where they aren't."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("The page has no marks.")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def plot(report: Report, path: Path) -> None:
    """Write the picture as SVG. Needs matplotlib, of the extra `bench`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, found in report["scenarios"].items():
        replicas, rates = zip(*found["sweep"], strict=True)
        axis.plot(replicas, rates, "o-", label=name, markersize=3)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("replicas")
    axis.set_ylabel("requests a second")
    axis.legend(fontsize=8)
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "scale"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    plot(json.loads(REPORT.read_text()), PLOT)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page_with(render(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
