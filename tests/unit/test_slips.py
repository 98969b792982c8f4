"""What somebody meant who wrote a field that there is not."""

from __future__ import annotations

import pytest

from batch_app.slips import meant_by

ALLOWED = ("messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("temprature", "temperature"),
        ("tempearture", "temperature"),
        ("Temperature", "temperature"),
        ("mesages", "messages"),
        ("massages", "messages"),
        ("stopp", "stop"),
        ("max_new_tokens", "max_tokens"),
        ("stop_sequences", "stop"),
        ("num_beams", None),
        ("best_of", None),
        ("k", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_a_slip_is_understood(typed: str, meant: str | None) -> None:
    assert meant_by(typed, ALLOWED) == meant


def test_what_others_call_it_is_said_only_where_ours_is_allowed() -> None:
    assert meant_by("max_new_tokens", ("prompt",)) is None
