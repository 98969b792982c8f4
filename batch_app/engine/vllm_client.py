"""An `EngineClient` over the engine core: what vLLM's serving objects talk to.

Requests are prepared here, in the event loop, and go to the core process (`vllm_core`) in one frame
a turn of the loop; each finished output comes back to the request that awaits it.

Two processes, because Python runs one thread at a time: while one is shaping an answer, no other
can schedule the next step, however many cores are idle. `docs/performance.md` has the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any

import msgspec
from vllm.engine.protocol import EngineClient
from vllm.renderers import renderer_from_config
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor

from batch_app.engine.base import EngineStats
from batch_app.engine.vllm_grammars import GrammarChecker
from batch_app.engine.vllm_messages import (
    Abort,
    Add,
    CoreFailed,
    CoreLoaded,
    CoreLoadFailed,
    GpuLostInFork,
    Stepped,
    ToCore,
    framed,
    unframed,
)
from batch_app.engine.vllm_process import CoreLostGpu, CoreProcess
from batch_app.errors import EngineDied, EngineError, EngineLoadError


class RequestRecord:
    """What the client notes about one of our requests while its handler runs.

    A handler may put several prompts into the engine (a list of prompts, or of documents to score):
    `keys` are their names there. `on_engine` is called when the first of them gets there, or as
    far as it may: while `held` is a list, they wait in it for `CoreClient.release`.
    """

    __slots__ = ("cached_tokens", "held", "keys", "on_engine")

    def __init__(self, on_engine: Callable[[RequestRecord], None], *, held: bool = False) -> None:
        self.keys: list[str] = []
        self.cached_tokens = 0
        self.on_engine = on_engine
        self.held: list[Add] | None = [] if held else None


#: Set in the task of each handler; tasks that the handler starts inherit it.
current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


class _Waiter:
    """Outputs on their way to one `generate` or `encode`."""

    __slots__ = ("finished", "outputs", "wake")

    def __init__(self) -> None:
        self.outputs: deque[Any] = deque()
        self.wake: asyncio.Future[None] | None = None
        self.finished = False

    def put(self, output: Any) -> None:
        self.outputs.append(output)
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


class CoreClient(EngineClient):  # type: ignore[misc]
    """See the module. Made in the thread that runs `loop`, which stays the only one to use it."""

    def __init__(self, vllm_config: Any, process: CoreProcess) -> None:
        """`process` is loading what this configuration says, and the client's from now on."""
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.io_processor = None
        #: Tries constraints before the core gets them.
        self.grammars: GrammarChecker | None = None
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._process = process
        self._transport: asyncio.Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.attention_backend: str | None = None
        self._core_loaded: asyncio.Future[CoreLoaded] | None = None
        self._supported_tasks = _likely_tasks(self.model_config)
        self._stats = EngineStats()
        self._names = itertools.count()
        self._waiters: dict[str, _Waiter] = {}
        self._unsent: list[ToCore] = []
        self._closing = False

    # -- from the start to the end ----------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the core process, until its end was seen."""
        return self._process.pid

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve in `loop` from now on. What is sent before the core has loaded, it reads then."""
        self._loop = loop
        self._core_loaded = loop.create_future()
        self._transport, _ = loop.run_until_complete(
            loop.connect_accepted_socket(lambda: _Protocol(self), self._process.line)
        )

    async def loaded(self) -> bool:
        """Wait until the model is loaded. Returns whether it is as it was expected to be: what was
        made of this client before then holds.

        Raises:
            EngineLoadError: the core could not load the model.
            CoreLostGpu: it could not, because it was forked.
            EngineDied: the core process ended.
        """
        assert self._core_loaded is not None
        loaded = await self._core_loaded
        as_expected = (
            self._supported_tasks == loaded.supported_tasks
            and self.model_config.max_model_len == loaded.max_model_len
        )
        # As the core found or fitted them.
        self.vllm_config.cache_config.num_gpu_blocks = loaded.num_gpu_blocks
        self.model_config.max_model_len = loaded.max_model_len
        self.attention_backend = loaded.attention_backend
        if not as_expected:
            self._supported_tasks = loaded.supported_tasks
            self.input_processor = InputProcessor(self.vllm_config, self.renderer)
        return as_expected

    def shutdown(self) -> None:
        """End the core process."""
        self._closing = True
        if self._transport is not None:
            assert self._loop is not None
            self._transport.abort()
            self._loop.run_until_complete(asyncio.sleep(0))  # it closes the socket at its next turn
        with contextlib.suppress(Exception):
            self.renderer.shutdown()
        self._process.end()

    # -- what the core says -----------------------------------------------------------------------

    def receive(self, message: Any) -> None:
        if isinstance(message, Stepped):
            self._stats = message.stats
            for key, output in message.outputs:
                waiter = self._waiters.get(key)
                if waiter is not None:
                    waiter.put(output)
            return
        self._process.is_loading = False
        if isinstance(message, CoreLoaded):
            if self._core_loaded is not None and not self._core_loaded.done():
                self._core_loaded.set_result(message)
        elif isinstance(message, CoreLoadFailed):
            self.fail(
                EngineLoadError(message.message, retriable=message.retriable, retry=message.retry)
            )
        elif isinstance(message, GpuLostInFork):
            self.fail(CoreLostGpu(message.message))
        elif isinstance(message, CoreFailed):
            self.fail(EngineDied(f"the engine failed: {message.message}"))

    def core_ended(self) -> None:
        if not self._closing and self.failure is None:
            self.fail(self._process.ended())

    def fail(self, failure: EngineError) -> None:
        self.failure = failure
        if self._core_loaded is not None and not self._core_loaded.done():
            self._core_loaded.set_exception(failure)
        self.on_failure()

    def stats(self, *, not_in_engine: int, idle: bool) -> EngineStats:
        """The core's latest reading, with what waits in front of it."""
        now = self._stats
        return msgspec.structs.replace(
            now,
            num_running=0 if idle else now.num_running,
            num_waiting=0 if idle else now.num_waiting + not_in_engine,
            kv_cache_usage=0.0 if idle else now.kv_cache_usage,
        )

    # -- what serving objects call, in the event loop ---------------------------------------------

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        return self._outputs(prompt, sampling_params, options)

    def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        return self._outputs(prompt, pooling_params, options)

    async def _outputs(
        self, prompt: Any, params: Any, options: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        if self.failure is not None:
            raise EngineDeadError
        assert self._loop is not None
        # A body may carry a request_id of its own, and two may carry the same: use our own names.
        key = str(next(self._names))
        record = current_record.get()
        if self.grammars is not None and getattr(params, "structured_outputs", None) is not None:
            # Those that wait for a compilation keep nobody from being rendered.
            on_wait = partial(record.on_engine, record) if record is not None else None
            await self.grammars.check(params, on_wait)
        addition = self._addition(key, prompt, params, options)
        waiter = self._waiters[key] = _Waiter()
        if record is not None and record.held is not None:
            record.held.append(addition)
        else:
            self._send(addition)
        if record is not None:
            record.keys.append(key)
            record.on_engine(record)
        try:
            while not waiter.finished:
                if not waiter.outputs:
                    waiter.wake = self._loop.create_future()
                    await waiter.wake
                output = waiter.outputs.popleft()
                if isinstance(output, BaseException):
                    waiter.finished = True
                    raise output
                waiter.finished = output.finished
                if output.finished and record is not None:
                    record.cached_tokens += getattr(output, "num_cached_tokens", None) or 0
                yield output
        finally:
            self._waiters.pop(key, None)
            if not waiter.finished:
                self.abort_keys((key,))

    def _addition(self, key: str, prompt: Any, params: Any, options: dict[str, Any]) -> Add:
        """As vLLM's own client prepares it. Raises what vLLM raises of a request it refuses."""
        reasoning = {
            name: value
            for name in ("reasoning_ended", "reasoning_parser_kwargs")
            if (value := options.pop(name, None)) is not None
        }
        options.pop("data_parallel_rank", None)
        options = {name: value for name, value in options.items() if value is not None}
        prompt_text = options.pop("prompt_text", None) or _text_of(prompt)
        request = self.input_processor.process_inputs(
            key, prompt, params, supported_tasks=self._supported_tasks, **options
        )
        for name, value in reasoning.items():
            setattr(request, name, value)
        return Add(key, request, prompt_text)

    def release(self, record: RequestRecord) -> None:
        """Send what was held of this request, and hold nothing more of it."""
        held, record.held = record.held, None
        for addition in held or ():
            self._send(addition)

    def abort_keys(self, keys: Collection[str]) -> None:
        """Stop these in the engine, at the next step, all in one call."""
        self._send(Abort(list(keys)))

    def _send(self, message: ToCore) -> None:
        assert self._loop is not None
        if not self._unsent:
            self._loop.call_soon(self.flush)
        self._unsent.append(message)

    def flush(self) -> None:
        """Send what has gathered; by itself at the next turn of the loop."""
        unsent, self._unsent = self._unsent, []
        if unsent and self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(unsent))

    async def abort(self, request_id: str | Iterable[str], **_: Any) -> None:
        """vLLM's names of requests mean nothing here; handlers are cancelled instead."""

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        return self._supported_tasks

    @property
    def is_running(self) -> bool:
        return self.failure is None and not self._closing

    @property
    def is_stopped(self) -> bool:
        return not self.is_running

    @property
    def errored(self) -> bool:
        return self.failure is not None

    @property
    def dead_error(self) -> BaseException:
        error: BaseException = EngineDeadError()
        return error

    async def check_health(self) -> None:
        if self.errored:
            raise self.dead_error

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        return None

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False


class _Protocol(asyncio.Protocol):
    def __init__(self, client: CoreClient) -> None:
        self._client = client
        self._received = bytearray()

    def data_received(self, data: bytes) -> None:
        self._received += data
        for message in unframed(self._received):
            self._client.receive(message)

    def connection_lost(self, _: Exception | None) -> None:
        self._client.core_ended()


def _likely_tasks(model_config: Any) -> tuple[str, ...]:
    """Nearly always right, before the model itself can be asked."""
    return ("generate",) if model_config.runner_type == "generate" else ()


def _text_of(prompt: Any) -> str | None:
    return prompt.get("prompt") if isinstance(prompt, dict) else None


# vLLM adds abstract methods to EngineClient at almost every release (pausing, weight updates); none
# of them is reached from the serving objects used here, so their absence must not stop us.
CoreClient.__abstractmethods__ = frozenset()
