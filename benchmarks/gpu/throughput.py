"""How fast a model without weights is: through our engine, and through vLLM's `LLM.generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_app.engine.base import Outcome
from batch_app.engine.vllm_reference import make_llm
from batch_app.self_check.loaded_engine import LoadedEngine, loaded, reference_args
from batch_app.self_check.process import call
from batch_app.self_check.step import Note, Options, StepFailed
from benchmarks.gpu.shapes import completions, shape_spec, token_prompts

#: So that kernels are tuned and caches are filled before time is taken.
_NUM_WARM_UP = 8


def beside_generate(options: Options, note: Note) -> str:
    """Answer the same prompts, as token ids, with both. Fails only if one of them doesn't answer.

    Of the options: `shape`, `num_requests`, `prompt_tokens`, `output_tokens`.
    """
    folder, deadline = Path(options["folder"]), time.monotonic() + options["timeout_s"]
    num, num_tokens = options["num_requests"], options["output_tokens"]
    spec = shape_spec(options["shape"], folder, on_gpu=options["on_gpu"])
    prompts = token_prompts(options["shape"], num, options["prompt_tokens"])
    note(
        shape=options["shape"],
        num_requests=num,
        prompt_tokens=options["prompt_tokens"],
        output_tokens=num_tokens,
    )
    with loaded(spec, folder, options["timeout_s"]) as engine:
        info = engine.info
        note(
            load_s=round(info.load_s, 1),
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            kv_cache_tokens=info.kv_cache_tokens,
        )
        seconds = timed(engine, prompts, num_tokens, deadline=deadline)
    ours = num * num_tokens / seconds
    note(ours_s=round(seconds, 2), ours_tokens_per_s=round(ours, 1))
    found = call(
        f"{__name__}:generate",
        {
            "source": spec.source,
            "engine_args": reference_args(spec, info),
            "on_cpu": not options["on_gpu"],
            "prompts": prompts,
            "output_tokens": num_tokens,
        },
        timeout_s=max(deadline - time.monotonic() - 5, 5),
        folder=folder,
        name="llm_generate",
    )
    if found["num_tokens"] != num * num_tokens:
        raise StepFailed(f"LLM.generate made {found['num_tokens']:,} tokens")
    theirs = num * num_tokens / found["generate_s"]
    note(
        generate_load_s=found["load_s"],
        generate_s=round(found["generate_s"], 2),
        generate_tokens_per_s=round(theirs, 1),
        ratio=round(ours / theirs, 3),
    )
    return (
        f"{ours:,.0f} output tokens/s, LLM.generate {theirs:,.0f} (ratio {ours / theirs:.2f}); "
        f"{num:,} requests of {options['prompt_tokens']} + {num_tokens} tokens"
    )


def timed(
    engine: LoadedEngine, prompts: Sequence[list[int]], num_tokens: int, *, deadline: float
) -> float:
    """Seconds from the first request to the last answer. Raises StepFailed if one isn't right."""
    warm_up = [prompt[::-1] for prompt in prompts[:_NUM_WARM_UP]]
    engine.answer(completions(warm_up, num_tokens), timeout_s=deadline - time.monotonic())
    requests = list(completions(list(prompts), num_tokens))
    started = time.monotonic()
    outcomes = engine.answer(requests, timeout_s=deadline - time.monotonic())
    seconds = time.monotonic() - started
    require_lengths(outcomes, num_tokens)
    return seconds


def require_lengths(outcomes: Mapping[int, Outcome], num_tokens: int) -> None:
    """Raise StepFailed unless each answer is a success of this length."""
    for number, outcome in outcomes.items():
        if outcome.status_code != 200 or outcome.completion_tokens != num_tokens:
            raise StepFailed(
                f"request {number}: status {outcome.status_code}, "
                f"{outcome.completion_tokens} tokens, not {num_tokens}"
            )


def generate(options: Mapping[str, Any], note: Callable[..., None]) -> str:
    """The other side, in a process of its own: `LLM.generate`, its engine in a process of its own
    as by default."""
    started = time.monotonic()
    llm = make_llm(
        options["source"], options["engine_args"], on_cpu=options["on_cpu"], own_process=True
    )
    load_s = time.monotonic() - started
    from vllm import SamplingParams

    num_tokens = options["output_tokens"]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in options["prompts"]]
    warm_up = [{"prompt_token_ids": one["prompt_token_ids"][::-1]} for one in prompts]
    llm.generate(warm_up[:_NUM_WARM_UP], params, use_tqdm=False)
    started = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - started
    note(
        load_s=round(load_s, 1),
        generate_s=seconds,
        num_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
    )
    return f"{len(outputs)} answers"
