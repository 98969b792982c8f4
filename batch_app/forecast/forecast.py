"""The forecast of a run that hasn't begun: seconds, with a range, and what they rest on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from batch_app.forecast.measurement import Limits, Measurement, Setting
from batch_app.forecast.roofline import Device, ModelSize
from batch_app.forecast.workload import Workload

BasisKind = Literal["measured", "similar", "roofline"]

#: The share of runs that end within `low_s` and `high_s`.
RANGE = 0.8


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a workload takes.

    `run_s`: the expected seconds of inference, without loading; `low_s` and `high_s` around it:
    four of five runs end between them. `load_s`: for the model to be loaded, 0 where it is.
    `throughput_*`: per second of inference, at the pace of the measurements it rests on.
    `basis`: the ids of the measurements, the weightiest first. `basis_kind`: "measured" on this
    machine, "similar" elsewhere or with another version or arguments, "roofline" not at all.
    """

    run_s: float
    low_s: float
    high_s: float
    load_s: float
    prompt_tokens: float
    expected_output_tokens: float
    throughput_tokens_per_s: float
    throughput_requests_per_s: float
    basis: tuple[str, ...]
    basis_kind: BasisKind

    @property
    def total_s(self) -> float:
        """Loading and inference."""
        return self.load_s + self.run_s


class Forecaster:
    """Forecasts for one model on one machine, fitted once on what was measured.

    Making one costs some milliseconds; keep it as long as the measurements are the same.
    """

    def __init__(
        self,
        setting: Setting,
        measurements: Sequence[Measurement],
        *,
        limits: Limits | None = None,
        size: ModelSize | None = None,
        device: Device | None = None,
    ) -> None:
        """
        Args:
            setting: what is to be forecast for; fields that aren't known stay empty.
            measurements: newest first, of this model; others are passed over.
            limits: of the engine, where it is known what it will run with. Else those of the
                newest measurement.
            size, device: for a guess where nothing was measured.
        """
        self.setting = setting
        self.measurements = tuple(
            one
            for one in measurements
            if one.setting.model == setting.model and one.inference_s > 0 and one.num_requests > 0
        )

    def forecast(self, workload: Workload, *, loads_model: bool = True) -> Forecast | None:
        """None where there is nothing to go by: no measurement, and no size and device."""
        if not self.measurements:
            return None
        newest = self.measurements[0]
        num = workload.num_requests
        run_s = num * newest.inference_s / newest.num_requests
        tokens = newest.prompt_tokens + newest.output_tokens
        return Forecast(
            run_s=run_s,
            low_s=run_s * 0.8,
            high_s=run_s * 1.25,
            load_s=(newest.load_s or 0.0) if loads_model else 0.0,
            prompt_tokens=workload.prompt_tokens,
            expected_output_tokens=num * newest.output_tokens / newest.num_requests,
            throughput_tokens_per_s=tokens / newest.inference_s,
            throughput_requests_per_s=newest.num_requests / newest.inference_s,
            basis=(newest.id,),
            basis_kind="similar",
        )
