"""The report of a self-check: one JSON document, rewritten after every step."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch_app import __version__
from batch_app.self_check.step import Status, StepResult


@dataclass
class Report:
    """`about` says what was run and on what. With a `path`, every change is written there."""

    about: dict[str, Any]
    path: Path | None = None
    results: list[StepResult] = field(default_factory=list)
    is_finished: bool = False
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _started: float = field(default_factory=time.monotonic)

    def add(self, result: StepResult) -> None:
        self.results.append(result)
        self.write()

    def finish(self) -> None:
        self.is_finished = True
        self.write()

    @property
    def has_failed(self) -> bool:
        return any(result.status is Status.FAIL for result in self.results)

    @property
    def summary(self) -> str:
        """`5 passed, 0 failed, 2 skipped in 184 s`"""
        num = Counter(result.status for result in self.results)
        return (
            f"{num[Status.PASS]} passed, {num[Status.FAIL]} failed, {num[Status.SKIP]} skipped "
            f"in {time.monotonic() - self._started:.0f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "is_finished": self.is_finished,
            "wall_s": round(time.monotonic() - self._started, 1),
            **self.about,
            "summary": self.summary,
            "steps": [result.as_dict() for result in self.results],
        }

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        new.replace(self.path)
