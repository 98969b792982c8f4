"""Measurements: what a run of a model showed, in the form that a fit needs. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """What a measurement holds for. Two runs are comparable in full only where all is equal.

    `machine`: the device's name and whatever else tells two machines apart. `arguments`: the
    engine arguments that matter to speed, as text; empty where they weren't kept.
    """

    model: str
    machine: str = ""
    engine: str = ""
    engine_version: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine may have in hand; None where it isn't known.

    `max_num_seqs` in requests, the others in tokens.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_tokens: int | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class MeasuredGroup:
    """The answers to requests of one endpoint with about the same limit and length of prompt.

    `output_quantiles` at `workload.LEVELS`. `num_cut`: answers that ended at the limit, so that
    their natural length is longer by an unknown amount.
    """

    endpoint: str
    max_tokens: float | None
    num_requests: int
    mean_output_tokens: float
    output_quantiles: tuple[float, ...] = ()
    mean_prompt_tokens: float | None = None
    num_cut: int = 0


@dataclass(frozen=True, slots=True)
class StepBin:
    """Sums over the steps of a run in which about the same number of requests was in hand.

    `num_steps` and `seconds` of all of them; `decode_tokens` generated, `prefill_tokens` computed
    (none that came from the cache). `context_tokens`: the sum over the steps of the tokens in the
    KV cache that were attended to; None where it wasn't read.
    """

    num_steps: float
    seconds: float
    decode_tokens: float
    prefill_tokens: float
    context_tokens: float | None = None

    @property
    def num_running(self) -> float:
        """The mean number of requests in a step."""
        return self.decode_tokens / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run: a benchmark record without what only people read.

    `inference_s`: loading not counted. Tokens are sums over the run; `cached_tokens`, of the
    prompt's, came from the prefix cache. `age_s`: how long ago, for its weight.
    """

    id: str
    setting: Setting
    num_requests: int
    prompt_tokens: float
    output_tokens: float
    inference_s: float
    load_s: float | None = None
    cached_tokens: float = 0.0
    prompt_quantiles: tuple[float, ...] = ()
    output_quantiles: tuple[float, ...] = ()
    groups: tuple[MeasuredGroup, ...] = ()
    steps: tuple[StepBin, ...] = ()
    limits: Limits = Limits()
    is_outlier: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What a running engine says of itself at a moment. Counters only grow within a run.

    `at_s`: seconds on any clock that never goes back and stands still while the run is paused.
    `prompt_tokens_total` counts the prompts that were computed or found in the cache, by then;
    `cached_tokens_total` those of them that were found. `steps_total` where the engine counts
    them.
    """

    at_s: float
    num_running: int
    num_waiting: int = 0
    prompt_tokens_total: float = 0.0
    cached_tokens_total: float = 0.0
    generation_tokens_total: float = 0.0
    kv_cache_usage: float | None = None
    steps_total: float | None = None
