"""What comes again, and when."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from batch_app.engine.retries import (
    LONGEST_RETRY_AFTER_S,
    is_worth_another_try,
    pause_s,
    retry_after_s,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_statuses() -> None:
    again = {status for status in range(100, 600) if is_worth_another_try(status)}
    assert again >= {408, 409, 429, 500, 502, 503, 504, 529, 307}
    assert not again & {200, 400, 401, 403, 404, 413, 422}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "7", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 2026 00:01:00 GMT"}, 60.0),
        ({"retry-after": "Thu, 01 Jan 2015 00:01:00 GMT"}, 0.0),
        ({"retry-after": "9" * 15}, LONGEST_RETRY_AFTER_S),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
    ],
)
def test_what_the_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, NOW) == seconds


def test_pauses_grow_and_are_never_alike() -> None:
    for attempt, most in [(1, 0.5), (2, 1.0), (3, 2.0), (10, 30.0), (10_000, 30.0)]:
        pauses = [pause_s(attempt, first_s=0.5, longest_s=30.0) for _ in range(50)]
        assert all(most / 2 <= pause <= most for pause in pauses)
        assert len(set(pauses)) > 40
    asked = [pause_s(1, first_s=0.5, longest_s=30.0, asked_s=5.0) for _ in range(50)]
    assert all(5.0 <= pause <= 5.2 for pause in asked)
    assert len(set(asked)) > 40
