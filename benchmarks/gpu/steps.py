"""All steps, with the sizes and budgets for a GPU and, small, for a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from batch_app.self_check.short import short_steps
from batch_app.self_check.step import Step
from benchmarks.gpu.guide_shape import OWN_STEP
from benchmarks.peer.workloads import CHAT_PROCESS, RUN_BATCH

#: Seconds for the whole run, by (full, on a CPU).
BUDGETS_S = {(False, False): 360.0, (True, False): 3600.0, (False, True): 900.0}
BUDGETS_S[True, True] = 1800.0
#: Here one that hangs is to leave time for the others; `doctor --run` may run on slow machines.
_SHORT_BUDGETS_S = {"device": 60.0, "before-fork": 40.0, "compute": 40.0, "answers": 150.0}
#: A CPU that others use, too, takes longer for the same.
_CPU_SCALE = 2.0


def default_steps(*, on_gpu: bool) -> tuple[Step, ...]:
    """Those that run unless more is asked for: at most six minutes on a GPU."""
    small = not on_gpu
    return (
        *short_steps(num_requests=200 if small else 2000, doctor=True),
        Step(
            "throughput",
            "The shape of Qwen3 0.6B without weights, beside LLM.generate on token ids",
            "benchmarks.gpu.throughput:beside_generate",
            budget_s=100,
            least_s=40,
            options=_throughput("qwen3-small", 48, 32, 16)
            if small
            else _throughput("qwen3-0.6b", 2000, 128, 128),
        ),
        Step(
            "blocker",
            "A model loads while another process holds 10 GB of the GPU, and nothing is remembered",
            "benchmarks.gpu.loads:load_beside_blocker",
            budget_s=60,
            least_s=25,
        ),
        Step(
            "switches",
            "Two switches between two models",
            "benchmarks.gpu.loads:switch_models",
            budget_s=100,
            least_s=40,
            options={"shape": "qwen3-small" if small else "qwen3-0.6b", "num_switches": 2},
        ),
    )


def full_steps(*, on_gpu: bool) -> tuple[Step, ...]:
    """What `--full` adds."""
    small = not on_gpu
    guide: dict[str, Any] = {
        "shape": "gemma-small" if small else "gemma",
        "num_requests": 32 if small else 5000,
    }
    return (
        Step(
            OWN_STEP,
            "The usage guide's benchmark: 788 + 308 tokens on the shape of Gemma 3 4B",
            "benchmarks.gpu.guide_shape:ours",
            budget_s=900,
            least_s=60,
            options=guide,
        ),
        Step(
            "guide-llm-chat",
            "The same through LLM.chat",
            "benchmarks.gpu.guide_shape:contender",
            budget_s=600,
            least_s=60,
            options={**guide, "contender": CHAT_PROCESS},
        ),
        Step(
            "guide-run-batch",
            "The same through vLLM's run_batch, with its own limits",
            "benchmarks.gpu.guide_shape:contender",
            budget_s=600,
            least_s=60,
            options={**guide, "contender": RUN_BATCH},
        ),
        Step(
            "graph-sizes",
            "CUDA graphs for steps of up to 512 and of up to 1,024 requests",
            "benchmarks.gpu.graph_sizes:capture_sizes",
            budget_s=240,
            least_s=60,
            options={
                "sizes": [512, 1024],
                **(
                    _throughput("qwen3-small", 32, 16, 8)
                    if small
                    else _throughput("qwen3-0.6b", 4000, 64, 128)
                ),
            },
        ),
        Step(
            "out-of-memory",
            "An engine that runs out of memory in a step comes back with smaller limits",
            "benchmarks.gpu.out_of_memory:recover",
            budget_s=180,
            least_s=60,
            options=_throughput("qwen3-small", 512, 16, 4)
            if small
            else _throughput("qwen3-0.6b", 2048, 128, 4),
        ),
        Step(
            "many-switches",
            "Ten switches between two models; three on a CPU",
            "benchmarks.gpu.loads:switch_models",
            budget_s=420,
            least_s=60,
            options={
                "shape": "qwen3-small" if small else "qwen3-0.6b",
                "num_switches": 3 if small else 10,
            },
        ),
    )


def steps(*, full: bool, on_gpu: bool) -> Sequence[Step]:
    """All that such a run does, in order."""
    chosen = default_steps(on_gpu=on_gpu)
    if full:
        chosen += full_steps(on_gpu=on_gpu)
    chosen = tuple(
        dataclasses.replace(step, budget_s=_SHORT_BUDGETS_S.get(step.name, step.budget_s))
        for step in chosen
    )
    if on_gpu:
        return chosen
    return [dataclasses.replace(step, budget_s=_CPU_SCALE * step.budget_s) for step in chosen]


def _throughput(shape: str, num: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "shape": shape,
        "num_requests": num,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
