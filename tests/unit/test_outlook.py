"""When batches will be done: their own time, what a worker says is left, and the queue."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_app.benchmarks import BenchmarkFolder, record_from_run
from batch_app.core import Batch, BatchStatus, Dialect, Paused, PauseKind, Progress
from batch_app.forecast.workload import RequestGroup, Workload
from batch_app.machine import Machine
from batch_app.outlook import (
    InLine,
    Left,
    Outlook,
    estimate_of,
    left_of,
    waits,
    without_load,
)
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.workloads import ModelWorkload, to_json

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MACHINE = Machine("a processor", "cpu", "here")
REGISTRY = ModelRegistry(
    [ModelEntry(name=name, source="sim", engine="sim") for name in ("a", "b", "unmeasured")]
)


def batch(name: str = "x", model: str = "a", **values: Any) -> Batch:
    return Batch(
        id=name,
        dialect=Dialect.NATIVE,
        status=BatchStatus.QUEUED,
        endpoint="/v1/completions",
        model=model,
        input_file_id="",
        created_at=NOW,
        **values,
    )


def running(**values: Any) -> Batch:
    return replace(
        batch(total=100, started_at=NOW, lease_owner="w"), status=BatchStatus.RUNNING, **values
    )


@pytest.fixture
def outlook(tmp_path: Path) -> Outlook:
    """Models `a` and `b` load in 10 s and answer 2 requests/s."""
    folder = BenchmarkFolder(tmp_path)
    for model in ("a", "b"):
        record = record_from_run(
            batch_id=f"batch_{model}",
            model=model,
            engine="sim",
            engine_version="1",
            device="cpu",
            device_name="a processor",
            num_requests=200,
            success_count=200,
            load_s=10.0,
            inference_s=100.0,
            prompt_tokens=2000,
            completion_tokens=4000,
            line_bytes=12_000,
            engine_args={"kv_cache_tokens": 5000},
            timestamp=NOW,
        )
        folder.write(record)
    return Outlook(lambda: REGISTRY, folder, lambda: MACHINE)


def part(model: str, num: int) -> ModelWorkload:
    group = RequestGroup(num_requests=num, prompt_tokens=10.0 * num)
    return ModelWorkload(model, Workload((group,)), num, 60 * num, "counted")


def test_models_run_one_after_the_other(outlook: Outlook) -> None:
    one = outlook.forecast_all([part("a", 100)])
    both = outlook.forecast_all([part("a", 100), part("b", 100)])
    assert one is not None
    assert both is not None

    assert both.total_s == pytest.approx(2 * one.total_s)
    assert both.load_s == pytest.approx(20)
    # Two errors partly cancel out.
    assert one.high_s - one.total_s < both.high_s - both.total_s < 2 * (one.high_s - one.total_s)
    assert without_load(both).total_s == pytest.approx(both.total_s - 10)
    assert len(both.basis) == 2
    assert outlook.forecast_all([part("a", 100), part("unmeasured", 1)]) is None
    assert outlook.forecast_all([part("gone", 1)]) is None


def test_how_long_loading_takes_is_not_sure_either(outlook: Outlook) -> None:
    cold = outlook.forecast_all([part("a", 100)])
    assert cold is not None
    loaded = without_load(cold)
    assert loaded.low_s < loaded.total_s < loaded.high_s
    # Ten seconds, but on another machine: here they may be about twice, or half as many.
    above, below = cold.high_s - cold.total_s, cold.total_s - cold.low_s
    assert above**2 - (loaded.high_s - loaded.total_s) ** 2 == pytest.approx(9.0**2, rel=0.05)
    assert below**2 - (loaded.total_s - loaded.low_s) ** 2 == pytest.approx(4.7**2, rel=0.05)


def test_past_runs_tell_bytes_per_token_and_the_cache(outlook: Outlook) -> None:
    assert outlook.bytes_per_token("a").ratio == pytest.approx(6.0)
    assert outlook.bytes_per_token("a").learned
    assert not outlook.bytes_per_token("unmeasured").learned
    planning = outlook.planning(by_prefix=True, deduplicate=True)
    assert planning.kv_cache_tokens == {"a": 5000, "b": 5000}


def test_a_batch_that_was_not_looked_at_is_taken_to_be_as_the_last_one(outlook: Outlook) -> None:
    unseen = outlook.of_batch(batch(total=100))
    assert unseen is not None
    assert unseen.prompt_tokens == pytest.approx(1000)
    seen = outlook.of_batch(batch("y", total=100, workload=to_json((part("a", 100),))))
    assert seen is not None
    assert seen.prompt_tokens == pytest.approx(1000)
    other = outlook.of_batch(batch("z", total=100, workload=[{"of": "another version"}]))
    assert other == unseen


def test_an_estimate_counts_the_queue(outlook: Outlook) -> None:
    forecast = outlook.forecast_all([part("a", 100)])
    assert forecast is not None
    told = estimate_of(forecast, NOW, queue_wait_s=1000, prompt_basis="counted")
    assert told is not None
    assert told.low_s is not None
    assert told.high_s is not None
    assert told.low_s < told.duration_s < told.high_s
    assert told.completion_at == NOW + timedelta(seconds=1000 + told.duration_s)
    assert estimate_of(forecast, NOW, queue_wait_s=1e15) is None  # after the calendar's end


# -- what is left ----------------------------------------------------------------------------------


def said(seconds_ago: float, remaining_s: float) -> dict[str, Any]:
    at = NOW.timestamp() - seconds_ago
    return msgspec.to_builtins(
        Left(at=at, remaining_s=remaining_s, low_s=remaining_s / 2, high_s=2 * remaining_s)
    )


def test_what_a_worker_says_grows_old() -> None:
    left = left_of(running(outlook=said(10, 100)), None, NOW)
    assert left is not None
    assert (left.remaining_s, left.low_s, left.high_s) == pytest.approx((90, 40, 190))
    over = left_of(running(outlook=said(500, 100)), None, NOW)
    assert over is not None
    assert (over.remaining_s, over.high_s) == pytest.approx((0, 100))


@pytest.mark.parametrize(
    "why", [{"paused": Paused(PauseKind.DISK, "No space left.", NOW)}, {"lease_owner": None}]
)
def test_it_stands_still_while_nobody_works(why: dict[str, Any]) -> None:
    left = left_of(running(outlook=said(500, 100), **why), None, NOW)
    assert left is not None
    assert left.remaining_s == 100


def test_before_it_says_anything_the_forecast_is_all_there_is(outlook: Outlook) -> None:
    forecast = outlook.of_batch(batch(total=100))
    assert forecast is not None
    began = left_of(running(), forecast, NOW + timedelta(seconds=4))
    assert began is not None
    assert began.remaining_s == pytest.approx(forecast.total_s - 4)
    late = left_of(running(), forecast, NOW + timedelta(seconds=60))
    assert late is not None
    assert late.remaining_s == pytest.approx(forecast.total_s - 10)  # it still loads
    half = left_of(running(progress=Progress(50, 0)), forecast, NOW)
    assert half is not None
    assert half.remaining_s == pytest.approx((forecast.total_s - 10) / 2)
    assert left_of(running(outlook={"at": "nonsense"}), None, NOW) is None


# -- the queue -------------------------------------------------------------------------------------


def turns(
    line: list[InLine], held: list[tuple[Batch, float]] | None = None, **options: Any
) -> dict[str, tuple[float, bool]]:
    given: dict[str, Any] = {"num_workers": 1, "bound_s": 0.0, "now": NOW}
    return waits(held or [], line, **(given | options))


def test_each_waits_for_those_before_it() -> None:
    line = [InLine(batch(name), 100.0, 10.0) for name in "xyz"]
    assert turns(line) == {"x": (0.0, False), "y": (100.0, True), "z": (190.0, True)}
    with_one = turns(line, [(running(model="a"), 50.0)])
    assert with_one["x"] == (50.0, True)
    assert with_one["z"][0] == pytest.approx(50 + 2 * 90)


def test_two_workers_share_the_queue() -> None:
    line = [InLine(batch(name), 100.0, 10.0) for name in "xyz"]
    assert turns(line, num_workers=2)["z"] == (100.0, True)


def test_priority_and_the_loaded_model_go_first() -> None:
    line = [
        InLine(batch("old", "b"), 100.0, 10.0),
        InLine(batch("same", "a"), 100.0, 10.0),
        InLine(batch("high", "b", priority=1), 100.0, 10.0),
    ]
    told = turns(line, [(running(model="a"), 5.0)])
    assert told == {"high": (5.0, False), "old": (105.0, True), "same": (195.0, False)}
    told = turns(line[:2], [(running(model="a"), 5.0)], bound_s=3600.0)
    assert told["same"] == (5.0, True)
    assert told["old"] == (95.0, False)


def test_an_idle_worker_may_hold_the_model() -> None:
    assert turns([InLine(batch(), 100.0, 10.0)], loaded=["a"]) == {"x": (0.0, True)}


def test_a_batch_of_unknown_length_counts_as_nothing() -> None:
    line = [InLine(batch("x"), None), InLine(batch("y"), 100.0, 10.0)]
    assert turns(line)["y"] == (0.0, True)
