"""The tokens that an answer's `usage` counts, whatever a server writes there."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.core import MAX_TOKENS, TokenCounts, token_count
from batch_app.engine.usage import read_answer


def usage(**fields: Any) -> bytes:
    return orjson.dumps({"usage": fields})


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        (usage(prompt_tokens=5, completion_tokens=7, total_tokens=12), TokenCounts(5, 7)),
        (usage(input_tokens=5, output_tokens=7), TokenCounts(5, 7)),
        (usage(prompt_tokens=5, completion_tokens=-35), TokenCounts(5, 0)),
        (usage(prompt_tokens=-1, completion_tokens=7), TokenCounts(0, 7)),
        (usage(prompt_tokens=2**32 - 1, completion_tokens=2**32), TokenCounts(*[MAX_TOKENS] * 2)),
        (
            b'{"usage":{"prompt_tokens":%d,"completion_tokens":1}}' % 2**70,
            TokenCounts(MAX_TOKENS, 1),
        ),
        (b'{"usage":{"prompt_tokens":%d,"completion_tokens":1}}' % -(2**70), TokenCounts(0, 1)),
        (usage(prompt_tokens="5", completion_tokens=7), TokenCounts(0, 7)),
        (usage(prompt_tokens=True, completion_tokens=7.0), TokenCounts(0, 7)),
        (usage(prompt_tokens=[5], completion_tokens={"a": 1}), TokenCounts()),
        (orjson.dumps({"usage": [5]}), TokenCounts()),
        (orjson.dumps({"usage": None}), TokenCounts()),
        (b"{}", TokenCounts()),
    ],
)
def test_each_count_is_taken_for_what_it_may_be(body: bytes, counts: TokenCounts) -> None:
    assert read_answer(body)[:2] == (counts, False)


def test_a_part_is_no_larger_than_the_whole() -> None:
    fields = {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 9},
        "completion_tokens_details": {"reasoning_tokens": 2**40},
    }
    assert read_answer(usage(**fields))[:2] == (TokenCounts(5, 7, 5, 7), True)


def test_details_in_another_form_tell_nothing() -> None:
    fields = {"prompt_tokens": 5, "prompt_tokens_details": 3, "completion_tokens_details": [1]}
    assert read_answer(usage(**fields))[:2] == (TokenCounts(5), False)


@given(st.integers() | st.floats() | st.text() | st.none() | st.lists(st.integers()))
def test_a_count_stays_within_what_the_results_log_can_hold(value: object) -> None:
    assert 0 <= token_count(value) <= MAX_TOKENS
