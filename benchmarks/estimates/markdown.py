"""The measured part of docs/estimates.md, and its plots, from the reports that are committed.

    python -m benchmarks.estimates.markdown

Replaces what stands between the two marks; what is written around them stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
REPORTS = Path(__file__).parent / "reports"
PAGE = REPOSITORY / "docs" / "estimates.md"
PLOTS = REPOSITORY / "docs" / "plots"
BEGIN = "<!-- Made by `python -m benchmarks.estimates.markdown`. Do not edit. -->"
END = "<!-- End of what is made. -->"
NAMES = {
    "set": "lengths set by the requests, or nothing generated",
    "cut": "most answers cut by their limit",
    "natural": "lengths left to the model",
}
TITLES = {"hidden": "Hidden machines", "real": "The real engine"}

Report = Mapping[str, Any]


def load() -> dict[str, Report]:
    """The committed reports by the engine they are of."""
    return {
        name: json.loads((REPORTS / f"{name}.json").read_text())
        for name in TITLES
        if (REPORTS / f"{name}.json").is_file()
    }


def render(reports: Mapping[str, Report]) -> str:
    """The section's text."""
    if not reports:
        return "Nothing has been measured yet.\n"
    return "\n".join(_of(name, report) for name, report in reports.items())


def page_with(section: str, page: str) -> str:
    """The page with this section between its marks. Raises ValueError where they aren't."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("The page has no marks.")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def _of(name: str, report: Report) -> str:
    found = report["figures"]
    machine = report["machine"]
    lines = [
        f"### {TITLES[name]}\n",
        (
            f"`{report['command']}`, {report['date']}, commit {report['commit']}; "
            f"{machine['num_cores']} cores of {machine['cpu']}. {found['before']['num']} jobs.\n"
        ),
    ]
    lines += _targets(report)
    lines += [
        "| before the run | jobs | median error | 90th percentile |",
        "|---|---|---|---|",
        _row("all", found["before"]),
        *(_row(NAMES[kind], spread) for kind, spread in found["kinds"].items()),
        *(_row(f"shape: {shape}", spread) for shape, spread in found["shapes"].items()),
        *(_row(f"machine: {one}", spread) for one, spread in found["machines"].items()),
        *(_row(f"seed: {seed}", spread) for seed, spread in found["seeds"].items()),
        _row("for comparison: had the answers' lengths been known", found["informed"]),
        _row("for comparison: the newest benchmark's requests a second", found["scaled"]),
        "",
        (
            "| requests done | median error of the whole run's time | 90th percentile "
            "| median error of what is left | within the range | by requests a second so far |"
        ),
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {float(share):.0%} | {_percent(live['whole']['median'])} "
        f"| {_percent(live['whole']['p90'])} | {_percent(live['left']['median'])} "
        f"| {live['within']:.0%} | {_percent(live['naive']['median'])} |"
        for share, live in found["live"].items()
    ]
    lines.append("")
    if "sources" in report:
        sources = "; ".join(f"{key}: {value}" for key, value in report["sources"].items())
        lines += [f"Traces: {sources}.\n"]
    if (PLOTS / f"estimates-{name}.svg").is_file():
        lines += [f"![{TITLES[name]}](plots/estimates-{name}.svg)", ""]
    return "\n".join(lines)


def _targets(report: Report) -> list[str]:
    found = report["figures"]
    before, live = found["before"], found["live"]
    rows = [
        ("before the run, median error", "≤ 10%", before["median"], before["median"] <= 0.10),
        ("before the run, 90th percentile", "≤ 25%", before["p90"], before["p90"] <= 0.25),
    ]
    for share, most in (("0.1", 0.07), ("0.5", 0.03)):
        if share in live:
            value = live[share]["whole"]["median"]
            what = f"{float(share):.0%} done, median error of the run's time"
            rows.append((what, f"≤ {most:.0%}", value, value <= most))
            value = live[share]["left"]["median"]
            what = f"the same, stricter: of what is left after {float(share):.0%}"
            rows.append((what, f"≤ {most:.0%}", value, value <= most))
    within = before["within"]
    rows.append(("jobs within the 80% range", "75–90%", within, 0.75 <= within <= 0.90))
    lines = ["| what | reach | measured | reached |", "|---|---|---|---|"]
    lines += [
        f"| {what} | {reach} | **{_percent(value)}** | {'yes' if reached else 'no'} |"
        for what, reach, value, reached in rows
    ]
    if "many" in report:
        many = report["many"]
        lines += [
            (
                f"| estimating {many['num_requests']:,} requests, counted already | ≤ 5 s "
                f"| **{many['before_s']:g} s**, {many['before_peak_mb']:g} MB "
                f"| {'yes' if many['before_s'] <= 5 else 'no'} |"
            ),
            (
                f"| what is left of as many | | **{many['live_s']:g} s**, "
                f"{many['live_peak_mb']:g} MB | |"
            ),
        ]
    for row in report.get("guide", ()):
        seconds = row["seconds"]
        said = {100: "73 s", 5_000: "37 min", 50_000: "6.1 h", 200_000: "24.5 h"}
        shown = {100: f"{seconds:.0f} s", 5_000: f"{seconds / 60:.0f} min"}.get(
            row["num_requests"], f"{seconds / 3600:.1f} h"
        )
        wanted = said[row["num_requests"]]
        lines.append(
            f"| the guide's table: {row['num_requests']:,} requests | {wanted} | **{shown}** "
            f"| {'yes' if shown == wanted else 'no'} |"
        )
    return [*lines, ""]


def _row(name: str, spread: Mapping[str, Any]) -> str:
    return (
        f"| {name} | {spread['num']} | {_percent(spread['median'])} | {_percent(spread['p90'])} |"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def main() -> None:
    from benchmarks.estimates.plot import plot

    reports = load()
    for name, report in reports.items():
        plot(report, PLOTS / f"estimates-{name}.svg")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page_with(render(reports), page), encoding="utf-8")


if __name__ == "__main__":
    main()
