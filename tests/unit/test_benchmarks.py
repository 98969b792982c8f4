"""Benchmark records, and the estimates that rest on them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batch_app.benchmarks import BenchmarkFolder, BenchmarkRecord, record_from_run
from batch_app.core import Batch, BatchStatus, Dialect, Progress
from batch_app.estimates import estimate
from batch_app.wire.native import batch_body, estimate_body, percent

SHIPPED = Path(__file__).parents[2] / "benchmarks" / "metadata"
NOW = datetime(2025, 10, 28, 10, 0, tzinfo=UTC)


def run(
    model: str = "m", num_requests: int = 100, *, day: int = 1, **changes: Any
) -> BenchmarkRecord:
    numbers: dict[str, Any] = {
        "batch_id": f"batch_{day:024x}",
        "engine": "vllm",
        "engine_version": "0.32.0",
        "device": "cpu",
        "device_name": "a processor",
        "success_count": num_requests,
        "load_s": 8.0,
        "inference_s": 50.0,
        "prompt_tokens": 9000,
        "completion_tokens": 1000,
        "engine_args": {"max_model_len": 512, "enforce_eager": True},
        "timestamp": datetime(2026, 1, day, tzinfo=UTC),
    }
    return record_from_run(model=model, num_requests=num_requests, **(numbers | changes))


@pytest.fixture
def folder(tmp_path: Path) -> BenchmarkFolder:
    return BenchmarkFolder(tmp_path / "metadata")


def test_the_shipped_record() -> None:
    record = BenchmarkFolder(SHIPPED).latest("google/gemma-3-4b-it")
    assert record is not None
    if record.test_id == "vllm-native-gemma3-4b-5000-2025-10-28":
        assert record.results.throughput_tokens_per_s == 2511
        assert record.hardware.gpu == "NVIDIA GeForce RTX 4080"


def test_record_from_run(folder: BenchmarkFolder) -> None:
    record = run("google/gemma-3-4b-it", 100, success_count=98)

    assert record.test_id == "vllm-native-gemma-3-4b-it-100-2026-01-01-000000000000"
    assert record.platform == "vllm-native"
    assert record.results.success_rate == 98.0
    assert record.results.failure_count == 2
    assert record.results.total_time_s == 58.0
    assert record.results.total_tokens == 10_000
    assert record.results.throughput_tokens_per_s == 200.0
    assert record.results.throughput_requests_per_s == 2.0
    assert record.config.max_model_len == 512
    assert record.hardware.cpu == "a processor"
    assert record.hardware.gpu is None
    path = folder.write(record)
    assert folder.all() == (record,)
    shape = json.loads((SHIPPED / "vllm-native-gemma3-4b-5000-2025-10-28.json").read_text())
    written = json.loads(path.read_text())
    for part in ("config", "results", "hardware"):
        assert set(shape[part]) <= set(written[part])
    assert set(shape) <= set(written)


def test_a_run_without_answers_has_no_pace(folder: BenchmarkFolder) -> None:
    folder.write(run(num_requests=5, success_count=0, inference_s=0.0))
    assert folder.latest("m") is None
    assert len(folder.all("m")) == 1


def test_the_newest_run_that_says_something_counts(folder: BenchmarkFolder) -> None:
    assert folder.latest("m") is None
    folder.write(run(num_requests=3, day=1))
    folder.write(run(num_requests=5, day=2))
    folder.write(run(num_requests=4, day=3))
    assert folder.latest("m").results.num_requests == 5  # type: ignore[union-attr]
    folder.write(run(num_requests=5000, day=4))
    folder.write(run(num_requests=200, day=5))
    folder.write(run(num_requests=2, day=6))
    folder.write(run("other", num_requests=900, day=7))
    assert folder.latest("m").results.num_requests == 200  # type: ignore[union-attr]


def test_broken_files_are_named_and_passed_over(
    folder: BenchmarkFolder, caplog: pytest.LogCaptureFixture
) -> None:
    good = folder.write(run())
    content = json.loads(good.read_text())
    (folder.path / "broken.json").write_text("{")
    (folder.path / "list.json").write_text("[]")
    (folder.path / "negative.json").write_text(
        json.dumps(content | {"results": content["results"] | {"num_requests": -1}})
    )
    (folder.path / "odd-id.json").write_text(json.dumps(content | {"test_id": "../../x"}))
    (folder.path / "folder.json").mkdir()
    (folder.path / "note.txt").write_text("not a record")

    with caplog.at_level(logging.WARNING):
        assert [record.model for record in folder.all()] == ["m"]

    for name in ("broken", "list", "negative", "odd-id", "folder"):
        assert f"{name}.json" in caplog.text
    assert "num_requests" in caplog.text


def test_added_and_removed_files_are_noticed(folder: BenchmarkFolder) -> None:
    for day in range(1, 20):
        folder.write(run(day=day))
        assert len(folder.all()) == day
    for path in folder.path.iterdir():
        path.unlink()
    assert folder.all() == ()


def test_unknown_fields_of_a_newer_version_pass(folder: BenchmarkFolder) -> None:
    path = folder.write(run())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    assert len(BenchmarkFolder(folder.path).all()) == 1


@pytest.mark.parametrize(
    ("num_requests", "about_s"),
    [(100, 60), (5_000, 37 * 60), (50_000, 6.1 * 3600), (200_000, 24.5 * 3600)],
)
def test_the_guide_s_table(num_requests: int, about_s: float) -> None:
    path = SHIPPED / "vllm-native-gemma3-4b-5000-2025-10-28.json"
    record = BenchmarkRecord.model_validate_json(path.read_bytes())

    guess = estimate(num_requests, record, NOW)

    assert guess is not None
    assert guess.duration_s == pytest.approx(about_s, rel=0.02 if num_requests > 100 else 0.2)
    body = estimate_body(guess)
    assert body is not None
    assert body.estimated_seconds == round(guess.duration_s)
    assert body.estimated_hours == round(guess.duration_s / 3600, 2)
    assert body.throughput_tokens_per_sec == 2511
    assert body.throughput_requests_per_sec == 2.29
    end = NOW + timedelta(seconds=guess.duration_s)
    assert body.estimated_completion == end.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_estimates() -> None:
    assert estimate(100, None, NOW) is None
    loaded = estimate(100, run(), NOW, ahead_s=1000, loads_model=False)
    assert loaded is not None
    assert loaded.duration_s == 50
    assert loaded.completion_at == NOW + timedelta(seconds=1050)
    slow = run(inference_s=1e6)
    assert estimate(2**62, slow, NOW) is None  # after the end of the calendar


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [
        (0, 0, 0.0),
        (0, 3, 0.0),
        (1, 3, 33.3),
        (2, 3, 66.6),
        (3, 3, 100.0),
        (199_999, 200_000, 99.9),
        (5, 3, 100.0),
    ],
)
def test_percent(done: int, total: int, shown: float) -> None:
    assert percent(done, total) == shown


@pytest.mark.parametrize(
    ("status", "name"),
    [
        ("validating", "pending"),
        ("queued", "pending"),
        ("running", "running"),
        ("finalizing", "running"),
        ("cancelling", "running"),
        ("completed", "completed"),
        ("failed", "failed"),
        ("expired", "expired"),
        ("cancelled", "cancelled"),
    ],
)
def test_native_status(status: str, name: str) -> None:
    batch = Batch(
        id="batch_1",
        dialect=Dialect.NATIVE,
        status=BatchStatus(status),
        endpoint="/v1/chat/completions",
        model="m",
        input_file_id="file-1",
        created_at=NOW,
        total=10,
        failed_at=NOW,
        error_message="reason",
    )
    body = batch_body(batch)
    assert body.status == name
    assert body.created_at == "2025-10-28T10:00:00.000000"
    assert body.error_message == "reason"
    assert body.results_url is None  # nothing was done
    some = batch_body(replace(batch, progress=Progress(completed=3)))
    assert (some.results_url is not None) == batch.is_terminal
