"""Many trials, and a report of them.

    python -m faults.torture --trials 300 --seed 1 --report docs/reliability.json
    python -m faults.torture --database postgresql --report docs/reliability-postgresql.json
    python -m faults.torture --engine vllm --trials 30 --jobs 1 --report docs/reliability-vllm.json

Each crash point has its turn first, then chance has. A trial that fails says how to repeat it. When
it is interrupted, the report is of the trials so far, and `--resume` goes on after them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batch_app import __version__
from batch_app.faults import CRASH_POINTS
from faults.trial import Report, Trial
from support.postgres import PostgresServer, start_server

_one_at_a_time = threading.Lock()


class Servers:
    """Servers of PostgreSQL's, one for each trial that runs; none on SQLite."""

    def __init__(self, number: int) -> None:
        self._all = [start_server() for _ in range(number)]
        self._idle = list(self._all)

    @contextmanager
    def one(self) -> Iterator[PostgresServer | None]:
        if not self._all:
            yield None
            return
        server = self._idle.pop()
        try:
            yield server
        finally:
            self._idle.append(server)

    def close(self) -> None:
        for server in self._all:
            server.close()


def run_trial(
    servers: Servers, engine: str, seed: int, kind: str | None = None, what: str = ""
) -> Report:
    with (
        servers.one() as postgres,
        tempfile.TemporaryDirectory(prefix="trial-", ignore_cleanup_errors=True) as folder,
    ):
        with _one_at_a_time:  # migrations use global state
            trial = Trial(Path(folder), seed, kind, what, postgres, engine)
        return trial.run()


def plan(num_trials: int, seed: int, engine: str = "sim") -> list[tuple[int, str | None, str]]:
    """Seed, kind and crash point of each trial."""
    named: list[tuple[int, str | None, str]] = []
    if engine == "sim":
        named += [
            (seed * 100_000 + place, "crash point", name) for place, name in enumerate(CRASH_POINTS)
        ]
    others = range(seed * 100_000 + len(named), seed * 100_000 + num_trials)
    return [*named, *((number, None, "") for number in others)][:num_trials]


def summed_up(reports: Iterable[Report], seed: int, seconds: float) -> dict[str, Any]:
    reports = list(reports)
    hits = Counter(hit for report in reports for hit in report.hit)
    computed = [report for report in reports if report.computed and report.needed]
    return {
        "version": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "trials": len(reports),
        "seed": seed,
        "seconds": round(seconds),
        "requests": sum(report.requests for report in reports),
        "kinds": dict(sorted(Counter(report.kind for report in reports).items())),
        "crash_points": {name: hits.get(name, 0) for name in CRASH_POINTS},
        "killed": _with_prefix(hits, "killed: "),
        "outages": _with_prefix(hits, "outage: "),
        "failed_calls": _with_prefix(hits, "failed: "),
        "needed": sum(report.needed for report in computed),
        "computed": sum(report.computed for report in computed),
        "most_computed_again": max((r.computed - r.needed for r in computed), default=0),
        "failures": [asdict(report) for report in reports if report.failure],
    }


def added(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """One report of two: of the first trials of a seed, and of those that came after them."""
    both: dict[str, Any] = dict(later)
    for name in ("trials", "seconds", "requests", "needed", "computed"):
        both[name] = earlier[name] + later[name]
    for name in ("kinds", "crash_points", "killed", "outages", "failed_calls"):
        both[name] = {
            one: earlier[name].get(one, 0) + later[name].get(one, 0)
            for one in sorted(earlier[name].keys() | later[name].keys())
        }
    both["crash_points"] = {name: both["crash_points"][name] for name in CRASH_POINTS}
    both["most_computed_again"] = max(earlier["most_computed_again"], later["most_computed_again"])
    both["failures"] = [*earlier["failures"], *later["failures"]]
    return both


def _with_prefix(hits: Counter[str], prefix: str) -> dict[str, int]:
    found = {name.removeprefix(prefix): n for name, n in hits.items() if name.startswith(prefix)}
    return dict(sorted(found.items()))


def _tell(report: Report, number: int, num_trials: int) -> None:
    state = "FAILED" if report.failure else "ok"
    again = report.computed - report.needed if report.computed else 0
    print(
        f"{number:4} of {num_trials}  {state:6} seed {report.seed}  {report.kind}: "
        f"{report.what or ', '.join(report.hit)}  {report.requests} requests, "
        f"{max(again, 0)} computed again, {report.seconds:.1f} s",
        flush=True,
    )
    if report.failure:
        print(f"     repeat with --only {report.seed}: {report.failure}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--engine", choices=["sim", "vllm"], default="sim")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", type=int, help="repeat the trial with this seed")
    parser.add_argument("--resume", action="store_true", help="go on after those in the report")
    wish = parser.parse_args(arguments)
    trials = plan(wish.trials, wish.seed, wish.engine)
    if wish.only is not None:
        every = plan(100_000, wish.only // 100_000, wish.engine)
        trials = [trial for trial in every if trial[0] == wish.only]
    earlier: dict[str, Any] | None = None
    if wish.resume:
        if wish.report is None or wish.only is not None:
            parser.error("--resume goes with --report, and not with --only")
        if wish.report.exists():
            earlier = json.loads(wish.report.read_text(encoding="utf-8"))
            if (earlier["seed"], earlier["version"]) != (wish.seed, __version__):
                parser.error(f"the report is of seed {earlier['seed']}, {earlier['version']}")
            trials = trials[earlier["trials"] :]
    num_before = earlier["trials"] if earlier else 0
    began = time.monotonic()
    reports = []
    servers = Servers(wish.jobs if wish.database == "postgresql" else 0)
    pool = ThreadPoolExecutor(wish.jobs)
    try:
        for report in pool.map(lambda trial: run_trial(servers, wish.engine, *trial), trials):
            reports.append(report)
            _tell(report, num_before + len(reports), num_before + len(trials))
    except KeyboardInterrupt:
        print("Interrupted: the trials under way still finish, the others are left out.")
    finally:
        pool.shutdown(cancel_futures=True)
        servers.close()
    result = summed_up(reports, wish.seed, time.monotonic() - began)
    if earlier is not None:
        result = added(earlier, result)
    if wish.report:
        wish.report.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "failures"}, indent=1))
    print(f"{len(result['failures'])} of {result['trials']} trials failed.")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
