"""Forecasts while a run goes on: what is in flight counts as longer, and the end comes near."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from batch_app.forecast.forecast import Forecaster
from batch_app.forecast.live import LiveForecast, Remaining
from batch_app.forecast.measurement import Limits, Reading, Setting
from batch_app.forecast.workload import RequestGroup, Workload
from tests.unit.test_forecast import HERE, measured

STEP_S = 0.05
NUM_SLOTS = 16


def followed(
    live: LiveForecast, lengths: list[int], every: int = 20
) -> list[tuple[float, int, Remaining | None]]:
    """Runs these on an engine of 16 slots; at each reading the time, the done and what is left."""
    running: list[tuple[int, int]] = []
    upcoming = list(enumerate(lengths))[::-1]
    seen: list[tuple[float, int, Remaining | None]] = []
    step = done = tokens = 0
    live.read(Reading(0.0, 0))
    while upcoming or running:
        while upcoming and len(running) < NUM_SLOTS:
            place, length = upcoming.pop()
            heapq.heappush(running, (step + length, place))
        step += 1
        tokens += len(running)
        while running and running[0][0] <= step:
            _, place = heapq.heappop(running)
            live.finish(place, lengths[place], 10, 0)
            done += 1
        if step % every == 0:
            live.read(Reading(step * STEP_S, len(running), len(upcoming), 10.0 * done, 0, tokens))
            seen.append((step * STEP_S, done, live.remaining()))
    live.read(Reading(step * STEP_S, 0, 0, 10.0 * done, 0, tokens))
    seen.append((step * STEP_S, done, live.remaining()))
    return seen


def workload_of(num: int, limit: float | None = 2000) -> Workload:
    return Workload((RequestGroup(num, max_tokens=limit, prompt_tokens=10.0 * num),))


def test_those_in_flight_are_the_long_ones() -> None:
    """At the start only short requests can have finished: no reason to expect a soon end."""
    random = np.random.default_rng(5)
    lengths = np.where(random.random(300) < 0.5, 10, 600).tolist()
    # It knows of runs whose answers had 10 tokens, all of them: the past misleads it.
    short = measured(output=10, limit=2000, seconds=3.0, prompt=10)
    live = LiveForecast(Forecaster(HERE, [short]), workload_of(300))
    seen = followed(live, lengths)
    end_s = seen[-1][0]
    # Of those that have finished by then, nine of ten were short.
    for at_s, done, left in seen:
        if 20 <= done <= 60:
            assert left is not None
            naive_s = at_s * (300 - done) / done
            assert left.remaining_s > 0.6 * (end_s - at_s), (at_s, done, naive_s)
            break
    else:
        pytest.fail("It was never looked at.")


def test_it_comes_near_the_end_and_stays_steady() -> None:
    random = np.random.default_rng(6)
    lengths = random.integers(20, 200, 600).tolist()
    live = LiveForecast(Forecaster(HERE, [measured(output=110, limit=2000)]), workload_of(600))
    seen = followed(live, lengths)
    end_s = seen[-1][0]
    assert seen[-1][2] == Remaining(0.0, 0.0, 0.0)
    half = [(at_s, left) for at_s, done, left in seen if left is not None and 300 <= done < 570]
    assert half
    ends = []
    for at_s, left in half:
        assert left.low_s <= left.remaining_s <= left.high_s
        assert at_s + left.remaining_s == pytest.approx(end_s, rel=0.06)
        ends.append(at_s + left.remaining_s)
    # From look to look the expected end hardly moves.
    assert np.abs(np.diff(ends)).max() < 0.02 * end_s


def test_near_the_end_the_range_says_that_chance_decides() -> None:
    """Of lengths that differ much, nobody knows the longest of the last few; of equal ones, all."""
    random = np.random.default_rng(8)
    widths = {}
    for name, lengths in (
        ("alike", [200] * 300),
        ("different", np.clip(random.exponential(200, 300), 5, 1900).astype(int).tolist()),
    ):
        known = measured(output=200, limit=2000, seconds=30.0, prompt=10)
        seen = followed(LiveForecast(Forecaster(HERE, [known]), workload_of(300)), lengths, 40)
        widths[name] = {
            done: left.high_s / left.low_s for _, done, left in seen if left and left.low_s
        }
    early = {name: widths[name][min(widths[name])] for name in widths}
    late = {name: max(w for done, w in widths[name].items() if done >= 285) for name in widths}
    assert late["different"] > 1.5 * early["different"]
    assert late["different"] > 1.5 * late["alike"]


def test_the_run_itself_is_enough() -> None:
    limits = Limits(max_num_seqs=NUM_SLOTS, kv_cache_tokens=100_000)
    knows_nothing = Forecaster(Setting("m"), [], limits=limits)
    live = LiveForecast(knows_nothing, workload_of(400))
    assert live.remaining() is None
    seen = followed(live, [100] * 400)
    end_s = seen[-1][0]
    for at_s, done, left in seen:
        if 200 <= done < 380:
            assert left is not None
            assert at_s + left.remaining_s == pytest.approx(end_s, rel=0.06)


def test_embeddings_have_no_tokens_to_count() -> None:
    group = RequestGroup(100, generates=False, prompt_tokens=10_000.0)
    live = LiveForecast(None, Workload((group,)))
    live.read(Reading(0.0, 0))
    for second in range(1, 11):
        for place in range(second * 5 - 5, second * 5):
            live.finish(place, 0, 100, 0)
        live.read(Reading(float(second), 4, 0, 500.0 * second))
    left = live.remaining()
    assert left is not None
    assert left.remaining_s == pytest.approx(10, rel=0.2)


def test_a_new_engine_begins_its_counters_anew() -> None:
    live = LiveForecast(None, workload_of(100))
    live.read(Reading(0.0, 0))
    live.read(Reading(1.0, 16, 0, 0, 0, 320))
    for place in range(10):
        live.finish(place, 20, 10, 0)
    live.read(Reading(2.0, 16, 0, 100, 0, 640))
    live.reset()
    live.read(Reading(9.0, 0))  # loading doesn't count
    live.read(Reading(10.0, 16, 0, 0, 0, 320))
    for place in range(10, 50):
        live.finish(place, 20, 10, 0)
    live.read(Reading(13.0, 16, 0, 400, 0, 1280))
    left = live.remaining()
    assert left is not None
    assert 1 < left.remaining_s < 12
    for place in (*range(100), *range(5)):
        live.finish(place, 20, 10, 0)
    assert live.remaining() == Remaining(0.0, 0.0, 0.0)


def test_groups_must_fit_the_requests() -> None:
    with pytest.raises(ValueError, match="3 requests"):
        LiveForecast(None, workload_of(3), np.zeros(2, np.int16))


def test_where_runs_are_off_each_other_the_range_is_wider() -> None:
    lengths = [100] * 400
    widths = {}
    for name, times in (("steady", (100, 100, 100, 100)), ("shared", (70, 140, 80, 130))):
        known = [
            measured(output=100, limit=2000, seconds=seconds, prompt=10, name=f"{name}-{number}")
            for number, seconds in enumerate(times)
        ]
        seen = followed(LiveForecast(Forecaster(HERE, known), workload_of(400)), lengths, 40)
        widths[name] = [
            left.high_s / left.low_s for _, done, left in seen if left and 100 < done < 300
        ]
    assert np.median(widths["shared"]) > 1.04 * np.median(widths["steady"])
