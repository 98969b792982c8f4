"""Which tests are in the long tier: `make test` leaves out those marked `long`.

A test that takes long is marked by hand. Those that need a browser or PostgreSQL are marked here.
"""

from __future__ import annotations

from typing import Any

import pytest

#: Fixtures that start one of these.
_FIXTURES = frozenset({"chromium", "postgres", "emptied"})


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") is None and needs_a_program(item):
            item.add_marker(pytest.mark.long)


def needs_a_program(item: Any) -> bool:
    """Whether it runs in a browser or on PostgreSQL, which is a parameter of many tests."""
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params.values() if callspec is not None else ()
    return bool(_FIXTURES & set(item.fixturenames)) or "postgresql" in parameters
