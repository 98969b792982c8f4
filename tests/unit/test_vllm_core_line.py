"""The core's end of its socket: frames, and those with tensors beside the stepping thread."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from batch_app.engine.vllm_core_line import LARGE_FRAME_BYTES, CoreLine  # noqa: E402
from batch_app.engine.vllm_messages import Abort, Add, framed, unframed  # noqa: E402
from support.waiting import PATIENCE_S  # noqa: E402


@pytest.fixture
def ends() -> Iterator[tuple[CoreLine, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield CoreLine(ours), theirs
    ours.close()
    theirs.close()


def image() -> Any:
    return torch.arange(LARGE_FRAME_BYTES, dtype=torch.float32)


def there_and_back(value: Any) -> Any:
    ((message,),) = unframed(bytearray(framed([Add("key", value, None)])))
    return message.request


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(70, 80),
        torch.rand(70, 80).t(),
        torch.rand(200, 80)[::2, 1:],
        torch.rand(5000).to(torch.bfloat16),
        torch.arange(9000) % 2 == 0,
        torch.rand(3000).to(torch.complex64).conj(),
        torch.rand(3),
        torch.tensor(5),
        torch.empty(0, 7),
        torch.rand(5000, requires_grad=True),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}",
)
def test_a_tensor_comes_as_it_went(tensor: Any) -> None:
    restored = there_and_back({"pixels": tensor, "also": [tensor, "text"]})
    for one in (restored["pixels"], restored["also"][0]):
        assert one.dtype == tensor.dtype
        assert one.shape == tensor.shape
        assert torch.equal(one, tensor)
    assert restored["also"][1] == "text"


def test_a_tensor_that_came_stays_when_others_come() -> None:
    received = bytearray(framed([Add("a", torch.zeros(5000), None)]))
    received += framed([Add("b", torch.ones(5000), None)])
    first, second = (message.request for (message,) in unframed(received))
    second += 1
    assert torch.equal(first, torch.zeros(5000))


def test_the_thread_that_steps_does_not_wait_for_a_large_frame(
    ends: tuple[CoreLine, socket.socket],
) -> None:
    line, theirs = ends
    frame = framed([Add("large", image(), "prompt")])
    theirs.sendall(framed([Add("before", None, None)]) + frame[:100_000])
    assert line.exchange(None) == [Add("before", None, None)]
    for _ in range(3):
        assert line.exchange(0.0) == []
    assert "receive-large-frame" in {thread.name for thread in threading.enumerate()}
    theirs.sendall(frame[100_000:] + framed([Abort(["large"])]))  # the line keeps the order
    messages: list[Any] = []
    while len(messages) < 2:
        messages += line.exchange(None) or ()
    large, abort = messages
    assert torch.equal(large.request, image())
    assert abort == Abort(["large"])


def test_a_line_may_end_within_a_large_frame(ends: tuple[CoreLine, socket.socket]) -> None:
    line, theirs = ends
    theirs.sendall(framed([Add("large", image(), None)])[:100_000])
    assert line.exchange(0.0) == []
    theirs.close()
    assert line.exchange(None) is None


def test_a_large_frame_that_cannot_be_read_fails_the_thread_that_steps(
    ends: tuple[CoreLine, socket.socket],
) -> None:
    line, theirs = ends
    frame = bytearray(framed([Add("large", image(), None)]))
    frame[-20:] = bytes(20)
    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(theirs.sendall, frame)
        with pytest.raises((pickle.UnpicklingError, EOFError, TypeError)):
            line.exchange(None)
        sent.result(PATIENCE_S)


def test_waiting_for_a_message_ends_in_time(ends: tuple[CoreLine, socket.socket]) -> None:
    line, theirs = ends
    started = time.monotonic()
    assert line.exchange(0.05) == []
    assert 0.04 < time.monotonic() - started < PATIENCE_S
    theirs.sendall(framed([Abort(["a"])]))
    assert line.exchange(PATIENCE_S) == [Abort(["a"])]
