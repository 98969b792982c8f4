"""Whose turn it is: first in, first out, priority, and the loaded model within a bound."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from batch_app.core import Waiting
from batch_app.queue import choose

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def waiting(models: str, **changes: int) -> list[Waiting]:
    """One batch a letter, each for the model of that name, oldest first."""
    return [
        Waiting(f"{model}{place}", model, 100, place, priority=changes.get(f"p{place}", 0))
        for place, model in enumerate(models)
    ]


def run_all(models: str, *, bound_s: float, each_s: float) -> tuple[list[str], int]:
    """The order in which all these run, one after the other, and how often a model is loaded."""
    left = {batch.batch_id: batch for batch in waiting(models)}
    now, loaded, order, loads = NOW, None, [], 0
    while left:
        choice = choose(
            list(left.values()),
            loaded_model=loaded,
            now=now,
            bound_s=bound_s,
            run_s=lambda _: each_s,
        )
        assert choice
        for passed in choice.passed_over:
            if left[passed].passed_over_at is None:
                batch = left[passed]
                left[passed] = Waiting(
                    batch.batch_id, batch.model, 100, batch.place, 0, passed_over_at=now
                )
        batch = left.pop(choice.batch_id)
        loads += batch.model != loaded
        loaded = batch.model
        order.append(batch.batch_id)
        now += timedelta(seconds=each_s)
    return order, loads


def test_nothing_waits() -> None:
    assert choose([], loaded_model="a", now=NOW, bound_s=60) is None


def test_first_in_first_out_with_no_model_loaded() -> None:
    choice = choose(waiting("aba"), loaded_model=None, now=NOW, bound_s=60)
    assert choice
    assert choice.batch_id == "a0"


def test_alternating_models_of_equal_age_cost_two_loads() -> None:
    order, loads = run_all("abab", bound_s=600, each_s=10)
    assert order == ["a0", "a2", "b1", "b3"]
    assert loads == 2


def test_a_bound_of_zero_is_plain_first_in_first_out() -> None:
    order, loads = run_all("abab", bound_s=0, each_s=10)
    assert order == ["a0", "b1", "a2", "b3"]
    assert loads == 4


@given(models=st.text("ab", min_size=2, max_size=30), bound_s=st.integers(0, 200))
def test_what_goes_before_an_older_batch_costs_it_no_more_than_the_bound(
    models: str, bound_s: int
) -> None:
    each_s = 10
    order, _ = run_all(models, bound_s=bound_s, each_s=each_s)
    assert len(order) == len(models)
    started = {batch_id: position * each_s for position, batch_id in enumerate(order)}
    for batch in waiting(models):
        went_before = [
            other
            for other in waiting(models)
            if other.place > batch.place and started[other.batch_id] < started[batch.batch_id]
        ]
        assert len(went_before) * each_s <= bound_s


def test_a_higher_priority_goes_first_whatever_is_loaded() -> None:
    choice = choose(waiting("aab", p2=5), loaded_model="a", now=NOW, bound_s=600)
    assert choice
    assert choice.batch_id == "b2"


def test_a_batch_too_long_for_the_bound_waits_for_its_turn() -> None:
    line = waiting("ba")
    allowed = choose(line, loaded_model="a", now=NOW, bound_s=60, run_s=lambda _: 50.0)
    too_long = choose(line, loaded_model="a", now=NOW, bound_s=60, run_s=lambda _: 70.0)
    assert allowed
    assert too_long
    assert (allowed.batch_id, allowed.passed_over) == ("a1", ("b0",))
    assert too_long.batch_id == "b0"
