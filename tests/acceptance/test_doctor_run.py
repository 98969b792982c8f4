"""`vllm-batch doctor --run`: a line for each step, the report, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batch_app.cli import app
from batch_app.self_check import short
from batch_app.self_check.step import Step
from support import steps
from support.site import REPO

TESTS = Path(__file__).parents[1]
REGISTRY = """\
[[model]]
name = "demo"
source = "demo"
[model.engine_args]
max_model_len = 2048
enforce_eager = true

[[model]]
name = "sim"
source = "sim"
engine = "sim"
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_BATCH_PORT", "0")
    monkeypatch.setenv("VLLM_BATCH_MIN_FREE_BYTES", "0")
    present = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), present])))
    (tmp_path / "models.toml").write_text(REGISTRY)
    shutil.copytree(REPO / "models" / "demo", tmp_path / "demo")


def doctor(*words: str) -> Result:
    done = CliRunner().invoke(app, ["doctor", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done


def broken(name: str, **fields: float) -> Step:
    return Step(name, "a broken step", f"{steps.NAME}:{name}", **{"budget_s": 60.0, **fields})


def lines(done: Result) -> dict[str, str]:
    """The status of each step, by its name."""
    found = {}
    for line in done.stdout.splitlines():
        status, _, rest = line.partition(" ")
        if status in ("PASS", "FAIL", "SKIP"):
            found[rest.split()[0]] = status
    return found


@pytest.mark.long
@pytest.mark.engine
def test_the_demo_model_is_right_whatever_other_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(short.short_steps(num_requests=60))
    every = [replace(step, budget_s=10 * step.budget_s) for step in every]
    every[1:1] = [broken("fails"), broken("hangs", budget_s=5.0), broken("crashes")]
    monkeypatch.setattr(short, "BUDGET_S", 6000.0)
    monkeypatch.setattr(short, "short_steps", lambda: tuple(every))
    done = doctor("--run")
    assert lines(done) == {
        "device": "PASS",
        "fails": "FAIL",
        "hangs": "FAIL",
        "crashes": "FAIL",
        "before-fork": "PASS",
        "compute": "PASS",
        "answers": "PASS",
    }, done.output
    assert done.exit_code == 11
    assert "60 requests right" in done.stdout
    assert "counters equal usage" in done.stdout
    assert "    its last words" in done.stdout
    assert "Run: 4 passed, 3 failed, 0 skipped in " in done.stderr


def test_a_model_of_another_engine_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    (answers,) = (step for step in short.short_steps() if step.name == "answers")
    monkeypatch.setattr(short, "short_steps", lambda: (answers,))
    done = doctor("--run", "--load", "sim", "--json")
    [step] = json.loads(done.stdout)["run"]["steps"]
    assert [step["status"], step["out_of_budget"]] == ["skip", False]
    assert step["message"] == "the model sim runs on the engine sim, not on vLLM"


def test_without_a_model_it_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.toml").write_text("")
    (answers,) = (step for step in short.short_steps() if step.name == "answers")
    monkeypatch.setattr(short, "short_steps", lambda: (answers,))
    assert "SKIP           answers" in doctor("--run").stdout
    assert "name one with --load" in doctor("--run").stdout


def test_the_exit_code_and_the_report_tell_of_a_failed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(short, "short_steps", lambda: (broken("is_skipped"),))
    before = doctor("--json").exit_code
    skipped = doctor("--run", "--json")
    assert skipped.exit_code == before
    monkeypatch.setattr(short, "short_steps", lambda: (broken("fails"),))
    failed = doctor("--run", "--json")
    assert failed.exit_code == 11
    report = json.loads(failed.stdout)
    assert report["status"] == "fail"
    assert report["run"]["is_finished"]
    [step] = report["run"]["steps"]
    assert [step["name"], step["status"]] == ["fails", "fail"]
    assert "its last words" in step["log_tail"]


def test_the_end_of_the_budget_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    every = (broken("hangs"), broken("passes", least_s=50.0))
    monkeypatch.setattr(short, "BUDGET_S", 3.0)
    monkeypatch.setattr(short, "short_steps", lambda: every)
    done = doctor("--run")
    assert [line[:13] for line in done.stdout.splitlines() if "(budget)" in line] == 2 * [
        "SKIP (budget)"
    ]
