"""What a look at something found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How it is. `warn`: it works, or will, but not as one would wish."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject`: what was looked at. `fix`: what to do; empty where nothing is wrong."""

    subject: str
    state: State
    message: str
    fix: str = ""


def ok(subject: str, message: str) -> Finding:
    return Finding(subject, State.OK, message)


def warn(subject: str, message: str, fix: str) -> Finding:
    return Finding(subject, State.WARN, message, fix)


def fail(subject: str, message: str, fix: str) -> Finding:
    return Finding(subject, State.FAIL, message, fix)


def worst(findings: Iterable[Finding]) -> State:
    states = {finding.state for finding in findings}
    return next((state for state in (State.FAIL, State.WARN) if state in states), State.OK)


def size(num_bytes: float) -> str:
    """`640 MiB`, `12.3 GiB`."""
    gib = num_bytes / (1 << 30)
    if gib >= 100:
        return f"{gib:,.0f} GiB"
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / (1 << 20):,.1f} MiB"
