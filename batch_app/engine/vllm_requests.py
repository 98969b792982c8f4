"""The requests that the vLLM engine has, from `submit` to their outcome.

They wait as bytes. A bounded number of them is being rendered (validated, templated, tokenised) by
vLLM's own serving code in the event loop; rendered ones wait or run in the core. Some may be made
ready before they are submitted: they come as far as the core's door and are held there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Awaitable, Collection, Iterable, Sequence

import msgspec

from batch_app.core import Endpoint, is_success
from batch_app.engine.base import EngineRequest, Outcome
from batch_app.engine.usage import read_answer
from batch_app.engine.vllm_client import CoreClient, RequestRecord, current_record
from batch_app.engine.vllm_serving import OpenAIApp, error_body

#: Requests being rendered at a time. vLLM gives each chat template 30 s including its wait for a
#: thread, so thousands at once would time out on a slow machine. 16, 64 and 256 gave 81, 90 and 97
#: requests/s where `vllm_client` was measured: fewer starve the tokeniser's batching.
MAX_RENDERING = 128

#: Where vLLM names a request itself unless its body does.
_NAMED = (Endpoint.CHAT_COMPLETIONS.value, Endpoint.COMPLETIONS.value)


class _Running:
    """A request with a task. `outcome`: of one that nobody has submitted so far."""

    __slots__ = ("outcome", "record", "request", "task")

    def __init__(self, request: EngineRequest, record: RequestRecord) -> None:
        self.request = request
        self.record = record
        self.outcome: Outcome | None = None
        self.task: asyncio.Task[None]


class VllmRequests:
    """One thread: that which runs `loop`."""

    def __init__(
        self, model: str, loop: asyncio.AbstractEventLoop, client: CoreClient, app: OpenAIApp
    ) -> None:
        self._model = model
        self._loop = loop
        self._client = client
        self.app = app
        self._queue: deque[EngineRequest] = deque()
        self._ahead: deque[EngineRequest] = deque()
        self._running: dict[int, _Running] = {}
        self._prepared: dict[int, _Running] = {}
        self._rendering: set[RequestRecord] = set()
        self._done: list[Outcome] = []
        self._wakeup = asyncio.Event()
        client.on_failure = self._wakeup.set

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._running

    @property
    def num_before_core(self) -> int:
        """How many were submitted and aren't in the core yet."""
        return len(self._queue) + len(self._rendering)

    def submit(self, requests: Iterable[EngineRequest]) -> None:
        for request in requests:
            prepared = self._prepared.pop(request.number, None)
            if prepared is None:
                self._queue.append(request)
            elif (prepared.request.endpoint, prepared.request.body) != (
                request.endpoint,
                request.body,
            ):
                self._stop([prepared])
                self._queue.append(request)
            elif prepared.outcome is not None:
                self._done.append(prepared.outcome)
            else:
                self._running[request.number] = prepared
                self._client.release(prepared.record)

    async def prepare(
        self, requests: Sequence[EngineRequest], while_waiting_for: Awaitable[bool]
    ) -> bool:
        """Get these ready, one after the other, as long as something else is awaited; its result.

        What is ready then goes into the core at once when it is submitted.
        """
        self._ahead.extend(requests)
        self._start()
        try:
            return await while_waiting_for
        finally:
            self._ahead.clear()

    def forget_prepared(self) -> None:
        prepared, self._prepared = self._prepared, {}
        self._stop(prepared.values())

    def cancel(self, numbers: Collection[int]) -> None:
        """No outcome will come of these, nor of what was only prepared."""
        gone = frozenset(numbers)
        self._queue = deque(request for request in self._queue if request.number not in gone)
        self._done = [outcome for outcome in self._done if outcome.number not in gone]
        self._stop([one for number in gone if (one := self._running.pop(number, None))])
        self.forget_prepared()

    def collect(self, timeout_s: float) -> list[Outcome]:
        """As `Engine.collect`."""
        if self._client.failure is None and not self.is_idle:
            self._loop.run_until_complete(self._work(timeout_s))
        if self._client.failure is not None and not self._done:
            raise self._client.failure
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End all tasks."""
        self._queue.clear()
        self._done.clear()
        running = [*self._running.values(), *self._prepared.values()]
        self._running, self._prepared = {}, {}
        self._stop(running, timeout_s=5)

    # -- inside --------------------------------------------------------------------------------

    def _stop(self, stopped: Iterable[_Running], timeout_s: float = 1) -> None:
        tasks = []
        keys = []
        for one in stopped:
            self._rendering.discard(one.record)
            keys += one.record.keys
            if not one.task.done():
                one.task.cancel()
                tasks.append(one.task)
        if keys:
            self._client.abort_keys(keys)
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=timeout_s))

    async def _work(self, timeout_s: float) -> None:
        """Run handlers until one has an outcome."""
        self._start()
        if not self._done:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakeup.wait(), timeout_s)
        # What one step finished comes as one list: let handlers that are ready complete.
        seen = -1
        while seen != len(self._done):
            seen = len(self._done)
            await asyncio.sleep(0)
        self._wakeup.clear()

    def _start(self) -> None:
        while len(self._rendering) < MAX_RENDERING:
            if self._queue:
                request, held, into = self._queue.popleft(), False, self._running
            elif self._ahead:
                request, held, into = self._ahead.popleft(), True, self._prepared
            else:
                return
            record = RequestRecord(self._on_engine, held=held)
            running = _Running(request, record)
            self._rendering.add(record)
            running.task = self._loop.create_task(self._handle(running))
            into[request.number] = running

    def _on_engine(self, record: RequestRecord) -> None:
        """This request's rendering is over; another's may begin."""
        if record in self._rendering:
            self._rendering.discard(record)
            self._start()

    async def _handle(self, running: _Running) -> None:
        request, record = running.request, running.record
        current_record.set(record)
        try:
            status, body = await self._answer(request)
        except Exception as error:  # noqa: BLE001 - one request's misfortune is its own outcome
            message = f"vLLM failed on this request: {type(error).__name__}"
            status, body = 500, error_body(message, kind="InternalServerError", code=500)
        if self._client.failure is not None:
            return  # An answer made of the engine's death isn't the request's.
        outcome = _outcome(request.number, status, body, record)
        if self._running.get(request.number) is running:
            del self._running[request.number]
            self._done.append(outcome)
            self._wakeup.set()
        else:  # prepared; or cancelled, and perhaps submitted anew
            running.outcome = outcome
        self._on_engine(record)

    async def _answer(self, request: EngineRequest) -> tuple[int, bytes]:
        if not self.app.supports(request.endpoint):
            served = ", ".join(self.app.endpoints)
            message = (
                f"The model `{self._model}` does not support {request.endpoint}; "
                f"it supports: {served}"
            )
            return 404, error_body(message, kind="NotFoundError", param="url", code=404)
        try:
            fields = msgspec.json.decode(request.body)
        except msgspec.DecodeError:
            return await self.app.refusal(request.endpoint, request.body)
        if not isinstance(fields, dict):
            return await self.app.refusal(request.endpoint, request.body)
        fields["model"] = self._model
        names_it = request.endpoint in _NAMED and "request_id" not in fields
        if names_it:
            # vLLM would ask the system for random bytes, once a request.
            fields["request_id"] = f"{random.getrandbits(64):016x}"
        parsed = self.app.parse(request.endpoint, fields)
        if parsed is None:
            if names_it:
                del fields["request_id"]  # vLLM tells how many fields a refused body has
            return await self.app.refusal(request.endpoint, msgspec.json.encode(fields))
        for name in ("stream", "background"):
            if getattr(parsed, name, False):
                message = f"`{name}` cannot be true in a batch"
                return 400, error_body(message, param=name)
        return await self.app.answer(request.endpoint, parsed)


def _outcome(number: int, status: int, body: bytes, record: RequestRecord) -> Outcome:
    if not is_success(status):
        return Outcome(number, status, body)
    tokens, _, finish_reason = read_answer(body)
    return Outcome(
        number,
        status,
        body,
        prompt_tokens=tokens.prompt_tokens,
        completion_tokens=tokens.completion_tokens,
        cached_tokens=record.cached_tokens,
        reasoning_tokens=tokens.reasoning_tokens,
        finish_reason=finish_reason,
    )
