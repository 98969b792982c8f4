"""One workload's rounds: who took part, whether all answered the same, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peer.answers import LEAST_EQUAL, share_equal
from benchmarks.peer.contenders import Run
from benchmarks.peer.machine import Machine
from benchmarks.peer.report import ratios, spreads
from benchmarks.peer.workloads import Workload


@dataclass
class Comparison:
    """Collects runs. The first of them is what the others' answers are held against."""

    workload: Workload
    machine: Machine
    infinite_share: float | None = None
    rounds: list[dict[str, Run]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    equal: dict[str, float] = field(default_factory=dict)
    _reference: Run | None = None

    def check(self, run: Run) -> None:
        """Note how many answers are those of the first run. Raises WrongAnswers."""
        self._reference = self._reference or run
        same = share_equal(run.answers, self._reference.answers)
        self.equal[run.contender] = min(self.equal.get(run.contender, 1.0), round(same, 4))
        if run is not self._reference:
            run.answers.clear()  # thousands of texts, not needed any more

    def problems(self) -> list[str]:
        """Who answered too much otherwise, in words."""
        least = LEAST_EQUAL.get(self.machine.dtype, 0.0)
        return [
            f"{name} gave other answers than the first run to {1 - share:.1%} of the requests"
            for name, share in self.equal.items()
            if share < least
        ]

    def report(self) -> dict[str, Any]:
        found = ratios(self.rounds, self.workload, self.infinite_share)
        return {
            "contenders": spreads(self.rounds),
            "ratios": [ratio.as_dict() for ratio in found],
            "infinite_hit_share": self.infinite_share,
            "equal_answers": dict(self.equal),
            "skipped": dict(self.skipped),
            "problems": self.problems(),
            "rounds": [{name: run.as_dict() for name, run in runs.items()} for runs in self.rounds],
        }
