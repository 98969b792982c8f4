"""Whether capturing CUDA graphs for larger steps is worth its time and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from batch_app.self_check.loaded_engine import loaded
from batch_app.self_check.step import Note, Options
from benchmarks.gpu.shapes import shape_spec, token_prompts
from benchmarks.gpu.throughput import timed


def capture_sizes(options: Options, note: Note) -> str:
    """Load the same shape once for each of `sizes`, and time the same requests.

    A CPU captures no graphs: there it only shows that vLLM takes the argument.
    """
    folder, deadline = Path(options["folder"]), time.monotonic() + options["timeout_s"]
    num_tokens = options["output_tokens"]
    prompts = token_prompts(options["shape"], options["num_requests"], options["prompt_tokens"])
    runs: list[dict[str, Any]] = []
    for size in options["sizes"]:
        spec = shape_spec(
            options["shape"],
            folder,
            on_gpu=options["on_gpu"],
            max_cudagraph_capture_size=size,
            max_num_seqs=max(options["sizes"]),
        )
        with loaded(spec, folder, options["timeout_s"]) as engine:
            seconds = timed(engine, prompts, num_tokens, deadline=deadline)
            runs.append(
                {
                    "max_cudagraph_capture_size": size,
                    "load_s": round(engine.info.load_s, 1),
                    "kv_cache_tokens": engine.info.kv_cache_tokens,
                    "output_tokens_per_s": round(len(prompts) * num_tokens / seconds, 1),
                }
            )
        note(runs=runs)
    return "; ".join(
        f"up to {run['max_cudagraph_capture_size']:,}: {run['output_tokens_per_s']:,.0f} output "
        f"tokens/s, loaded in {run['load_s']} s"
        for run in runs
    )
