"""Which tests run in one process, when several run beside each other (`-n`, `--dist loadgroup`).

Those of a file stay together, as its fixtures do. So do all that load the real engine: one process
loads it once, and never two beside each other, for each takes all processors. They come first; what
is short comes last, so that no process has a long test left when the others have ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
#: From those that wait for processes to those that are done in a moment.
TIERS = ("faults", "acceptance", "integration", "contract", "meta", "unit")


def _needs_engine(item: pytest.Item) -> bool:
    return item.get_closest_marker("engine") is not None


def _rank(item: pytest.Item) -> int:
    tier = item.path.relative_to(TESTS).parts[0]
    return 0 if _needs_engine(item) or tier not in TIERS else 1 + TIERS.index(tier)


@pytest.hookimpl(tryfirst=True)  # before the groups become part of the tests' names
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (_rank(item), not _needs_engine(item)))
    for item in items:
        if _needs_engine(item):
            item.add_marker(pytest.mark.xdist_group("engine"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadGroupScheduling

    class ByGroupOrFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group = super()._split_scope(nodeid)
            return nodeid.partition("::")[0] if group == nodeid else group

    return ByGroupOrFile(config, log) if config.getvalue("dist") == "loadgroup" else None
