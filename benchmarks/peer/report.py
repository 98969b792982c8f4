"""From runs to figures: spreads, ratios, the table, the JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peer.contenders import Run
from benchmarks.peer.workloads import HIT_OF_INFINITE, OURS, STEADY, WALL, Workload

MEMORY = "peak_mb"
#: What API server and worker may each take at a million requests, in 10^6 bytes.
MOST_MB = 400.0
#: Where less is better, a ratio is theirs over ours.
LESS_IS_BETTER = frozenset({WALL, MEMORY})
SPREAD_METRICS = (
    "requests_per_s",
    "output_tokens_per_s",
    "engine_s",
    "wall_s",
    "peak_mb",
    "hit_share",
    "num_computed",
)
TITLES = {STEADY: "steady", WALL: "whole wall", MEMORY: "peak memory"}
TITLES[HIT_OF_INFINITE] = "cache hits of the infinite cache's"


@dataclass(frozen=True)
class Spread:
    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError when there are none."""
        if not values:
            raise ValueError("There are no values.")
        rounded = [round(value, 4) for value in (min(values), statistics.median(values))]
        return cls(rounded[0], rounded[1], round(max(values), 4))


@dataclass(frozen=True)
class Ratio:
    """How many times better `ours` is than `against`, round by round. `at_least`: the target."""

    metric: str
    ours: str
    against: str
    spread: Spread
    at_least: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; None where there is none."""
        return None if self.at_least is None else self.spread.median >= self.at_least

    def as_dict(self) -> dict[str, Any]:
        values = {"metric": self.metric, "ours": self.ours, "against": self.against}
        return {
            **values,
            **asdict(self.spread),
            "at_least": self.at_least,
            "reached": self.reached,
        }


Rounds = Sequence[Mapping[str, Run]]


def ratios(rounds: Rounds, workload: Workload, infinite_share: float | None) -> list[Ratio]:
    """The workload's targets first, then ours beside each other contender."""
    found = []
    for target in workload.targets:
        values = _values(rounds, target.metric, target.ours, target.against, infinite_share)
        if values:
            spread = Spread.of(values)
            found.append(Ratio(target.metric, target.ours, target.against, spread, target.at_least))
    told = {(ratio.metric, ratio.against) for ratio in found}
    for name in dict.fromkeys(name for runs in rounds for name in runs):
        for metric in (STEADY, WALL, MEMORY):
            if name == OURS or (metric, name) in told:
                continue
            values = _values(rounds, metric, OURS, name, None)
            if values:
                found.append(Ratio(metric, OURS, name, Spread.of(values)))
    return found


def _values(
    rounds: Rounds, metric: str, ours: str, against: str, infinite_share: float | None
) -> list[float]:
    if metric == HIT_OF_INFINITE:
        if not infinite_share:
            return []
        return [runs[ours].hit_share / infinite_share for runs in rounds if ours in runs]
    pairs = [(runs[ours], runs[against]) for runs in rounds if ours in runs and against in runs]
    values = [(getattr(our, metric), getattr(their, metric)) for our, their in pairs]
    if metric in LESS_IS_BETTER:
        values = [(their, our) for our, their in values]
    return [ours_value / theirs_value for ours_value, theirs_value in values if theirs_value]


def spreads(rounds: Rounds) -> dict[str, dict[str, dict[str, float]]]:
    """Of every contender, each figure's least, middle and greatest value."""
    names = dict.fromkeys(name for runs in rounds for name in runs)
    return {
        name: {
            metric: asdict(
                Spread.of([getattr(runs[name], metric) for runs in rounds if name in runs])
            )
            for metric in SPREAD_METRICS
        }
        for name in names
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Two tables: the contenders' medians, and the ratios with their spread."""
    console.print(f"\n{report['workload']}: {report['about']}", highlight=False)
    style = box.SQUARE if console.is_terminal else box.MARKDOWN
    columns = ("requests/s", "tokens/s", "wall s", "peak MB", "cache hits", "computed")
    runs = Table("contender", *columns, box=style)
    for column in runs.columns[1:]:
        column.justify = "right"
    for name, figures in report["contenders"].items():
        median = {metric: spread["median"] for metric, spread in figures.items()}
        runs.add_row(
            name,
            f"{median['requests_per_s']:,.1f}",
            f"{median['output_tokens_per_s']:,.0f}",
            f"{median['wall_s']:,.1f}",
            f"{median['peak_mb']:,.0f}",
            f"{median['hit_share']:.1%}",
            f"{median['num_computed']:,.0f}",
        )
    console.print(runs)
    if report["ratios"]:
        console.print()
        console.print(_ratio_table(report["ratios"], style))
    for name, reason in report["skipped"].items():
        console.print(f"{name} was left out: {reason}.", highlight=False)


def _ratio_table(ratios: Sequence[Mapping[str, Any]], style: box.Box) -> Table:
    table = Table("what", "ours", "against", "min", "median", "max", "target", "", box=style)
    for column in table.columns[3:7]:
        column.justify = "right"
    for ratio in ratios:
        target = ratio["at_least"]
        table.add_row(
            TITLES[ratio["metric"]],
            ratio["ours"],
            ratio["against"] or "—",
            *(f"{ratio[value]:.2f}" for value in ("min", "median", "max")),
            "" if target is None else f"≥ {target:g}",
            {True: "reached", False: "missed", None: ""}[ratio["reached"]],
        )
    return table
