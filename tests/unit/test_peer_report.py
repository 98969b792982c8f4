"""The benchmark's figures: spreads, ratios, checks of answers, tables, the page made of reports."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.peer import markdown
from benchmarks.peer.answers import Answer, WrongAnswers, hit_share, read_answers, share_equal
from benchmarks.peer.comparison import Comparison
from benchmarks.peer.contenders import Run, engine_arguments
from benchmarks.peer.counted import Count
from benchmarks.peer.machine import Machine, this_machine
from benchmarks.peer.plot import plot
from benchmarks.peer.report import Spread, print_report, ratios, spreads
from benchmarks.peer.workloads import WORKLOADS, Limits, line

CPU = Machine("A CPU", 2, 24.0, None, None, "float32", "6.1", "3.11.7")
GPU = Machine("A CPU", 16, 128.0, "A GPU", 80.0, "bfloat16", "6.1", "3.11.7")


def a_run(contender: str, requests_per_s: float, wall_s: float = 10.0, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "contender": contender,
        "engine_s": 3000 / requests_per_s,
        "wall_s": wall_s,
        "peak_mb": 1000.0,
        "num_requests": 3000,
        "num_computed": 3000,
        "prompt_tokens": 270_000,
        "output_tokens": 96_000,
        "hit_share": 0.5,
        "requests_per_s": requests_per_s,
        "output_tokens_per_s": 32 * requests_per_s,
        "answers": {},
    }
    return Run(**(values | changes))


ROUNDS = [
    {"ours": a_run("ours", 300, 10), "run_batch": a_run("run_batch", 200, 30, peak_mb=3000.0)},
    {"ours": a_run("ours", 330, 11), "run_batch": a_run("run_batch", 200, 22)},
    {"ours": a_run("ours", 280, 12), "run_batch": a_run("run_batch", 200, 18)},
]


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(1.0, 3.0, 10.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.0, 1.5, 2.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_ratios_are_taken_round_by_round_and_more_is_better() -> None:
    found = {
        (ratio.metric, ratio.against): ratio for ratio in ratios(ROUNDS, WORKLOADS["unique"], None)
    }
    steady, wall = found["requests_per_s", "run_batch"], found["wall_s", "run_batch"]
    assert steady.spread == Spread(1.4, 1.5, 1.65)
    assert (steady.at_least, steady.reached) == (1.45, True)
    assert wall.spread == Spread(1.5, 2.0, 3.0)
    assert wall.reached is True
    assert found["peak_mb", "run_batch"].spread.max == 3.0
    assert found["peak_mb", "run_batch"].reached is None
    assert ("requests_per_s", "llm_chat") not in found  # it took no part


def test_a_missed_target_is_told() -> None:
    rounds = [{"ours": a_run("ours", 200), "run_batch": a_run("run_batch", 200)}]
    assert ratios(rounds, WORKLOADS["unique"], None)[0].reached is False


def test_hits_are_held_against_the_infinite_cache() -> None:
    rounds = [runs | {"ours-no-duplicates": a_run("ours-no-duplicates", 300)} for runs in ROUNDS]
    [ratio, *_] = ratios(rounds, WORKLOADS["mooncake"], 0.625)
    assert (ratio.metric, ratio.spread.median, ratio.reached) == (
        "hit_share_of_infinite",
        0.8,
        False,
    )


def a_report() -> dict[str, Any]:
    return {
        "workload": "unique",
        "about": "nothing in common",
        "command": "python -m benchmarks.peer --workload unique",
        "machine": CPU.as_dict(),
        "versions": {"vllm": "0.32.0"},
        "contenders": spreads(ROUNDS),
        "ratios": [ratio.as_dict() for ratio in ratios(ROUNDS, WORKLOADS["unique"], None)],
        "skipped": {"llm_chat": "it has no sim engine"},
        "equal_answers": {"ours": 1.0, "run_batch": 0.998},
        "rounds": [{name: run.as_dict() for name, run in runs.items()} for runs in ROUNDS],
        "problems": [],
        "infinite_hit_share": None,
    }


def test_tables_are_plain_off_a_terminal() -> None:
    out = io.StringIO()
    print_report(json.loads(json.dumps(a_report())), Console(file=out, width=120))
    said = out.getvalue()
    assert "\x1b" not in said
    row = next(row for row in said.splitlines() if "steady" in row and "run_batch" in row)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    expected = ["steady", "ours", "run_batch", "1.40", "1.50", "1.65", "≥ 1.45", "reached"]
    assert cells == expected
    assert "llm_chat was left out: it has no sim engine." in said


def test_the_page_is_made_of_the_reports(tmp_path: Path) -> None:
    (tmp_path / "unique.json").write_text(json.dumps(a_report()))
    section = markdown.render(markdown.load_reports(tmp_path))
    assert "2 cores of A CPU, 24 GiB, no GPU" in section
    wanted = "| unique | steady against run_batch | ≥ 1.45 | 1.40 | **1.50** | 1.65 | yes |"
    assert wanted in section
    assert "| ours | 300.0 (280.0–330.0) | 9,600 | 11.0 | 1,000 | 50.0% | 3,000 |" in section
    assert "at least 99.8% of the answers" in section
    assert "![unique]" not in section
    pytest.importorskip("matplotlib")
    plot(a_report(), tmp_path / "unique.svg")
    assert "<svg" in (tmp_path / "unique.svg").read_text()
    section = markdown.render(markdown.load_reports(tmp_path))
    assert "![unique](" in section
    page = f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n"
    made = markdown.page_with(section, page)
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "old" not in made
    assert markdown.page_with(section, made) == made


def test_the_page_tells_memory_and_what_ran_twice(tmp_path: Path) -> None:
    base = {name: a_report()[name] for name in ("about", "command", "machine", "versions")}
    million = {"num_requests": 1_000_000, "api_peak_mb": 120.4, "worker_peak_mb": 512.0}
    resume = {"num_requests": 3000, "window": 1024, "begun_twice": 300, "reached": True}
    for report in (
        base | {"workload": "million", "figures": million},
        base | {"workload": "resume", "resume": [resume]},
    ):
        (tmp_path / f"{report['workload']}.json").write_text(json.dumps(report))
    section = markdown.render(markdown.load_reports(tmp_path))
    assert "| resume | begun twice, of 3,000 | ≤ 1,024 | | **300** | | yes |" in section
    assert "| million, 1,000,000 | API server, peak MB | < 400 | | **120** | | yes |" in section
    assert "| million, 1,000,000 | worker, peak MB | < 400 | | **512** | | no |" in section


def write_answers(path: Path, *answers: tuple[str, int, int]) -> None:
    with path.open("w") as file:
        for custom_id, completion_tokens, status in answers:
            usage = {
                "prompt_tokens": 10,
                "completion_tokens": completion_tokens,
                "prompt_tokens_details": {"cached_tokens": 4},
            }
            body = {"choices": [{"message": {"content": "hi"}}], "usage": usage}
            response = {"status_code": status, "body": body}
            file.write(json.dumps({"custom_id": custom_id, "response": response}) + "\n")


REQUESTS = [line(number, "say", 4) for number in range(2)]


def test_all_answers_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_answers(path, ("r1", 4, 200), ("r0", 4, 200))
    answers = read_answers(path, REQUESTS)
    assert answers["r0"] == Answer("hi", 10, 4, 4)
    assert hit_share(answers) == 0.4


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([("r0", 4, 200)], "r1 was not answered"),
        ([("r0", 4, 200), ("r0", 4, 200), ("r1", 4, 200)], "twice"),
        ([("r0", 4, 200), ("r1", 3, 200)], "3 tokens, not 4"),
        ([("r0", 4, 200), ("r1", 4, 500)], "r1 failed"),
        ([("r0", 4, 200), ("r1", 4, 200), ("r2", 4, 200)], "3 answers to 2"),
    ],
)
def test_what_is_wrong_with_answers_is_found(
    tmp_path: Path, answers: list[tuple[str, int, int]], problem: str
) -> None:
    write_answers(tmp_path / "out.jsonl", *answers)
    with pytest.raises(WrongAnswers, match=problem):
        read_answers(tmp_path / "out.jsonl", REQUESTS)


def test_answers_are_compared() -> None:
    ours = {"r0": Answer("a", 5, 1, 0), "r1": Answer("b", 5, 1, 0)}
    assert share_equal(ours, ours) == 1.0
    assert share_equal(ours, ours | {"r1": Answer("c", 5, 1, 4)}) == 0.5
    with pytest.raises(WrongAnswers, match="token counts"):
        share_equal(ours, ours | {"r1": Answer("b", 6, 1, 0)})


def test_a_comparison_holds_all_against_the_first_run() -> None:
    comparison = Comparison(WORKLOADS["unique"], CPU)
    said = {f"r{n}": Answer("a", 5, 1, 0) for n in range(100)}
    other = said | {"r7": Answer("b", 5, 1, 0)}
    comparison.check(a_run("ours", 300, answers=dict(said)))
    comparison.check(a_run("run_batch", 200, answers=dict(other)))
    comparison.check(a_run("ours", 300, answers=dict(other)))
    assert comparison.report()["equal_answers"] == {"ours": 0.99, "run_batch": 0.99}
    assert comparison.problems() == []
    wrong = {f"r{n}": Answer("b", 5, 1, 0) for n in range(100)}
    comparison.check(a_run("llm_chat", 200, answers=wrong))
    assert comparison.problems() == [
        "llm_chat gave other answers than the first run to 100.0% of the requests"
    ]


def test_all_get_the_same_limits() -> None:
    arguments = engine_arguments(Limits(1024, kv_cache_tokens=25_600), CPU)
    assert arguments == {
        "max_model_len": 1024,
        "max_num_seqs": 512,
        "max_num_batched_tokens": 8192,
        "dtype": "float32",
        "enforce_eager": True,
        "num_gpu_blocks_override": 201,  # of 128 tokens, and vLLM's own empty one
    }
    on_gpu = engine_arguments(Limits(4096, max_num_seqs=64), GPU, load_format="dummy")
    assert (on_gpu["max_num_seqs"], on_gpu["max_num_batched_tokens"]) == (64, 16384)
    assert on_gpu["load_format"] == "dummy"
    assert "enforce_eager" not in on_gpu


def test_a_count_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("> 0 1 2\n< 1\n> 3\n< 2 0")
    count = Count.read(path)
    assert count == Count(handed={0, 1, 2, 3}, finished={1})


def test_this_machine_is_known() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.num_cores >= 1
    assert machine.dtype in ("float32", "bfloat16")
