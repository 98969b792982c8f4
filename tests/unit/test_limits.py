"""The limits of an engine: the table, the way down, and what is remembered of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from batch_app.core import EngineLimits, GpuMemory, LimitsTried
from batch_app.engine.base import ModelSpec
from batch_app.engine.limits import (
    GIB,
    LEAST_SEQS,
    REMEMBERED_FOR,
    LoweredLimits,
    lowered_for,
    smaller,
    table_limits,
    utilization_beside,
)
from batch_app.engine.vllm_setup import arguments_for, limits_source

H100 = EngineLimits(1024, 16384, 0.9)
SPEC = ModelSpec(name="m", engine="vllm", source="/m", engine_args={"max_model_len": 4096})
TRIED = LimitsTried(H100, "a GPU", "0.32.0")


@pytest.mark.parametrize(
    ("memory_gib", "name", "expected"),
    [
        (None, "", (512, 8192)),
        (80, "NVIDIA H100", (1024, 16384)),
        (80, "NVIDIA A100-SXM4-80GB", (256, 8192)),
        (40, "NVIDIA A100", (256, 8192)),
        (16, "NVIDIA GeForce RTX 4080", (256, 8192)),
        (0, "", (256, 8192)),
    ],
)
def test_the_table(memory_gib: int | None, name: str, expected: tuple[int, int]) -> None:
    memory = None if memory_gib is None else memory_gib * GIB
    *limits, row = table_limits(memory, name)
    assert tuple(limits) == expected
    assert (f"{memory_gib} GiB" in row) == bool(memory_gib)
    assert ("unknown" in row) == (memory_gib == 0)


@pytest.mark.parametrize(
    "start",
    [
        H100,
        EngineLimits(512, 8192),
        EngineLimits(1, 1, 0.3),
        EngineLimits(5, 8192, 0.5),
        EngineLimits(256, 4096, 0.95, least_batched_tokens=4096),
    ],
)
def test_the_way_down_is_monotone_and_ends(start: EngineLimits) -> None:
    now, steps = start, 0
    while (lower := smaller(now)) is not None:
        assert lower != now
        assert lower.max_num_seqs <= now.max_num_seqs
        assert lower.max_num_batched_tokens <= now.max_num_batched_tokens
        assert (lower.gpu_memory_utilization or 0) <= (now.gpu_memory_utilization or 0)
        now, steps = lower, steps + 1
    assert steps < 12
    assert now.max_num_seqs == min(LEAST_SEQS, start.max_num_seqs)
    # vLLM refuses fewer tokens than requests, and a longest prompt that it can't take whole.
    assert now.max_num_batched_tokens >= min(
        start.max_num_batched_tokens, max(now.max_num_seqs, start.least_batched_tokens)
    )


def test_the_first_step_down() -> None:
    assert smaller(H100) == EngineLimits(512, 8192, 0.85)


def test_lowered_limits_hold_for_their_device_and_version() -> None:
    spec = msgspec.structs.replace(SPEC, lowered=TRIED)
    assert lowered_for(spec, "a GPU", "0.32.0") == H100
    assert lowered_for(spec, "another GPU", "0.32.0") is None
    assert lowered_for(spec, "a GPU", "0.33.0") is None
    assert lowered_for(SPEC, "a GPU", "0.32.0") is None


def test_what_is_remembered(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    path = tmp_path / "lowered.json"
    LoweredLimits(path, lambda: now).set(SPEC, TRIED)
    other = msgspec.structs.replace(SPEC, name="other")
    LoweredLimits(path, lambda: now).set(other, replace(TRIED, device="x"))

    lowered = LoweredLimits(path, lambda: now + timedelta(hours=1))
    assert lowered.get(SPEC) == TRIED
    assert lowered.get(other) == replace(TRIED, device="x")
    for changed in (
        {"engine_args": {"max_model_len": 2048}},
        {"revision": "next"},
        {"source": "/n"},
        {"name": "unknown"},
    ):
        assert lowered.get(msgspec.structs.replace(SPEC, **changed)) is None
    assert LoweredLimits(path, lambda: now + REMEMBERED_FOR).get(SPEC) is None
    path.write_text("{broken")
    assert lowered.get(SPEC) is None
    lowered.set(SPEC, TRIED)
    assert lowered.get(SPEC) == TRIED


def test_what_cant_be_written_is_known_while_the_process_lives(tmp_path: Path) -> None:
    lowered = LoweredLimits(tmp_path / "no such folder" / "lowered.json")
    lowered.set(SPEC, TRIED)
    assert lowered.get(SPEC) == TRIED


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "share"),
    [
        (11.35, 15.57, 0.708),
        (70, 80, 0.855),
        (1.9, 16, None),  # too little to be worth a start
        (2.0, 16, 0.105),
        (0, 16, None),
        (0, 0, None),
    ],
)
def test_the_share_beside_other_processes(
    free_gib: float, total_gib: float, share: float | None
) -> None:
    memory = GpuMemory(int(free_gib * GIB), int(total_gib * GIB))
    assert utilization_beside(memory) == share


def test_what_vllm_is_told_and_what_the_log_says() -> None:
    assert arguments_for(EngineLimits(8, 512)) == {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
    }
    assert arguments_for(H100)["gpu_memory_utilization"] == 0.9
    some = with_args(max_num_seqs=4)
    assert limits_source(SPEC, "no GPU", False) == "for no GPU"
    assert "max_num_seqs from the registry" in limits_source(some, "no GPU", False)
    both = with_args(max_num_seqs=4, max_num_batched_tokens=512)
    assert limits_source(both, "no GPU", False) == "from the registry"
    assert "memory" in limits_source(both, "no GPU", True)
    beside = msgspec.structs.replace(both, gpu_memory_utilization=0.5)
    assert "other processes" in limits_source(beside, "no GPU", False)


def with_args(**engine_args: int) -> ModelSpec:
    return msgspec.structs.replace(SPEC, engine_args=engine_args)
