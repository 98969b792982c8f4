"""What an engine process sends: outcomes in messages of a size that the channel can carry."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batch_app.engine.base import Outcome
from batch_app.engine.child import _portions


@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 20))
def test_no_message_is_larger_than_it_may_be(sizes: list[int], most: int) -> None:
    outcomes = [Outcome(number, 200, b"x" * size) for number, size in enumerate(sizes)]
    portions = _portions(outcomes, most)
    assert [outcome for portion in portions for outcome in portion] == outcomes
    for portion in portions:
        assert len(portion) == 1 or sum(len(outcome.body) for outcome in portion) <= most
