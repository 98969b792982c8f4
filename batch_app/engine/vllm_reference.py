"""The same requests through vLLM's own `LLM`, to compare the engine's answers with.

For a process of its own: it takes the whole device, and ends with the process.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from batch_app.engine.vllm_setup import emulates_bfloat16, set_environment


def make_llm(
    source: str, engine_args: Mapping[str, Any], *, on_cpu: bool, own_process: bool = False
) -> Any:
    """Load the model with those of our engine arguments that `LLM` knows.

    `own_process`: its engine gets a process of its own, as it does by default.
    """
    set_environment()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if own_process else "0"
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    given = {name.replace("-", "_"): value for name, value in engine_args.items()}
    arguments = {name: value for name, value in given.items() if name in known}
    if on_cpu and emulates_bfloat16():
        arguments.setdefault("dtype", "float32")
    return LLM(model=os.path.expanduser(source), **arguments)  # noqa: PTH111 - also a hub id


def chat(options: Mapping[str, Any], note: Callable[..., None]) -> str:
    """Answer `prompts`, each a user's message, with temperature 0. Notes their texts and token ids.

    Of the options: `source`, `engine_args`, `on_cpu`, `prompts`, `max_tokens`.
    """
    started = time.monotonic()
    llm = make_llm(options["source"], options["engine_args"], on_cpu=options["on_cpu"])
    load_s = time.monotonic() - started
    params = llm.get_default_sampling_params()  # those of the model, as the engine takes them
    params.temperature, params.max_tokens = 0.0, options["max_tokens"]
    conversations = [[{"role": "user", "content": prompt}] for prompt in options["prompts"]]
    started = time.monotonic()
    outputs = llm.chat(conversations, params, use_tqdm=False)
    note(
        load_s=round(load_s, 1),
        chat_s=round(time.monotonic() - started, 2),
        texts=[output.outputs[0].text for output in outputs],
    )
    return f"{len(outputs)} answers"
