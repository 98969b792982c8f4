"""Estimates of the batches in the store: what is left of each, and when its turn comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        models: dict[str, str | None] | None = None
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
                if models is None:
                    models = self._models(now)
                left = left_of(batch, _still(batch, forecast, models), now)
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
        models = self._models(now)
        for batch in [*self.store.unfinished(MOST_BATCHES), *also]:
            forecast = self._forecast(batch)
            if batch.status in LEASED:
                left = left_of(batch, _still(batch, forecast, models), now)
                held.append((batch, left.remaining_s if left else 0.0))
            elif forecast is None:
                line.append(InLine(batch, None))
            else:
                line.append(InLine(batch, forecast.total_s, forecast.first_load_s))
        # Not by what the workers say of themselves: that is as old as their last sign of life.
        busy = {batch.lease_owner for batch, _ in held}
        return {
            batch_id: Turn(*told)
            for batch_id, told in waits(
                held,
                line,
                num_workers=max(len(models), 1),
                loaded=[model for name, model in models.items() if model and name not in busy],
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

    def _models(self, now: datetime) -> dict[str, str | None]:
        """What each living worker holds, by its id."""
        return {
            worker.id: worker.model
            for worker in self.store.list_workers()
            if worker.is_alive(now, self.settings.heartbeat_s)
        }


def _still(
    batch: Batch, forecast: BatchForecast | None, models: Mapping[str, str | None]
) -> BatchForecast | None:
    """The forecast of a batch that a worker has; without loading, where that holds its model."""
    holds = models.get(batch.lease_owner) if batch.lease_owner else None
    if forecast is None or holds is None or holds != batch.model:
        return forecast
    return without_load(forecast)


def _basis(batch: Batch) -> str:
    kept = from_json(batch.workload) if batch.workload else ()
    bases = {part.basis for part in kept}
    return next((one for one in ("guess", "bytes", "sampled", "counted") if one in bases), "guess")
