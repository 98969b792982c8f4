"""The benchmark as a person runs it, on the simulated engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.site import REPO

pytestmark = pytest.mark.long


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peer", "--engine", "sim", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_workload_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "reports" / "unique.json"
    arguments = ("--workload", "unique", "--requests", "20", "--runs", "1", "--json", str(out))
    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["workload"] == "unique"
    assert report["parameters"]["num_requests"] == 20
    [runs] = report["rounds"]
    assert runs["ours"]["num_computed"] == 20
    assert runs["ours"]["output_tokens"] == 20 * 32
    assert 0 < runs["ours"]["engine_s"] < runs["ours"]["wall_s"]
    assert runs["ours"]["peak_mb"] > 20
    assert report["contenders"]["ours"]["wall_s"]["median"] == runs["ours"]["wall_s"]
    assert set(report["skipped"]) == {"run_batch", "run_batch-same-limits", "llm_chat"}
    assert report["versions"]["vllm-batch-server"]
    assert str(tmp_path) not in out.read_text()


def test_settings_of_ours_reach_the_run(tmp_path: Path) -> None:
    out = tmp_path / "duplicates.json"
    arguments = ("--workload", "duplicates", "--requests", "20", "--runs", "1")
    done = run(tmp_path, *arguments, "--contender", "ours,ours-no-duplicates", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["skipped"] == {}
    [runs] = report["rounds"]
    assert {name: figures["num_computed"] for name, figures in runs.items()} == {
        "ours": 10,
        "ours-no-duplicates": 20,
    }
    assert report["equal_answers"] == {"ours": 1.0, "ours-no-duplicates": 1.0}


def test_kill_and_resume_computes_at_most_a_window_twice(tmp_path: Path) -> None:
    out = tmp_path / "resume.json"
    arguments = ("--workload", "resume", "--runs", "1", "--requests", "500")
    arguments += ("--max-num-seqs", "8")
    done = run(tmp_path, *arguments, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    [resumed] = json.loads(out.read_text())["resume"]
    assert resumed["window"] == 16
    assert 450 <= resumed["finished_before"] < 500
    # All were handed over, and none was forgotten.
    assert resumed["handed_before"] + resumed["handed_after"] >= 500
    assert 0 < resumed["handed_after"] < 250
    assert resumed["finished_twice"] <= resumed["begun_twice"]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--workload", "nonsense")
    assert done.returncode == 2
    assert "shared-prefix" in done.stderr
    done = run(tmp_path, "--list")
    assert "run_batch-same-limits" in done.stdout
