"""The recording of a run: what is kept of it for the forecasts to come. Pure; memory stays flat."""

from __future__ import annotations

from batch_app.forecast.measurement import MeasuredGroup, Reading, StepBin


class Recording:
    """Collects what finishes and what the engine says of itself.

    Feed it `finish` for every request that the engine answered, and `read` about once a second.
    `reset` it when the engine was started anew: its counters begin at 0 again.
    """

    def finish(
        self,
        endpoint: str,
        max_tokens: int | None,
        *,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int = 0,
        num: int = 1,
    ) -> None:
        """A request was answered with a response. `max_tokens`: None or 0 where it sets none."""

    def read(self, reading: Reading) -> None:
        """What the engine says now."""

    def reset(self) -> None:
        """The next reading begins a new row of counters."""

    @property
    def groups(self) -> tuple[MeasuredGroup, ...]:
        return ()

    @property
    def steps(self) -> tuple[StepBin, ...]:
        return ()

    @property
    def prompt_quantiles(self) -> tuple[float, ...]:
        return ()

    @property
    def output_quantiles(self) -> tuple[float, ...]:
        return ()
