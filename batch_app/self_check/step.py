"""A step of a self-check: what it runs, how long it may take, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

Figures: TypeAlias = dict[str, Any]
Options: TypeAlias = Mapping[str, Any]


class Status(StrEnum):
    """`RUNNING`: only in what a step's process has written so far."""

    RUNNING = "running"
    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    SKIP = "skip"


class Note(Protocol):
    """Save figures at once, so that they survive if the step is killed. Values must be JSON."""

    def __call__(self, **figures: Any) -> None: ...


#: What a step runs, in its own process. Returns a summary for people, in one line.
StepFunction: TypeAlias = Callable[[Options, Note], str]


class StepFailed(Exception):
    """What the step checks is not as it should be; the message says how."""


class StepSkipped(Exception):
    """The step doesn't apply here; the message says why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    `target` names its `StepFunction` as `module:function`. It's killed after `budget_s` seconds
    and isn't started if less than `least_s` seconds are left of the whole run.
    """

    name: str
    about: str
    target: str
    budget_s: float
    least_s: float = 5.0
    options: Options = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step. `seconds` is its wall time, start of its process included.

    `out_of_budget`: it was skipped, or cut off, because the time for the whole run was spent.
    `log_tail` holds the last lines that it and its engine printed; empty unless it failed.
    """

    name: str
    status: Status
    seconds: float
    message: str
    figures: Figures = field(default_factory=dict)
    out_of_budget: bool = False
    log_tail: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """`PASS  answers  31.2 s  2,000 requests …`"""
        status = self.status.upper() + (" (budget)" if self.out_of_budget else "")
        return f"{status:<13}  {self.name:<16} {self.seconds:6.1f} s  {self.message}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
