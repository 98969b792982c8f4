"""A dry run: what would become of a file, were it submitted. Nothing is queued.

Tells which lines would be refused at once, which the model would refuse, and for each model of the
registry how long the rest would take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from batch_app.checkers import CheckerPlaces
from batch_app.config import Settings
from batch_app.core import LineError, utc_now
from batch_app.counting.count import PromptCounts, count_prompts
from batch_app.errors import BadLines, BadRequest
from batch_app.estimates import Estimate
from batch_app.estimating import Turn
from batch_app.index import Index
from batch_app.intake import IntakeRules, index_file
from batch_app.lines import GENERATES
from batch_app.outlook import Outlook, estimate_of, without_load
from batch_app.planner import Group
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.shapes import BodyLimits
from batch_app.workloads import Planning, measured

#: Seconds of counting, for all models together; each gets an equal share.
COUNT_S = 4.0
MAX_LISTED = 100
NO_QUEUE = Turn(0.0, False)


@dataclass(frozen=True, slots=True)
class ModelOutlook:
    """What one model would make of the file.

    `too_long`: so many requests don't fit its context; of a sample, about so many. `lines`: those
    that would fail, the first of them, from 1. `estimate` None: there is nothing to go by.
    `reason`: why its tokenizer couldn't be used.
    """

    model: str
    estimate: Estimate | None
    max_model_len: int | None
    num_too_long: int
    num_refused: int
    lines: tuple[int, ...]
    relative_error: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DryRun:
    """`num_requests` good ones; `num_errors` that a submission would be refused for, and the first
    of them. `models` in the registry's order."""

    num_requests: int
    num_errors: int
    errors: tuple[LineError, ...]
    models: tuple[ModelOutlook, ...]


@dataclass(frozen=True)
class DryRuns:
    """`turn` says when a batch for this model would come next."""

    settings: Settings
    registry: Callable[[], ModelRegistry]
    outlook: Outlook
    turn: Callable[[str], Turn] = lambda _: NO_QUEUE
    clock: Callable[[], datetime] = utc_now
    checker_places: CheckerPlaces | None = None

    def of(self, path: Path, folder: Path, model: str | None = None) -> DryRun:
        """Look at the file at `path`; its index is made in `folder`, which must exist. Seconds.

        `model`: only this one; None: each of the registry.

        Raises ModelNotFound, StorageFull, OSError, and BadRequest for an empty registry.
        """
        registry = self.registry()
        entries = [registry.get(model)] if model else list(registry.entries)
        if not entries:
            raise BadRequest("The model registry has no model.", param="model")
        errors, num_errors = self._check(path, folder, entries)
        index = Index.load(folder)
        planning = self.outlook.planning(
            by_prefix=self.settings.order == "prefix", deduplicate=self.settings.deduplicate
        )
        budget_s = COUNT_S / len(entries)
        models = tuple(self._on(entry, index, path, planning, budget_s) for entry in entries)
        return DryRun(len(index), num_errors, errors, models)

    def _check(
        self, path: Path, folder: Path, entries: Sequence[ModelEntry]
    ) -> tuple[tuple[LineError, ...], int]:
        # What any of the models allows passes: the lines are looked at once for all.
        arguments = {name for entry in entries for name in entry.chat_template_kwargs}
        anyone = ModelEntry(name="any", source="any", chat_template_kwargs=tuple(sorted(arguments)))
        rules = IntakeRules(
            registry=ModelRegistry([anyone]),
            model=anyone.name,
            max_line_bytes=self.settings.max_line_bytes,
            max_requests=self.settings.max_requests_per_batch,
            max_errors=MAX_LISTED,
            limits=BodyLimits.of(self.settings),
        )
        try:
            index_file(path, folder, rules, places=self.checker_places)
        except BadLines as refusal:
            return tuple(refusal.errors), refusal.num_errors
        return (), 0

    def _on(
        self, entry: ModelEntry, index: Index, path: Path, planning: Planning, budget_s: float
    ) -> ModelOutlook:
        limit = self._context(entry)
        if not len(index):
            return ModelOutlook(entry.name, None, limit, 0, 0, (), 0.0)
        index = replace(index, models=(entry.name,))
        group = next(planning.groups(index))
        usual = self.outlook.bytes_per_token(entry.name)
        counts = count_prompts(index, group.numbers, path, entry, budget_s=budget_s, usual=usual)
        part = measured(index, group, counts, planning)[0]
        too_long = _too_long(index, group, counts, limit)
        failing = np.union1d(too_long, group.numbers[counts.refused])
        forecast = self.outlook.forecast_all([part])
        estimate = None
        if forecast is not None:
            turn = self.turn(entry.name)
            estimate = estimate_of(
                without_load(forecast) if turn.is_loaded else forecast,
                self.clock(),
                queue_wait_s=turn.wait_s,
                prompt_basis=counts.basis,
            )
        return ModelOutlook(
            model=entry.name,
            estimate=estimate,
            max_model_len=limit,
            num_too_long=len(too_long),
            num_refused=len(counts.refused),
            lines=tuple(np.sort(index.records["line"][failing])[:MAX_LISTED].tolist()),
            relative_error=counts.relative_error,
            reason=counts.reason,
        )

    def _context(self, entry: ModelEntry) -> int | None:
        """Tokens of the model's context: as the registry says, as it last ran, as it was made."""
        if entry.max_model_len is not None:
            return entry.max_model_len
        record = self.outlook.benchmarks.latest(entry.name)
        if record is not None and record.config.max_model_len:
            return record.config.max_model_len
        try:
            config = orjson.loads((Path(entry.source) / "config.json").read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        length = config.get("max_position_embeddings") if isinstance(config, dict) else None
        return length if isinstance(length, int) else None


def _too_long(
    index: Index, group: Group, counts: PromptCounts, limit: int | None
) -> npt.NDArray[np.int64]:
    """The requests that don't fit, with those that ask the same; ascending."""
    if limit is None:
        return np.empty(0, np.int64)
    records = index.records[group.numbers]
    generates = np.array([endpoint in GENERATES for endpoint in index.endpoints])
    # A prompt may fill the context where nothing is to be added to it.
    room = limit - generates[records["endpoint"]].astype(np.int64)
    wanted = np.where(generates[records["endpoint"]], records["max_tokens"], 0)
    leaders = group.numbers[(counts.tokens > room) | (wanted > limit)]
    followers = group.waiting.followers[np.isin(group.waiting.leaders, leaders)]
    return np.union1d(leaders, followers)
