"""What vLLM is configured with on NVIDIA cards, without one (`support.cuda_platform`)."""

from __future__ import annotations

import pytest

from batch_app.core import EngineLimits, LimitsTried
from support.cuda_platform import Case, Made, configure

pytestmark = pytest.mark.engine

RTX_4080 = Case("NVIDIA GeForce RTX 4080", 16, (8, 9))
LOWERED = LimitsTried(EngineLimits(64, 2048), RTX_4080.name, "0.32.0")

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


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    return dict(zip(ALL, configure([case for case, *_ in ALL.values()]), strict=True))


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
