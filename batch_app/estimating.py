"""Estimates of the batches in the store: what is left of each, and when its turn comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Dialect
from batch_app.errors import BatchAppError
from batch_app.estimates import Estimate
from batch_app.outlook import (
    BatchForecast,
    InLine,
    Outlook,
    estimate_of,
    left_of,
    waits,
    without_load,
)
from batch_app.store import LEASED, Store
from batch_app.workloads import from_json

logger = logging.getLogger(__name__)

#: Of the queue; what stands behind so many isn't looked at.
MOST_BATCHES = 1_000
#: The id of a batch that isn't there yet.
NEW = "new"


@dataclass(frozen=True, slots=True)
class Turn:
    """When a batch's turn comes, and whether its model is loaded then."""

    wait_s: float
    is_loaded: bool


@dataclass(frozen=True)
class Estimating:
    """Each call looks at the store; they block. Raises StoreUnavailable, StorageFull."""

    settings: Settings
    store: Store
    outlook: Outlook
    clock: Callable[[], datetime]

    def of(self, batch: Batch) -> Estimate | None:
        """What a batch has still before it; None for a finished one, or with nothing to go by."""
        return self.of_page([batch])[0]

    def of_page(self, page: Iterable[Batch]) -> list[Estimate | None]:
        """The same for several, with one look at the queue for all."""
        turns: dict[str, Turn] | None = None
        found: list[Estimate | None] = []
        now = self.clock()
        for batch in page:
            if batch.is_terminal or batch.status is BatchStatus.VALIDATING:
                found.append(None)
                continue
            forecast = self._forecast(batch, batch.workload)
            if forecast is None:
                found.append(None)
            elif batch.status in LEASED:
                left = left_of(batch, forecast, now)
                found.append(estimate_of(forecast, now, left=left, prompt_basis=_basis(batch)))
            else:
                if turns is None:
                    turns = self.turns(now)
                turn = turns.get(batch.id, Turn(0.0, False))
                if turn.is_loaded:
                    forecast = without_load(forecast)
                found.append(
                    estimate_of(forecast, now, queue_wait_s=turn.wait_s, prompt_basis=_basis(batch))
                )
        return found

    def turns(self, now: datetime, *, also: Sequence[Batch] = ()) -> dict[str, Turn]:
        """Of each waiting batch, by id. `also`: batches that would come last."""
        held: list[tuple[Batch, float]] = []
        line: list[InLine] = []
        for batch in [*self.store.unfinished(MOST_BATCHES), *also]:
            forecast = self._forecast(batch)
            if batch.status in LEASED:
                left = left_of(batch, forecast, now)
                held.append((batch, left.remaining_s if left else 0.0))
            elif forecast is None:
                line.append(InLine(batch, None))
            else:
                line.append(InLine(batch, forecast.total_s, forecast.first_load_s))
        return {
            batch_id: Turn(*told)
            for batch_id, told in waits(
                held,
                line,
                num_workers=max(self._num_workers(now), 1),
                loaded=self._loaded(),
                bound_s=self.settings.max_passed_over_s,
                now=now,
            ).items()
        }

    def wait_for_new(self, model: str, *, now: datetime) -> Turn:
        """When the turn of a batch for this model would come, were it submitted now."""
        new = Batch(
            id=NEW,
            dialect=Dialect.NATIVE,
            status=BatchStatus.QUEUED,
            endpoint="",
            model=model,
            input_file_id="",
            created_at=now,
        )
        return self.turns(now, also=[new]).get(new.id, Turn(0.0, False))

    def _forecast(
        self, batch: Batch, workload: Sequence[Any] | None = None
    ) -> BatchForecast | None:
        """None also where a forecast fails: a status must be told without one, too."""

        def kept() -> Sequence[Any] | None:
            if workload is not None or batch.id == NEW:
                return workload
            return self.store.get_batch(batch.id).workload

        try:
            return self.outlook.of_batch(batch, kept)
        except BatchAppError:
            raise
        except Exception:
            logger.exception("The forecast of %s failed.", batch.id)
            return None

    def _num_workers(self, now: datetime) -> int:
        workers = self.store.list_workers()
        return sum(worker.is_alive(now, self.settings.heartbeat_s) for worker in workers)

    def _loaded(self) -> list[str]:
        """The models that idle workers hold."""
        return [
            worker.model
            for worker in self.store.list_workers()
            if worker.model and not worker.batch_id
        ]


def _basis(batch: Batch) -> str:
    kept = from_json(batch.workload) if batch.workload else ()
    bases = {part.basis for part in kept}
    return next((one for one in ("guess", "bytes", "sampled", "counted") if one in bases), "guess")
