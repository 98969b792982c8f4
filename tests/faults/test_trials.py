"""A few trials of the kind that `make torture` makes by the hundred."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from batch_app.faults import CRASH_POINTS
from faults import torture
from faults.trial import Report, Trial
from support.postgres import PostgresServer

SOURCES = Path(__file__).parents[2] / "batch_app"


@pytest.mark.parametrize(
    ("seed", "kind", "what"),
    [
        (11, "kill", ""),
        (12, "crash point", "results-written"),
        pytest.param(13, "crash point", "published", marks=pytest.mark.long),
        pytest.param(14, "crash point", "upload-moved", marks=pytest.mark.long),
        (15, "failing call", ""),
        pytest.param(16, "failing call", "", marks=pytest.mark.long),
        pytest.param(17, "registry", "", marks=pytest.mark.long),
        pytest.param(18, "hub", "", marks=pytest.mark.long),
        pytest.param(19, "remote server", "", marks=pytest.mark.long),
    ],
)
def test_nothing_is_lost_or_doubled(tmp_path: Path, seed: int, kind: str, what: str) -> None:
    report = Trial(tmp_path, seed, kind, what).run()
    assert report.failure is None, report
    if kind == "crash point":
        assert report.requests


@pytest.mark.parametrize(
    ("seed", "kind", "what"),
    [
        (93, "several", ""),
        (22, "database", ""),
        (26, "failing call", "commit answer"),
    ],
)
def test_nothing_is_lost_or_doubled_on_postgresql(
    tmp_path: Path, postgres: PostgresServer, seed: int, kind: str, what: str
) -> None:
    report = Trial(tmp_path, seed, kind, what, postgres).run()
    assert report.failure is None, report
    assert report.requests


def test_each_crash_point_stands_in_the_code_once() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    found = Counter(re.findall(r'crash_point\("([\w-]+)"\)', code))
    assert found == Counter(CRASH_POINTS)


def test_an_interrupted_report_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def run_trial(
        _servers: object, _engine: str, seed: int, kind: str | None = None, what: str = ""
    ) -> Report:
        ran.append(seed)
        hit = what or "killed: worker"
        failure = "lost" if seed % 4 == 0 else None
        return Report(seed, kind or "kill", what, [hit], 10, 10, 10 + seed % 3, 1.0, failure)

    def tell(_report: Report, number: int, num_trials: int) -> None:
        assert num_trials == 24
        if number == 6 and 300_000 in ran:
            raise KeyboardInterrupt

    monkeypatch.setattr(torture, "run_trial", run_trial)
    monkeypatch.setattr(torture, "_tell", tell)
    path, plan = tmp_path / "report.json", torture.plan(24, 3)
    flags = ["--trials", "24", "--seed", "3", "--jobs", "1", "--report", str(path)]
    torture.main([*flags, "--resume"])
    assert json.loads(path.read_text())["trials"] == 6
    ran.clear()
    torture.main([*flags, "--resume"])
    assert ran == [seed for seed, _, _ in plan[6:]]
    whole = json.loads(path.read_text())
    assert whole == torture.summed_up(
        [run_trial(None, "sim", *one) for one in plan], 3, whole["seconds"]
    )
    ran.clear()
    assert torture.main([*flags, "--resume"]) == 1  # some had failed; nothing is left to do
    assert not ran
    with pytest.raises(SystemExit):
        torture.main(["--seed", "4", "--report", str(path), "--resume"])
