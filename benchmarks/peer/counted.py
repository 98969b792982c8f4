"""`vllm-batch`, unchanged, with a count on the engine's door: what goes in, what comes out.

    python -m benchmarks.peer.counted FILE run INPUT OUTPUT …

FILE gets a line for each call: `> NUMBER…` handed over, `< NUMBER…` finished. It is written at
once, so that it tells the truth about a process that was killed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from batch_app import cli
from batch_app.engine.base import EngineRequest, Outcome
from batch_app.engine.host import EngineHost


@dataclass
class Count:
    """The numbers of the requests that went through the door."""

    handed: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Count:
        count = cls()
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the process was killed here
            kind, *numbers = line.split()
            (count.handed if kind == ">" else count.finished).update(map(int, numbers))
        return count


def install(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    submit, collect = EngineHost.submit, EngineHost.collect

    def note(kind: str, numbers: Iterable[int]) -> None:
        os.write(descriptor, f"{kind} {' '.join(map(str, numbers))}\n".encode())

    def counted_submit(self: EngineHost, requests: Sequence[EngineRequest]) -> None:
        note(">", (request.number for request in requests))
        submit(self, requests)

    def counted_collect(self: EngineHost, timeout_s: float) -> list[Outcome]:
        outcomes = collect(self, timeout_s)
        if outcomes:
            note("<", (outcome.number for outcome in outcomes))
        return outcomes

    EngineHost.submit = counted_submit  # type: ignore[method-assign]
    EngineHost.collect = counted_collect  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(sys.argv.pop(1)))
    cli.main()
