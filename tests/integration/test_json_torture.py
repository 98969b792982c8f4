"""The torture suite through the real HTTP server: a line error for each, and never a 5xx."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from integration.api_fixtures import Api
from support.torture import REFUSED, TAKEN, good


def joined(lines: list[bytes]) -> bytes:
    assert not any(b"\n" in line for line in lines)
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_every_bad_line_is_named(start_api: Callable[..., Api], model_first: bool) -> None:
    """All in one file, each between two good lines: none hides another, none stops the check."""
    api = start_api(max_line_errors=1000)
    lines = []
    for number, raw in enumerate(REFUSED.values()):
        lines += [good(f"good-{number}"), raw]

    answer = api.submit(joined(lines), model_first=model_first)

    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert [error["line"] for error in body["errors"]] == list(range(2, len(lines) + 1, 2))
    for name, error in zip(REFUSED, body["errors"], strict=True):
        assert error["code"] in (
            "invalid_json_line",
            "invalid_request",
            "missing_required_parameter",
        ), name
        assert error["message"]
        assert "surrogates not allowed" not in error["message"]
    api.assert_nothing_left()


@pytest.mark.parametrize("name", ["deep arrays", "NUL before", "UTF-32", "lone high surrogate"])
def test_a_bad_line_alone(api: Api, name: str) -> None:
    answer = api.submit(REFUSED[name] + b"\n")

    assert answer.status_code == 400, answer.text
    assert answer.json()["errors"][0]["line"] == 1
    api.assert_nothing_left()


def test_odd_but_good_lines_are_taken(api: Api) -> None:
    lines = [raw.replace(b"%b", b"r%d" % number) for number, raw in enumerate(TAKEN.values())]

    answer = api.submit(joined(lines), model="sim")

    assert answer.status_code == 200, answer.text
    assert answer.json()["progress"]["total"] == len(TAKEN)
