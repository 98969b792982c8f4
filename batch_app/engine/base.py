"""The interface of an engine: what turns requests into outcomes.

An engine lives in a process of its own (`engine.host` starts it, `engine.child` runs in it), so
that unloading always frees its memory and a hang can be killed. Everything that crosses the process
boundary is a `msgspec.Struct` of this module: typed on arrival, and no code travels with the data.

The caller drives: `submit` never blocks, `collect` does the work. One thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from batch_app.core import FinishReason, LimitsTried


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine needs to know to load a model. Made from a registry entry.

    `source` is a folder or a hub id; `engine_args` go to the engine by the engine's own names.
    """

    name: str
    engine: str
    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    engine_args: Mapping[str, Any] = {}
    #: Limits that go before all others, on the device and with the version they were found for.
    lowered: LimitsTried | None = None
    #: For this load only, before any other: other processes use the rest of the GPU.
    gpu_memory_utilization: float | None = None


class EngineRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request on its way to the engine.

    `number` is its number in the batch and unique among those in flight; `endpoint` the line's
    `url`; `body` the JSON object of the line's `body`, as bytes. `shared`: how far its prompt
    begins like that of the one before it in the order, in marks (`batch_app.prefixes`); 0 where
    nobody asked for it (`EngineInfo.max_replicas`).
    """

    number: int
    endpoint: str
    body: bytes
    shared: int = 0


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one request.

    `body` is the JSON body that `vllm serve` would have answered: the response for `status_code`
    200, else `{"error": {"message", "type", "param", "code"}}`. Token counts are those of the
    body's `usage`, repeated here so that nobody has to parse it again.

    Where `error_code` is set there is no response at all, and `body` is the error's message.

    `finish_reason`: of a response; of several choices, `LENGTH` if any was cut off. None where the
    endpoint knows none.
    """

    number: int
    status_code: int
    body: bytes
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    error_code: str = ""
    finish_reason: FinishReason | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded engine says of itself. Limits by vLLM's names; `load_s` in seconds.

    `device` is the product's name, `device_type` "gpu", "cpu" or "remote". None: not known here.
    """

    engine: str
    engine_version: str
    model: str
    device: str
    device_type: str
    load_s: float
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    #: As the engine resolved them: "bfloat16", "fp8" (None if the weights are not quantised) and
    #: "FLASH_ATTN".
    dtype: str | None = None
    quantization: str | None = None
    attention_backend: str | None = None
    endpoints: tuple[str, ...] = ()
    #: For `EngineLimits`, and for the log: where the two limits come from.
    least_batched_tokens: int = 512
    limits_source: str = ""
    #: Each request has a time limit of its own there, so that long silence is no sign of a hang.
    bounds_requests: bool = False
    #: More than one: the limits are the sum of theirs, and it wants to know what requests share.
    max_replicas: int = 1

    @property
    def precision(self) -> dict[str, str]:
        """Return the dtype, quantization and attention backend, without those not known."""
        facts = {
            "dtype": self.dtype,
            "quantization": self.quantization,
            "attention_backend": self.attention_backend,
        }
        return {name: value for name, value in facts.items() if value is not None}


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A reading of a running engine. Counters (`*_total`) only grow while the engine lives."""

    num_running: int = 0
    num_waiting: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    preemptions_total: int = 0
    kv_cache_usage: float = 0.0
    #: Where the engine counts them.
    steps_total: int | None = None
    #: When it was read, by the machine's monotonic clock, which all processes share.
    at_s: float = 0.0


class Engine(ABC):
    """An engine with one model. Not thread-safe; lives from `load` to `close`."""

    @abstractmethod
    def load(self, ahead: Sequence[EngineRequest] = ()) -> EngineInfo:
        """Load the model; blocks, possibly for minutes.

        `ahead`: what will be submitted first, in this order, that it may get ready while it loads.
        A hint: nothing comes of them until they are submitted, and they need not be.

        Raises:
            EngineLoadError: the model cannot be loaded (missing, incompatible, out of memory).
        """

    @abstractmethod
    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Take these requests into the engine's queue. Never blocks.

        A request that the engine refuses yields an `Outcome` with status 4xx; it never raises here.
        """

    @abstractmethod
    def cancel(self, numbers: Collection[int]) -> None:
        """Forget these requests: no outcome will come of them. Unknown numbers are ignored."""

    @abstractmethod
    def collect(self, timeout_s: float) -> list[Outcome]:
        """Work until at least one request has finished, or `timeout_s` has passed.

        Returns what has finished since the last call, in order of finishing; may be empty. With
        nothing in flight it returns an empty list at once; an engine in its process is called now
        and then all the same, should it have something to put in order.

        Raises:
            EngineDied: the engine cannot go on. Requests in flight have no outcome.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """The latest reading. Cheap."""

    def end_workers(self) -> None:  # noqa: B027 - most engines have none
        """End the processes under this one that would leave something behind if they were killed.

        Takes a few seconds at most. The one method for another thread: the process is about to end,
        whatever the engine is doing.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent; never raises."""
