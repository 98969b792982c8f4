"""`kill -9` of our worker at 90%, and a second run of the same command: what ran twice?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peer.answers import read_answers
from benchmarks.peer.contenders import KILL_AT, Job, environment, ours_command
from benchmarks.peer.counted import Count
from benchmarks.peer.observe import RunFailed, end_tree, observe

LOOK_EVERY_S = 0.02
LONGEST_S = 3600.0


def measure(job: Job, *, window: int) -> dict[str, Any]:
    """Kill, go on, count. `window`: the requests that are in flight at most.

    `finished_twice` were computed to their end in both runs; `begun_twice` were handed to an
    engine in both.

    Raises RunFailed, WrongAnswers.
    """
    output = job.folder / "resumed.jsonl"
    counts = [job.folder / "first.count", job.folder / "second.count"]
    for path in counts:
        path.unlink(missing_ok=True)
    env = environment(benchmarks_dir=str(job.folder / "records" / "resumed"))
    job.hold.touch()
    try:
        killed_after_s = _run_and_kill(job, output, counts[0], env)
    finally:
        job.hold.unlink()
    command = _counted(job, output, counts[1])
    observed = observe(command, log=job.folder / "second.log", environment=env)
    read_answers(output, job.requests, exact=job.exact)
    first, second = (Count.read(path) for path in counts)
    begun_twice = len(first.handed & second.handed)
    return {
        "num_requests": len(job.requests),
        "window": window,
        "killed_after_s": round(killed_after_s, 2),
        "finished_before": len(first.finished),
        "handed_before": len(first.handed),
        "handed_after": len(second.handed),
        "finished_twice": len(first.finished & second.finished),
        "begun_twice": begun_twice,
        "second_wall_s": round(observed.wall_s, 2),
        "reached": begun_twice <= window,
    }


def _counted(job: Job, output: Path, count: Path) -> list[str]:
    ours = ours_command(job, job.input, output)
    return [sys.executable, "-m", "benchmarks.peer.counted", str(count), *ours[3:]]


def _run_and_kill(job: Job, output: Path, count: Path, env: dict[str, str]) -> float:
    started = time.perf_counter()
    enough = int(KILL_AT * len(job.requests))
    with (job.folder / "first.log").open("wb") as log:
        process = subprocess.Popen(
            _counted(job, output, count),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | env,
        )
        try:
            while not (count.exists() and len(Count.read(count).finished) >= enough):
                if process.poll() is not None:
                    raise RunFailed(f"It ended before it could be killed; see {log.name}.")
                if time.perf_counter() - started > LONGEST_S:
                    raise RunFailed("It did not come to 90%.")
                time.sleep(LOOK_EVERY_S)
            process.kill()  # the worker alone: its engine has to notice
            process.wait()
        finally:
            end_tree(process)
    return time.perf_counter() - started
