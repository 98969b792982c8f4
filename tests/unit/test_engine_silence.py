"""How long an engine may be silent: slow steps are no hang, and a real one is still found."""

from __future__ import annotations

import pytest

from batch_app.engine.host import silence_allowed_s


@pytest.mark.parametrize(
    ("tokens", "computing_s", "expected_s"),
    [
        (0, 0.0, 300.0),
        (0, 250.0, 300.0),
        (100_000, 100.0, 300.0),
        (5_000, 100.0, 3 * 8192 / 50),
        (100, 100.0, 1200.0),
    ],
    ids=["nothing seen", "no token", "fast", "slow", "too slow to be believed"],
)
def test_the_silence_allowed(tokens: int, computing_s: float, expected_s: float) -> None:
    assert silence_allowed_s(300.0, 8192, tokens, computing_s) == pytest.approx(expected_s)


def test_an_engine_without_a_known_step_has_the_configured_limit() -> None:
    assert silence_allowed_s(300.0, 0, 100, 100.0) == 300.0
