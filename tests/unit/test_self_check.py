"""The machinery of a self-check: nothing that a step does stops the others, and all is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from batch_app.engine.base import Outcome
from batch_app.self_check import short
from batch_app.self_check.answers import check
from batch_app.self_check.process import call
from batch_app.self_check.questions import Kind, Question, questions
from batch_app.self_check.report import Report
from batch_app.self_check.runner import run_steps
from batch_app.self_check.step import Status, Step, StepFailed, StepResult
from support import steps
from support.waiting import PATIENCE_S, wait_for

TESTS = Path(__file__).parents[1]
HANG_S = 5.0


@pytest.fixture(autouse=True)
def _targets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    present = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), present])))


def step(function: Callable[..., str], **fields: Any) -> Step:
    values = {"budget_s": PATIENCE_S, "least_s": 0.0, **fields}
    return Step(function.__name__, "a test", f"{steps.NAME}:{function.__name__}", **values)


def run(tmp_path: Path, *chosen: Step, budget_s: float = 10 * PATIENCE_S) -> list[StepResult]:
    found = run_steps(chosen, {"seen": 7}, budget_s=budget_s, folder=tmp_path)
    return list(found)


def test_nothing_that_a_step_does_stops_the_others(tmp_path: Path) -> None:
    every = [
        step(steps.fails),
        step(steps.hangs, budget_s=HANG_S),
        step(steps.crashes),
        step(steps.raises),
        step(steps.lacks_a_package),
        step(steps.is_skipped),
        step(steps.passes),
    ]
    failed, hung, crashed, raised, lacking, skipped, passed = run(tmp_path, *every)
    assert [failed.status, failed.message] == ["fail", "three answers are wrong"]
    assert failed.figures == {"half": 1}
    assert "its last words" in failed.log_tail
    assert hung.status is Status.FAIL
    assert hung.message == "did not end within 5 s and was killed"
    assert any("in hangs" in line for line in hung.log_tail), "where it hung"
    child = hung.figures["child"]
    wait_for(lambda: not psutil.pid_exists(child), what="its child is killed, too")
    assert [crashed.status, crashed.figures] == ["fail", {"half": 1}]
    assert crashed.message == "its process ended (killed by SIGSEGV)"
    assert [raised.status, raised.message] == ["fail", "RuntimeError: of its own"]
    assert lacking.message == "the Python package 'no_such_package_anywhere' is missing"
    assert [skipped.status, skipped.message] == ["skip", "there is no model"]
    assert not skipped.out_of_budget
    assert skipped.log_tail == ()
    assert [passed.status, passed.message] == ["pass", "all of it"]
    assert passed.figures["seen"] == 7
    assert passed.figures["before"]["fails"] == {"half": 1}


def test_the_end_of_the_budget_cuts_a_step_off_and_skips_the_rest(tmp_path: Path) -> None:
    cut, skipped = run(
        tmp_path, step(steps.hangs), step(steps.passes, least_s=PATIENCE_S), budget_s=HANG_S
    )
    assert cut.status is skipped.status is Status.SKIP
    assert cut.out_of_budget
    assert skipped.out_of_budget
    assert "child" in cut.figures
    assert cut.line.startswith("SKIP (budget)  hangs ")
    assert skipped.line.startswith("SKIP (budget)  passes ")


def test_lines_say_what_came_of_a_step() -> None:
    line = StepResult("fork", Status.PASS, 12.34, "computes").line
    assert line == "PASS           fork               12.3 s  computes"
    assert StepResult("fork", Status.FAIL, 1, "").line == "FAIL           fork                1.0 s"


def test_a_report_is_written_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "r.json"
    report = Report({"model": "demo"}, path)
    report.add(StepResult("one", Status.PASS, 1.0, "", {"x": 1}))
    half = json.loads(path.read_text())
    assert [half["model"], half["is_finished"], len(half["steps"])] == ["demo", False, 1]
    assert half["steps"][0]["figures"] == {"x": 1}
    assert not report.has_failed
    report.add(StepResult("two", Status.FAIL, 1.0, "why"))
    report.finish()
    whole = json.loads(path.read_text())
    assert whole["is_finished"]
    assert whole["summary"].startswith("1 passed, 1 failed, 0 skipped in ")
    assert report.has_failed


def test_a_process_of_a_step_that_fails_fails_the_step(tmp_path: Path) -> None:
    options = {"seen": 1, "before": {}}

    def ask(function: Callable[..., str], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        target = f"{steps.NAME}:{function.__name__}"
        return call(target, options, timeout_s=timeout_s, folder=tmp_path, name="llm")

    assert ask(steps.passes)["seen"] == 1
    with pytest.raises(StepFailed, match="llm: three answers are wrong"):
        ask(steps.fails)
    with pytest.raises(StepFailed, match="llm: killed by SIGSEGV"):
        ask(steps.crashes)
    with pytest.raises(StepFailed, match="llm did not end within 1 s"):
        ask(steps.hangs, 1.0)


def test_the_same_seed_asks_the_same() -> None:
    one, other = questions(100, 3, first=50), questions(100, 3, first=50)
    assert one == other != questions(100, 4, first=50)
    assert [question.number for question in one] == list(range(50, 150))
    twins = [question for question in one if question.twin is not None]
    assert len(twins) == 10
    by_number = {question.number: question for question in one}
    for question in twins:
        assert question.twin is not None
        twin = by_number[question.twin]
        assert (question.prompt, question.fields) == (twin.prompt, twin.fields)


def answer(question: Question, *texts: str, tokens: int = 5, **changes: Any) -> Outcome:
    body = {
        "choices": [
            {"index": number, "message": {"content": text}} for number, text in enumerate(texts)
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": tokens},
    }
    values = {"status_code": 200, "prompt_tokens": 9, "completion_tokens": tokens, **changes}
    return Outcome(question.number, body=json.dumps(body).encode(), **values)


def question_of(kind: Kind) -> Question:
    return next(one for one in questions(10, 1) if one.kind is kind)


def wrong(kind: Kind, *texts: str, tokens: int = 5, **changes: Any) -> list[str]:
    question = question_of(kind)
    outcome = answer(question, *texts, tokens=tokens, **changes)
    return check([question], {question.number: outcome}, is_demo=False).wrong


def test_right_answers_pass() -> None:
    assert wrong(Kind.GREEDY, "85") == []
    assert wrong(Kind.CHOICES, "85", "86") == []
    assert wrong(Kind.LENGTH, "85", tokens=24) == []
    assert wrong(Kind.SCHEMA, '{"sum":85}') == []
    assert wrong(Kind.STOP, "") == []


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (wrong(Kind.GREEDY, "85", status_code=500), "status 500"),
        (wrong(Kind.GREEDY, "85", completion_tokens=4), "usage"),
        (wrong(Kind.GREEDY, "85", tokens=17), "of at most 16"),
        (wrong(Kind.GREEDY, "85", "85"), "2 choices"),
        (wrong(Kind.CHOICES, "85"), "1 choices"),
        (wrong(Kind.LENGTH, "85", tokens=23), "not 24"),
        (wrong(Kind.SCHEMA, '{"sum":86}'), "schema"),
        (wrong(Kind.SCHEMA, '{"sum":85'), "not JSON"),
        (wrong(Kind.STOP, str(question_of(Kind.STOP).total)), "stop string"),
    ],
)
def test_wrong_answers_are_found(found: list[str], why: str) -> None:
    [message] = found
    assert why in message


def test_an_answer_that_is_missing_is_found() -> None:
    question = question_of(Kind.GREEDY)
    [message] = check([question], {}, is_demo=False).wrong
    assert message == f"greedy request {question.number}: was not answered"


def test_shares_are_of_what_may_differ() -> None:
    seeded = [one for one in questions(10, 1) if one.kind is Kind.SEEDED]
    outcomes = {one.number: answer(one, f"text {place}") for place, one in enumerate(seeded)}
    verdicts = check(seeded, outcomes, is_demo=True)
    assert verdicts.wrong == []
    assert verdicts.share("same seed") == 0.0
    greedy = question_of(Kind.GREEDY)
    right = check([greedy], {greedy.number: answer(greedy, f" {greedy.total}")}, is_demo=True)
    verdicts.add(right)
    assert verdicts.share("sums") == 1.0
    assert (verdicts.prompt_tokens, verdicts.completion_tokens) == (27, 15)
    assert verdicts.figures()["shares"] == {"same seed": 0.0, "sums": 1.0}


def test_every_step_names_a_function_that_exists() -> None:
    import importlib

    from benchmarks.gpu.steps import steps as all_steps

    for on_gpu in (True, False):
        for one in (*short.short_steps(), *all_steps(full=True, on_gpu=on_gpu)):
            module, _, function = one.target.partition(":")
            assert callable(getattr(importlib.import_module(module), function)), one.name
            assert one.least_s < one.budget_s
