"""What crosses between the engine core (`vllm_core`) and the process that started it.

Pickled: the two are one program, and the worker trusts neither (`channel`).
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch

from batch_app.core import LimitsTried, LoadRetry
from batch_app.engine.base import EngineStats

HEADER = struct.Struct("<QI")  # the length of the rest in bytes, how many tensors are in it
RECEIVE_BYTES = 1 << 20
_OUT_OF_BAND_BYTES = 4096
_ALIGNMENT = 64


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
    attention_backend: str | None


class CoreLoadFailed(NamedTuple):
    message: str
    retriable: bool
    retry: LoadRetry | None


class GpuLostInFork(NamedTuple):
    """A core that was spawned could have loaded it."""

    message: str


class Stepped(NamedTuple):
    """What became final: outputs of vLLM's by key, or the exception that a request met."""

    outputs: list[tuple[str, Any]]
    stats: EngineStats


class CoreFailed(NamedTuple):
    message: str


ToCore: TypeAlias = Configure | Add | Abort
FromCore: TypeAlias = CoreLoaded | CoreLoadFailed | GpuLostInFork | Stepped | CoreFailed


def framed(message: Any) -> bytes:
    """The message as one frame: a header, then its tensors' bytes as they are, then the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(message)
    if not buffers:
        return b"".join((HEADER.pack(file.tell(), 0), file.getbuffer()))
    views = [buffer.raw() for buffer in buffers]
    table = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
    parts: list[bytes | memoryview] = []
    for part in (memoryview(table), *views):
        parts.extend((part, bytes(-len(part) % _ALIGNMENT)))
    parts.append(file.getbuffer())
    return b"".join((HEADER.pack(sum(map(len, parts)), len(views)), *parts))


def unframed(received: bytearray) -> Iterator[Any]:
    """The whole messages at the start of `received`, which are taken from it."""
    while len(received) >= HEADER.size:
        length, num_buffers = HEADER.unpack_from(received)
        end = HEADER.size + length
        if len(received) < end:
            return
        with memoryview(received)[HEADER.size : end] as payload:
            # What tensors stay in must not be that which the next frame comes into.
            message = decoded(bytearray(payload) if num_buffers else payload, num_buffers)
        del received[:end]
        yield message


def decoded(payload: bytearray | memoryview, num_buffers: int) -> Any:
    """The message of this frame, without its header. Its tensors are views of `payload`."""
    view = memoryview(payload)
    lengths = struct.unpack_from(f"<{num_buffers}Q", view)
    start = _aligned(8 * num_buffers)
    buffers = []
    for length in lengths:
        buffers.append(view[start : start + length])
        start = _aligned(start + length)
    return pickle.loads(view[start:], buffers=buffers)  # noqa: S301 - our own


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """Out of the pickle: torch's own way copies a tensor's bytes several times at either end."""
    is_plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    if not is_plain or tensor.requires_grad or tensor.nbytes < _OUT_OF_BAND_BYTES:
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    buffer = pickle.PickleBuffer(flat.view(torch.uint8).numpy())
    return _restored_tensor, (buffer, tensor.dtype, tuple(tensor.shape))


def _restored_tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


class _Reducers(dict[type, Any]):
    """Python's own, except for tensors."""

    def __missing__(self, kind: type) -> Any:
        return copyreg.dispatch_table[kind]


_REDUCERS = _Reducers({torch.Tensor: _reduce_tensor})
