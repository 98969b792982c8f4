"""What crosses between the engine core (`vllm_core`) and the process that forked it.

Pickled: the two are one program, and the worker trusts neither (`channel`).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from batch_app.core import LimitsTried
from batch_app.engine.base import EngineStats

LENGTH = struct.Struct("<Q")
RECEIVE_BYTES = 1 << 20


class Add(NamedTuple):
    """Into the engine with this `EngineCoreRequest`; `key` is its `request_id`."""

    key: str
    request: Any
    prompt_text: str | None


class Abort(NamedTuple):
    keys: list[str]


class Configure(NamedTuple):
    """What to load. `config`: a `VllmConfig`, pickled with what its classes need.

    `environment`: what making it has set there. `started_with`: its limits, for what went wrong.
    """

    config: bytes
    environment: dict[str, str]
    started_with: LimitsTried | None


class CoreLoaded(NamedTuple):
    supported_tasks: tuple[Any, ...]
    num_gpu_blocks: int | None
    max_model_len: int


class CoreLoadFailed(NamedTuple):
    message: str
    retriable: bool
    too_large: LimitsTried | None


class Stepped(NamedTuple):
    """What became final: outputs of vLLM's by key, or the exception that a request met."""

    outputs: list[tuple[str, Any]]
    stats: EngineStats


class CoreFailed(NamedTuple):
    message: str


ToCore: TypeAlias = Configure | Add | Abort
FromCore: TypeAlias = CoreLoaded | CoreLoadFailed | Stepped | CoreFailed


def framed(message: Any) -> bytes:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def unframed(received: bytearray) -> Iterator[Any]:
    """The whole messages at the start of `received`, which are taken from it."""
    while len(received) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(received)
        end = LENGTH.size + length
        if len(received) < end:
            return
        message = pickle.loads(memoryview(received)[LENGTH.size : end])  # noqa: S301 - our own
        del received[:end]
        yield message
