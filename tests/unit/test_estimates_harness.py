"""The accuracy harness: its hidden machines lose nothing, and a whole trial holds together."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.estimates.figures import figures
from benchmarks.estimates.hidden import MACHINES, Job, Run
from benchmarks.estimates.shapes import SHAPES, Traces
from benchmarks.estimates.trial import measured, tried

STAND_IN = Traces.load(None)


@pytest.mark.parametrize("name", MACHINES)
def test_a_hidden_machine_answers_everything_once(name: str) -> None:
    random = np.random.default_rng(4)
    prompt, output = random.integers(5, 3000, 300), random.integers(0, 600, 300)
    run = Run(MACHINES[name], Job(prompt, output, prompt // 4), seed=4)
    finished: list[int] = []
    last_s = 0.0
    for moment in run.moments():
        assert moment.at_s >= last_s
        last_s = moment.at_s
        finished += moment.finished
    assert sorted(finished) == list(range(300))
    assert moment.generation_tokens == output.sum()
    assert moment.prompt_tokens == prompt.sum()
    assert moment.num_running == moment.num_waiting == 0


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    job = Job(np.full(50, 100), np.full(50, 50), np.zeros(50, int))
    ends = [list(Run(MACHINES["cpu-small"], job, seed).moments())[-1].at_s for seed in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]


def test_every_shape_can_be_drawn() -> None:
    for shape in SHAPES:
        requests = STAND_IN.draw(shape.name, 200, np.random.default_rng(1))
        assert len(requests.prompt) == len(requests.output) == len(requests.limit) == 200
        assert requests.prompt.min() >= 1
        assert (requests.cacheable < requests.prompt).all()
        assert (requests.output <= requests.limit).all()


def test_a_trial_from_other_shapes() -> None:
    machine = MACHINES["consumer-4b"]
    random = np.random.default_rng(2)
    names = ("conversation", "label", "fixed-1000")
    benchmarks = [
        measured(machine, STAND_IN.draw(name, 300, random), name, place).measurement()
        for place, name in enumerate(names)
    ]
    requests = STAND_IN.draw("fixed-256", 400, random)
    trial = tried(machine, "fixed-256", requests, benchmarks, seed=9)
    assert trial.expected_output == trial.actual_output == 400 * 256
    assert trial.error < 0.25
    assert len(trial.lives) == 5
    half = trial.lives[2]
    assert half.expected_s == pytest.approx(half.actual_s, rel=0.15)
    # Nothing about these lengths has to be guessed.
    assert trial.informed_s == pytest.approx(trial.expected_s, rel=0.05)
    found = figures([trial.as_dict() | {"seed": 2}])
    assert found["before"] == {
        "num": 1,
        "median": round(trial.error, 4),
        "p90": round(trial.error, 4),
        "within": float(trial.is_within),
    }
    assert found["seeds"]["2"]["median"] == found["before"]["median"]
    assert found["live"]["0.5"]["left"]["median"] == pytest.approx(half.error, abs=1e-4)
