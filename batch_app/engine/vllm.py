"""The real engine: vLLM, answering as `vllm serve` would.

Requests wait in a queue as bytes. A bounded number of them is being rendered (validated, templated,
tokenised) by vLLM's own serving code in an event loop; rendered ones wait or run in the engine,
which is stepped by a process of its own (`vllm_core`); finished ones become `Outcome`s.
`vllm_client` joins the two, `vllm_serving` is vLLM's OpenAI application.

vllm is imported by `load`, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from batch_app.core import Endpoint, LimitsTried
from batch_app.engine.base import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    ModelSpec,
    Outcome,
)
from batch_app.engine.usage import usage_of
from batch_app.engine.vllm_setup import (
    check_source,
    limits_of,
    load_error,
    make_setup,
    set_environment,
)
from batch_app.errors import EngineDied, EngineError

if TYPE_CHECKING:
    from batch_app.engine.vllm_client import CoreClient, RequestRecord
    from batch_app.engine.vllm_process import CoreProcess
    from batch_app.engine.vllm_serving import OpenAIApp

#: Requests being rendered at a time. vLLM gives each chat template 30 s including its wait for a
#: thread, so thousands at once would time out on a slow machine. 16, 64 and 256 gave 81, 90 and 97
#: requests/s where `vllm_client` was measured: fewer starve the tokeniser's batching.
MAX_RENDERING = 128

#: Where vLLM names a request itself unless its body does.
_NAMED = (Endpoint.CHAT_COMPLETIONS.value, Endpoint.COMPLETIONS.value)


def import_libraries() -> None:
    """What `load` imports before it reads a model, done ahead of it. Raises ImportError."""
    set_environment()

    import batch_app.engine.vllm_client
    import batch_app.engine.vllm_process
    import batch_app.engine.vllm_serving  # noqa: F401


class VllmEngine(Engine):
    """vLLM with one model. The thread that calls `load` is the one to call everything else."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._loop: asyncio.AbstractEventLoop | None = None
        self._core: CoreProcess | None = None
        self._client: CoreClient | None = None
        self._app: OpenAIApp | None = None
        self._queue: deque[EngineRequest] = deque()
        self._tasks: dict[int, tuple[asyncio.Task[None], RequestRecord]] = {}
        self._rendering: set[int] = set()
        self._done: list[Outcome] = []
        self._wakeup = asyncio.Event()
        self._tried: LimitsTried | None = None

    # -- loading ----------------------------------------------------------------------------------

    def load(self) -> EngineInfo:
        started = time.monotonic()
        check_source(self.spec.source)
        try:
            import_libraries()
            # vLLM collects garbage several times while it loads, and would look through all that
            # was imported each time: 0.9 s.
            gc.freeze()
            return self._load(started)
        except EngineError:
            self.close()
            raise
        except (Exception, SystemExit) as error:
            self.close()
            raise load_error(self.spec, error, self._tried) from error
        finally:
            gc.unfreeze()

    def _load(self, started: float) -> EngineInfo:
        from batch_app.engine.vllm_client import CoreClient
        from batch_app.engine.vllm_process import CoreProcess
        from batch_app.engine.vllm_serving import OpenAIApp

        core = self._core = CoreProcess.start(partial(load_error, self.spec))
        setup = make_setup(self.spec)
        config, args, self._tried = setup.config, setup.args, setup.tried
        core.configure(config, self._tried)
        # From here on the model loads, and this process gets ready beside it.
        client = self._client = CoreClient(config, core)
        client.on_failure = self._wakeup.set
        OpenAIApp.prepare()
        loop = self._loop = asyncio.new_event_loop()
        self._app = loop.run_until_complete(OpenAIApp.create(client, args))
        if not client.wait_loaded(loop):
            self._app = loop.run_until_complete(OpenAIApp.create(client, args))

        blocks = config.cache_config.num_gpu_blocks
        # As the core found or fitted them.
        limits = limits_of(config, setup.on_cpu)
        return EngineInfo(
            engine="vllm",
            engine_version=setup.tried.engine_version,
            model=self.spec.name,
            device=setup.tried.device,
            device_type="cpu" if setup.on_cpu else "gpu",
            load_s=time.monotonic() - started,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            kv_cache_tokens=blocks * config.cache_config.block_size if blocks else None,
            gpu_memory_utilization=limits.gpu_memory_utilization,
            enable_prefix_caching=config.cache_config.enable_prefix_caching,
            enable_chunked_prefill=config.scheduler_config.enable_chunked_prefill,
            endpoints=self._app.endpoints,
            least_batched_tokens=limits.least_batched_tokens,
            limits_source=setup.limits_source,
        )

    # -- running ----------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._queue.extend(requests)

    def cancel(self, numbers: Collection[int]) -> None:
        gone = frozenset(numbers)
        self._queue = deque(request for request in self._queue if request.number not in gone)
        self._done = [outcome for outcome in self._done if outcome.number not in gone]
        stopped = [entry for number in gone if (entry := self._tasks.pop(number, None))]
        self._rendering -= gone
        if not stopped or self._client is None or self._loop is None:
            return
        self._client.abort_keys([key for _, record in stopped for key in record.keys])
        for task, _ in stopped:
            task.cancel()
        self._loop.run_until_complete(asyncio.wait([task for task, _ in stopped], timeout=1))

    def collect(self, timeout_s: float) -> list[Outcome]:
        if self._loop is None or self._client is None:
            raise EngineDied("the engine isn't loaded")
        if self._client.failure is None and (self._queue or self._tasks):
            self._loop.run_until_complete(self._work(timeout_s))
        if self._client.failure is not None and not self._done:
            raise self._client.failure
        done, self._done = self._done, []
        return done

    async def _work(self, timeout_s: float) -> None:
        """Run handlers until one has an outcome."""
        self._start_handlers()
        if not self._done:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakeup.wait(), timeout_s)
        # What one step finished comes as one list: let handlers that are ready complete.
        seen = -1
        while seen != len(self._done):
            seen = len(self._done)
            await asyncio.sleep(0)
        self._wakeup.clear()

    def _start_handlers(self) -> None:
        from batch_app.engine.vllm_client import RequestRecord

        assert self._loop is not None
        while self._queue and len(self._rendering) < MAX_RENDERING:
            request = self._queue.popleft()
            record = RequestRecord(request.number, self._on_engine)
            self._rendering.add(request.number)
            task = self._loop.create_task(self._handle(request, record))
            self._tasks[request.number] = (task, record)

    def _on_engine(self, record: RequestRecord) -> None:
        """This request's rendering is over; another's may begin."""
        if record.number in self._rendering:
            self._rendering.discard(record.number)
            self._start_handlers()

    async def _handle(self, request: EngineRequest, record: RequestRecord) -> None:
        from batch_app.engine.vllm_client import current_record
        from batch_app.engine.vllm_serving import error_body

        current_record.set(record)
        try:
            status, body = await self._answer(request)
        except Exception as error:  # noqa: BLE001 - one request's misfortune is its own outcome
            message = f"vLLM failed on this request: {type(error).__name__}"
            status, body = 500, error_body(message, kind="InternalServerError", code=500)
        if self._client is not None and self._client.failure is not None:
            return  # An answer made of the engine's death isn't the request's.
        entry = self._tasks.get(request.number)
        if entry is None or entry[1] is not record:
            return  # Cancelled, and perhaps submitted anew.
        del self._tasks[request.number]
        self._on_engine(record)
        self._done.append(_outcome(request.number, status, body, record))
        self._wakeup.set()

    async def _answer(self, request: EngineRequest) -> tuple[int, bytes]:
        from batch_app.engine.vllm_serving import error_body

        assert self._app is not None
        if not self._app.supports(request.endpoint):
            served = ", ".join(self._app.endpoints)
            message = (
                f"The model `{self.spec.name}` does not support {request.endpoint}; "
                f"it supports: {served}"
            )
            return 404, error_body(message, kind="NotFoundError", param="url", code=404)
        try:
            fields = msgspec.json.decode(request.body)
        except msgspec.DecodeError:
            return await self._app.refusal(request.endpoint, request.body)
        if not isinstance(fields, dict):
            return await self._app.refusal(request.endpoint, request.body)
        fields["model"] = self.spec.name
        names_it = request.endpoint in _NAMED and "request_id" not in fields
        if names_it:
            # vLLM would ask the system for random bytes, once a request.
            fields["request_id"] = f"{random.getrandbits(64):016x}"
        parsed = self._app.parse(request.endpoint, fields)
        if parsed is None:
            if names_it:
                del fields["request_id"]  # vLLM tells how many fields a refused body has
            return await self._app.refusal(request.endpoint, msgspec.json.encode(fields))
        for name in ("stream", "background"):
            if getattr(parsed, name, False):
                message = f"`{name}` cannot be true in a batch"
                return 400, error_body(message, param=name)
        return await self._app.answer(request.endpoint, parsed)

    def stats(self) -> EngineStats:
        if self._client is None:
            return EngineStats()
        return self._client.stats(
            not_in_engine=len(self._queue) + len(self._rendering),
            idle=not self._queue and not self._tasks,
        )

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        client, self._client = self._client, None
        core, self._core = self._core, None
        loop, self._loop = self._loop, None
        self._app = None
        self._queue.clear()
        self._done.clear()
        tasks, self._tasks = [task for task, _ in self._tasks.values()], {}
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown()
        elif core is not None:
            core.end()
        if loop is not None:
            with contextlib.suppress(Exception):
                for task in tasks:
                    task.cancel()
                if tasks:
                    loop.run_until_complete(asyncio.wait(tasks, timeout=5))
                loop.run_until_complete(loop.shutdown_asyncgens())
            with contextlib.suppress(Exception):
                loop.close()


def _outcome(number: int, status: int, body: bytes, record: RequestRecord) -> Outcome:
    if status != 200:
        return Outcome(number, status, body)
    tokens, _ = usage_of(body)
    return Outcome(
        number,
        status,
        body,
        prompt_tokens=tokens.prompt_tokens,
        completion_tokens=tokens.completion_tokens,
        cached_tokens=record.cached_tokens,
        reasoning_tokens=tokens.reasoning_tokens,
    )
