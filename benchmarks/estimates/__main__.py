"""Hold estimates against what came of them.

    python -m benchmarks.estimates --json OUT --folder F

F holds the published traces; without it, numbers with the same means are drawn. `--engine real`
takes the real engine on this machine instead of the hidden ones: six minutes, nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from batch_app.benchmarks import BenchmarkRecord
from batch_app.forecast.forecast import Forecaster
from batch_app.forecast.live import LiveForecast
from batch_app.forecast.measurement import Measurement, Reading, Setting
from batch_app.forecast.workload import RequestGroup, Workload
from benchmarks.estimates.figures import figures
from benchmarks.estimates.hidden import MACHINES
from benchmarks.estimates.shapes import SHAPES, Traces
from benchmarks.estimates.trial import measured, tried, workload_of
from benchmarks.peer.machine import commit, this_machine, versions

NUM_BENCHMARKS = 5
BENCH_SIZES, JOB_SIZES = (200, 2000), (300, 8000)
GUIDE = Path(__file__).parents[1] / "metadata" / "vllm-native-gemma3-4b-5000-2025-10-28.json"
MANY = 200_000


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="the report goes here")
    parser.add_argument("--folder", type=Path, help="with the published traces")
    parser.add_argument("--engine", choices=("hidden", "real"), default="hidden")
    parser.add_argument("--rounds", type=int, default=3, help="jobs a machine and shape")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[20260101], help="all is done for each of them"
    )
    args = parser.parse_args()
    report: dict[str, Any] = {
        "engine": args.engine,
        "command": f"python -m benchmarks.estimates {' '.join(_shown(sys.argv[1:]))}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": this_machine().as_dict(),
        "versions": versions(),
        "seeds": args.seeds,
    }
    traces = Traces.load(args.folder)
    report["sources"] = traces.sources
    if args.engine == "hidden":
        report["many"] = many_requests(traces)
        report["guide"] = the_guide()
    trials = [
        trial | {"seed": seed}
        for seed in args.seeds
        for trial in _trials(args.engine, traces, args.rounds, seed)
    ]
    report["figures"] = figures(trials)
    report["trials"] = [_rounded(trial) for trial in trials]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, ensure_ascii=False).replace('{"machine', '\n{"machine'))
    print(json.dumps(report["figures"], indent=2))
    return 0


def _trials(engine: str, traces: Traces, rounds: int, seed: int) -> list[dict[str, Any]]:
    if engine == "hidden":
        return hidden_trials(traces, rounds, seed)
    from benchmarks.estimates import real

    with tempfile.TemporaryDirectory(prefix="vllm-batch-estimates-") as folder:
        return real.trials(Path(folder) / "engine.log", traces, rounds, seed, print)


def hidden_trials(traces: Traces, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Every machine and shape: from five benchmarks of other shapes, chosen anew each time."""
    random = np.random.default_rng(seed)
    found = []
    for machine in MACHINES.values():
        records: dict[str, Measurement] = {}
        for shape in SHAPES:
            requests = traces.draw(shape.name, _size(random, BENCH_SIZES), random)
            record = measured(machine, requests, shape.name, int(random.integers(2**31)))
            records[shape.name] = record.measurement()
        for shape in SHAPES:
            others = [name for name in records if name != shape.name]
            for _ in range(rounds):
                chosen = random.choice(others, NUM_BENCHMARKS, replace=False).tolist()
                requests = traces.draw(shape.name, _size(random, JOB_SIZES), random)
                trial = tried(
                    machine,
                    shape.name,
                    requests,
                    [records[name] for name in chosen],
                    int(random.integers(2**31)),
                )
                found.append(trial.as_dict())
        print(f"{machine.name}: {len(found)} jobs so far", file=sys.stderr)
    return found


def many_requests(traces: Traces) -> dict[str, float]:
    """Seconds and peak megabytes of estimating many requests, their tokens counted already."""
    random = np.random.default_rng(1)
    machine = MACHINES["consumer-4b"]
    record = measured(machine, traces.draw("conversation", 1000, random), "one", 1).measurement()
    requests = traces.draw("conversation", MANY, random)

    def before() -> LiveForecast:
        forecaster = Forecaster(record.setting, [record])
        workload, group_of = workload_of(requests)
        forecaster.forecast(workload)
        return LiveForecast(forecaster, workload, group_of, requests.prompt)

    def under_way(live: LiveForecast) -> LiveForecast:
        done = MANY // 10
        live.read(Reading(0.0, 0))
        for place in range(done):
            live.finish(place, int(requests.output[place]), int(requests.prompt[place]))
        live.read(Reading(4000.0, 100, MANY, 2e7, 0.0, float(requests.output[:done].sum())))
        return live

    # Timed once and traced once: tracing makes everything several times slower.
    began_s = time.perf_counter()
    live = before()
    before_s = time.perf_counter() - began_s
    under_way(live)
    began_s = time.perf_counter()
    live.remaining()
    live_s = time.perf_counter() - began_s
    tracemalloc.start()
    live = before()
    before_mb = tracemalloc.get_traced_memory()[1] / 1e6
    under_way(live)
    tracemalloc.reset_peak()
    live.remaining()
    live_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return {
        "num_requests": MANY,
        "before_s": round(before_s, 2),
        "before_peak_mb": round(before_mb, 1),
        "live_s": round(live_s, 2),
        "live_peak_mb": round(live_mb, 1),
    }


def the_guide() -> list[dict[str, float]]:
    """The usage guide's table, from the benchmark that ships and nothing else."""
    record = BenchmarkRecord.model_validate_json(GUIDE.read_bytes())
    forecaster = Forecaster(Setting(record.model), [record.measurement()])
    mean = record.results.prompt_tokens / record.results.num_requests
    rows = []
    for num in (100, 5_000, 50_000, 200_000):
        forecast = forecaster.forecast(Workload((RequestGroup(num, prompt_tokens=mean * num),)))
        assert forecast is not None
        rows.append({"num_requests": num, "seconds": round(forecast.total_s, 1)})
    return rows


def _size(random: np.random.Generator, within: tuple[int, int]) -> int:
    return int(np.exp(random.uniform(*np.log(within))))


def _shown(arguments: Sequence[str]) -> list[str]:
    """The arguments without the paths of this machine."""
    return [Path(one).name if "/" in one else one for one in arguments]


def _rounded(trial: dict[str, Any]) -> dict[str, Any]:
    def shorter(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: shorter(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [shorter(part) for part in value]
        return value

    rounded: dict[str, Any] = shorter(trial)
    rounded["basis"] = [name.split("-hidden-")[-1] for name in trial["basis"]]
    return rounded


if __name__ == "__main__":
    sys.exit(main())
