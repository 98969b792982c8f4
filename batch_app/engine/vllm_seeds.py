"""Requests with a `seed` on a CPU, which vLLM 0.32 would die of.

Where a prompt is read in several steps, each of them draws a token, which is thrown away until the
prompt has ended. vLLM then winds a seeded request's random numbers back, as if nothing had been
drawn: on a CPU, PyTorch's generators can't be wound back, and the engine fails. Here such a request
draws from the common generator in these steps, and from its own once its prompt has ended: its
answer is the same, in however many steps its prompt was read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def draw_aside() -> None:
    """Have vLLM's runner on a CPU do so. Idempotent; nothing where generators can be wound back."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if _can_be_wound_back() or getattr(CPUModelRunner.sample_tokens, "draws_aside", False):
        return
    vllms = CPUModelRunner.sample_tokens

    def sample_tokens(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        if not generators:
            return vllms(runner, *args, **kwargs)
        unread = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
        aside = {
            index: generator
            for index in unread.tolist()
            if (generator := generators.pop(index, None)) is not None
        }
        try:
            return vllms(runner, *args, **kwargs)
        finally:
            generators.update(aside)

    sample_tokens.draws_aside = True  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_tokens


def _can_be_wound_back() -> bool:
    try:
        torch.Generator(device="cpu").get_offset()
    except RuntimeError:
        return False
    return True
