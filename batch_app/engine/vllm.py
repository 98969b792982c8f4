"""The real engine: vLLM, answering as `vllm serve` would.

`vllm_requests` has the requests, which are prepared here and run in an engine that is stepped by a
process of its own (`vllm_core`, started by `vllm_process`); `vllm_client` joins the two,
`vllm_serving` is vLLM's OpenAI application, `vllm_setup` what it is all made with.

vllm is imported by `load`, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from batch_app.engine.base import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    ModelSpec,
    Outcome,
)
from batch_app.engine.vllm_load_errors import LogPosition, load_error
from batch_app.engine.vllm_setup import (
    Setup,
    check_source,
    limits_of,
    make_setup,
    set_environment,
)
from batch_app.errors import EngineDied, EngineError

if TYPE_CHECKING:
    from batch_app.core import LimitsTried
    from batch_app.engine.vllm_client import CoreClient
    from batch_app.engine.vllm_core_start import StartMethod
    from batch_app.engine.vllm_grammars import GrammarChecker
    from batch_app.engine.vllm_process import CoreProcess
    from batch_app.engine.vllm_requests import VllmRequests

logger = logging.getLogger(__name__)


def import_libraries() -> None:
    """What `load` imports before it reads a model, done ahead of it. Raises ImportError."""
    set_environment()

    import batch_app.engine.vllm_process
    import batch_app.engine.vllm_requests  # noqa: F401


class VllmEngine(Engine):
    """vLLM with one model. The thread that calls `load` is the one to call everything else."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._loop: asyncio.AbstractEventLoop | None = None
        self._core: CoreProcess | None = None
        self._client: CoreClient | None = None
        self._grammars: GrammarChecker | None = None
        self._requests: VllmRequests | None = None
        self._tried: LimitsTried | None = None
        self._log: LogPosition | None = None

    # -- loading ----------------------------------------------------------------------------------

    def load(self, ahead: Sequence[EngineRequest] = ()) -> EngineInfo:
        """As `Engine.load`. Of those `ahead`, as many are rendered as there is time for."""
        started = time.monotonic()
        check_source(self.spec.source)
        self._log = LogPosition.of_stderr()
        try:
            import_libraries()
            # vLLM collects garbage several times while it loads, and would look through all that
            # was imported each time: 0.9 s.
            gc.freeze()
            return self._load(started, ahead)
        except EngineError:
            self.close()
            raise
        except (Exception, SystemExit) as error:
            self.close()
            raise load_error(self.spec, error, self._tried, self._log) from error
        finally:
            gc.unfreeze()

    def _load(self, started: float, ahead: Sequence[EngineRequest]) -> EngineInfo:
        from batch_app.engine.vllm_core_start import choose_core_start, start_facts
        from batch_app.engine.vllm_process import CoreLostGpu

        method, reason = choose_core_start(start_facts())
        level = logging.WARNING if method == "spawn" else logging.INFO  # it takes seconds more
        logger.log(level, "Starting the engine core by %s: %s.", method, reason)
        try:
            return self._load_into(method, started, ahead)
        except CoreLostGpu as error:
            logger.warning("The forked engine core lost the GPU; spawning another: %s", error)
            self.close()
            return self._load_into("spawn", started, ahead)

    def _load_into(
        self, method: StartMethod, started: float, ahead: Sequence[EngineRequest]
    ) -> EngineInfo:
        from batch_app.engine.vllm_client import CoreClient
        from batch_app.engine.vllm_grammars import GrammarChecker
        from batch_app.engine.vllm_process import CoreProcess
        from batch_app.engine.vllm_requests import VllmRequests
        from batch_app.engine.vllm_serving import OpenAIApp

        grammars = self._grammars = GrammarChecker.start()
        core = self._core = CoreProcess.start(partial(load_error, self.spec, log=self._log), method)
        setup = make_setup(self.spec)
        config, args, self._tried = setup.config, setup.args, setup.tried
        core.configure(config, self._tried)
        # From here on the model loads, and this process gets ready beside it.
        client = self._client = CoreClient(config, core)
        OpenAIApp.prepare()
        loop = self._loop = asyncio.new_event_loop()
        client.connect(loop)
        grammars.connect(loop, config)
        client.grammars = grammars
        app = loop.run_until_complete(OpenAIApp.create(client, args))
        requests = self._requests = VllmRequests(self.spec.name, loop, client, app)
        if not loop.run_until_complete(requests.prepare(ahead, client.loaded())):
            requests.forget_prepared()
            requests.app = loop.run_until_complete(OpenAIApp.create(client, args))
        info = self._info(setup, requests.app.endpoints, load_s=time.monotonic() - started)
        return msgspec.structs.replace(info, attention_backend=client.attention_backend)

    def _info(self, setup: Setup, endpoints: tuple[str, ...], *, load_s: float) -> EngineInfo:
        config = setup.config
        blocks = config.cache_config.num_gpu_blocks
        # As the core found or fitted them.
        limits = limits_of(config, setup.on_cpu)
        return EngineInfo(
            engine="vllm",
            engine_version=setup.tried.engine_version,
            model=self.spec.name,
            device=setup.tried.device,
            device_type="cpu" if setup.on_cpu else "gpu",
            load_s=load_s,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            quantization=config.model_config.quantization,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            kv_cache_tokens=blocks * config.cache_config.block_size if blocks else None,
            gpu_memory_utilization=limits.gpu_memory_utilization,
            enable_prefix_caching=config.cache_config.enable_prefix_caching,
            enable_chunked_prefill=config.scheduler_config.enable_chunked_prefill,
            endpoints=endpoints,
            least_batched_tokens=limits.least_batched_tokens,
            limits_source=setup.limits_source,
        )

    # -- running ----------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._loaded().submit(requests)

    def cancel(self, numbers: Collection[int]) -> None:
        if self._requests is not None:
            self._requests.cancel(numbers)

    def collect(self, timeout_s: float) -> list[Outcome]:
        return self._loaded().collect(timeout_s)

    def _loaded(self) -> VllmRequests:
        if self._requests is None:
            raise EngineDied("the engine isn't loaded")
        return self._requests

    def stats(self) -> EngineStats:
        if self._client is None or self._requests is None:
            return EngineStats()
        return self._client.stats(
            not_in_engine=self._requests.num_before_core, idle=self._requests.is_idle
        )

    # -- the end ----------------------------------------------------------------------------------

    def end_workers(self) -> None:
        core = self._core
        if core is not None:
            core.end_beside()

    def close(self) -> None:
        client, self._client = self._client, None
        core, self._core = self._core, None
        grammars, self._grammars = self._grammars, None
        loop, self._loop = self._loop, None
        requests, self._requests = self._requests, None
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown()
        elif core is not None:
            core.end()
        if grammars is not None:
            grammars.close()
        if loop is not None:
            with contextlib.suppress(Exception):
                if requests is not None:
                    requests.close()
                loop.run_until_complete(loop.shutdown_asyncgens())
            with contextlib.suppress(Exception):
                loop.close()
