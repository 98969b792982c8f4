"""An engine in its real processes, loaded as the worker loads it, that a step sends requests to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from batch_app.engine.base import EngineInfo, EngineRequest, ModelSpec, Outcome
from batch_app.engine.host import EngineHost
from batch_app.self_check.step import Options, StepFailed, StepSkipped

_COLLECT_S = 0.2
#: The engine's last reading follows its last outcome.
_SETTLE_S, _STILL_S = 20.0, 1.0
#: As the worker's window: so many times what the engine takes into a step.
_WINDOW = 2


def spec_of(options: Options, **more_args: Any) -> ModelSpec:
    """The model that the option `spec` describes, with these engine arguments besides its own.

    Raises StepSkipped if there is none, or if its engine isn't vLLM.
    """
    if not options.get("spec"):
        raise StepSkipped("there is no model to load; name one with --load")
    spec = msgspec.convert(options["spec"], ModelSpec)
    if spec.engine != "vllm":
        raise StepSkipped(f"the model {spec.name} runs on the engine {spec.engine}, not on vLLM")
    return msgspec.structs.replace(spec, engine_args={**spec.engine_args, **more_args})


class Tokens(NamedTuple):
    """Of prompts, those that came from the cache included, and of answers."""

    prompt: int
    completion: int


@contextmanager
def loaded(spec: ModelSpec, folder: Path, timeout_s: float) -> Iterator[LoadedEngine]:
    """Load it in a process of its own; unload it with the block. Raises EngineError."""
    host = EngineHost(spec, log_path=folder / "engine.log", start_timeout_s=timeout_s)
    try:
        yield LoadedEngine(host, host.load())
    finally:
        host.close()


class LoadedEngine:
    """`host` with what is sent to it. One thread."""

    def __init__(self, host: EngineHost, info: EngineInfo) -> None:
        self.host = host
        self.info = info
        self.window = _WINDOW * info.max_num_seqs

    def answer(
        self,
        requests: Iterable[EngineRequest],
        *,
        timeout_s: float,
        on_outcomes: Callable[[Sequence[Outcome]], Sequence[int]] = lambda _: (),
    ) -> dict[int, Outcome]:
        """Send all of them, a window at a time, and return their outcomes by number.

        `on_outcomes` is told of outcomes as they come, and returns the numbers of requests to
        abort; those have no outcome unless they were faster.

        Raises StepFailed after `timeout_s`, or if an outcome comes that nobody waits for.
        """
        unsent, waiting = iter(requests), set[int]()
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout_s
        while True:
            if fresh := list(islice(unsent, max(self.window - len(waiting), 0))):
                self.host.submit(fresh)
                waiting.update(request.number for request in fresh)
            if not waiting:
                return outcomes
            if time.monotonic() > deadline:
                raise StepFailed(
                    f"{len(outcomes):,} requests were answered within {timeout_s:.0f} s, "
                    f"{len(waiting):,} were in flight"
                )
            found = self.host.collect(_COLLECT_S)
            for outcome in found:
                if outcome.number not in waiting:
                    raise StepFailed(f"an outcome came for request {outcome.number}, unasked for")
                waiting.discard(outcome.number)
                outcomes[outcome.number] = outcome
            if aborted := waiting.intersection(on_outcomes(found)):
                self.host.cancel(aborted)
                waiting -= aborted

    def tokens(self) -> Tokens:
        """What the engine has counted, once nothing changes any more. Nothing is in flight."""
        deadline = time.monotonic() + _SETTLE_S
        last, since = self._tokens(), time.monotonic()
        while time.monotonic() < min(since + _STILL_S, deadline):
            time.sleep(0.05)
            self.host.collect(0)
            if (now := self._tokens()) != last:
                last, since = now, time.monotonic()
        return last

    def _tokens(self) -> Tokens:
        stats = self.host.stats()
        return Tokens(stats.prompt_tokens_total, stats.generation_tokens_total)


def reference_args(spec: ModelSpec, info: EngineInfo) -> Mapping[str, Any]:
    """The engine arguments with which vLLM's `LLM` runs under the limits of the loaded engine."""
    limits = {"max_num_seqs": info.max_num_seqs, "max_model_len": info.max_model_len}
    if info.max_num_batched_tokens is not None:
        limits["max_num_batched_tokens"] = info.max_num_batched_tokens
    return {**limits, **spec.engine_args}
