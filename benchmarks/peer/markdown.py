"""The peer section of docs/performance.md, made from the reports that are committed.

    python -m benchmarks.peer.markdown

Replaces what stands between the two marks; what is written around them stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer.report import MOST_MB, TITLES
from benchmarks.peer.workloads import WORKLOADS

REPOSITORY = Path(__file__).parents[2]
REPORTS = REPOSITORY / "benchmarks" / "reports"
PAGE = REPOSITORY / "docs" / "performance.md"
BEGIN = "<!-- Made by `python -m benchmarks.peer.markdown`. Do not edit. -->"
END = "<!-- End of what is made. -->"
ORDER = [*WORKLOADS, "resume", "million"]

Report = Mapping[str, Any]


def load_reports(folder: Path) -> list[Report]:
    """The reports on workloads of a folder and of those in it, in the order of the workloads.

    `plot` is where the picture of a report lies, if there is one beside it.
    """
    reports = []
    for path in sorted(folder.rglob("*.json")):
        report = json.loads(path.read_text())
        if "workload" not in report:  # another benchmark's
            continue
        if path.with_suffix(".svg").is_file():
            report["plot"] = path.with_suffix(".svg")
        reports.append(report)
    return sorted(reports, key=lambda report: ORDER.index(report["workload"]))


def render(reports: Sequence[Report]) -> str:
    """The section's text; of every machine its own part."""
    if not reports:
        return "Nothing has been measured yet.\n"
    parts = []
    for machine in dict.fromkeys(_machine(report) for report in reports):
        of_machine = [report for report in reports if _machine(report) == machine]
        parts += [f"### {machine}\n", _versions(of_machine[0]), _targets(of_machine)]
        parts += [_workload(report) for report in of_machine]
    return "\n".join(parts)


def page_with(section: str, page: str) -> str:
    """The page with this section between its marks. Raises ValueError where they aren't."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("The page has no marks.")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def _machine(report: Report) -> str:
    machine = report["machine"]
    cores = f"{machine['num_cores']} cores of {machine['cpu']}, {machine['memory_gib']:g} GiB"
    return f"{machine['gpu']}, {cores}" if machine["gpu"] else f"{cores}, no GPU"


def _versions(report: Report) -> str:
    machine = report["machine"]
    named = [f"{name} {version}" for name, version in report["versions"].items()]
    return (
        f"Python {machine['python']}, Linux {machine['kernel']}, {', '.join(named)}; "
        f"{machine['dtype']}.\n"
    )


def _targets(reports: Iterable[Report]) -> str:
    rows = []
    for report in reports:
        for ratio in report.get("ratios", ()):
            if ratio["at_least"] is None:
                continue
            against = f" against {ratio['against']}" if ratio["against"] else ""
            rows.append(
                f"| {report['workload']} | {TITLES[ratio['metric']]}{against} "
                f"| ≥ {ratio['at_least']:g} | {ratio['min']:.2f} | **{ratio['median']:.2f}** "
                f"| {ratio['max']:.2f} | {'yes' if ratio['reached'] else 'no'} |"
            )
        rows += [
            f"| resume | begun twice, of {run['num_requests']:,} | ≤ {run['window']:,} | "
            f"| **{run['begun_twice']:,}** | | {'yes' if run['reached'] else 'no'} |"
            for run in report.get("resume", ())
        ]
        if "figures" in report:
            figures = report["figures"]
            rows += [
                f"| million, {figures['num_requests']:,} | {who}, peak MB | < {MOST_MB:g} | "
                f"| **{figures[name]:,.0f}** | | {'yes' if figures[name] < MOST_MB else 'no'} |"
                for who, name in (("API server", "api_peak_mb"), ("worker", "worker_peak_mb"))
            ]
    if not rows:
        return ""
    head = "| workload | what | target | min | median | max | reached |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows, ""])


def _workload(report: Report) -> str:
    lines = [f"#### {report['workload']}\n", f"{report['about'][:1].upper()}{report['about'][1:]}."]
    lines.append(f"`{report['command']}`\n")
    if "figures" in report:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {name} | {value:,} |" for name, value in report["figures"].items()]
        return "\n".join([*lines, ""])
    if "resume" in report:
        lines += ["| | |", "|---|---|"]
        for run in report["resume"]:
            lines += [f"| {name} | {value} |" for name, value in run.items() if name != "reached"]
        return "\n".join([*lines, ""])
    lines.append(
        "| contender | requests/s | tokens/s | wall, s | peak MB | cache hits | computed |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for name, figures in report["contenders"].items():
        median = {metric: spread["median"] for metric, spread in figures.items()}
        low, high = figures["requests_per_s"]["min"], figures["requests_per_s"]["max"]
        lines.append(
            f"| {name} | {median['requests_per_s']:,.1f} ({low:,.1f}–{high:,.1f}) "
            f"| {median['output_tokens_per_s']:,.0f} | {median['wall_s']:,.1f} "
            f"| {median['peak_mb']:,.0f} | {median['hit_share']:.1%} "
            f"| {median['num_computed']:,.0f} |"
        )
    lines.append("")
    num_rounds = len(report["rounds"])
    least = min(report["equal_answers"].values(), default=1.0)
    note = f"Medians of {num_rounds} rounds in turn" if num_rounds > 1 else "One round"
    note += f"; at least {least:.1%} of the answers are the same, letter for letter."
    if report.get("infinite_hit_share"):
        note += f" A cache without a limit: {report['infinite_hit_share']:.1%} hits."
    lines += [note, ""]
    if "plot" in report:
        target = Path(os.path.relpath(report["plot"], PAGE.parent)).as_posix()
        lines += [f"![{report['workload']}]({target})", ""]
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text()
    PAGE.write_text(page_with(render(load_reports(REPORTS)), page))


if __name__ == "__main__":
    main()
