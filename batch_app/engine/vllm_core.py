"""vLLM's engine in a process of its own, started by the one that prepares requests.

The parent templates and tokenises requests and shapes answers (`vllm_client`); this process does
nothing but step the engine. vLLM has such a split of its own, which sends every token of every
step through the socket and starts its process anew. Here tokens become text where they are made,
so that only what is finished crosses, and a fork costs no second import (`vllm_process`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from batch_app.core import LimitsTried
from batch_app.engine.base import EngineStats
from batch_app.engine.vllm_core_line import CoreLine
from batch_app.engine.vllm_core_start import is_lost_in_fork
from batch_app.engine.vllm_messages import (
    Abort,
    Add,
    Configure,
    CoreFailed,
    CoreLoaded,
    CoreLoadFailed,
    FromCore,
    GpuLostInFork,
    Stepped,
    ToCore,
    framed,
    unframed,
)
from batch_app.errors import EngineLoadError

#: Puts an exception into words; with the limits it was to load with, if that is known.
Explain = Callable[[BaseException, LimitsTried | None], EngineLoadError]

STATS_EVERY_S = 0.25
#: As vLLM's own loop pauses.
STALLED_S = 0.001
_END_WORKERS_S = 5.0


def serve_core(sock: socket.socket, explain: Explain, *, was_forked: bool) -> int:
    """Load what the first message says, then step until the line ends. Returns an exit code.

    Sends `CoreLoaded`, or `CoreLoadFailed` in the words of `explain`, or `GpuLostInFork`. Ends the
    processes that vLLM started for it.
    """
    with contextlib.suppress(ValueError):  # not where a test forks from another thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = CoreLine(sock)
    wanted: Configure | None = None
    try:
        _import_ahead()
        wanted = line.receive_first()
        if wanted is None:
            return 0
        core = _Core(wanted, line)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - put into words by `explain`
        traceback.print_exc()
        failure: FromCore
        if was_forked and is_lost_in_fork(error):
            failure = GpuLostInFork(f"{type(error).__name__}: {error}"[:500])
        else:
            failed = explain(error, wanted and wanted.started_with)
            failure = CoreLoadFailed(failed.message, failed.retriable, failed.retry)
        return _fail(line, failure)
    line.put(framed(core.loaded()))
    try:
        core.run()
        core.end_workers()
    except Exception as error:  # noqa: BLE001 - whatever it was, the engine can't go on
        traceback.print_exc()
        return _fail(line, CoreFailed(f"{type(error).__name__}: {error}"[:500]))
    return 0


def _fail(line: CoreLine, failure: FromCore) -> int:
    line.put(framed(failure))
    line.flush()
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(_END_WORKERS_S / len(workers))
    return 1


def _import_ahead() -> None:
    """What the engine needs beyond its configuration, while the parent makes that."""
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine  # noqa: F401

    with contextlib.suppress(ImportError):  # the configuration names another one
        kind = "cpu" if current_platform.is_cpu() else "gpu"
        importlib.import_module(f"vllm.v1.worker.{kind}_worker")


class _Core:
    """The engine and what is counted of it."""

    def __init__(self, wanted: Configure, line: CoreLine) -> None:
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from batch_app.engine import vllm_kernels, vllm_seeds

        os.environ.update(wanted.environment)
        vllm_kernels.register()
        if current_platform.is_cpu():
            vllm_seeds.draw_aside()
        vllm_config = pickle.loads(wanted.config)  # noqa: S301 - our own
        self.line = line
        self.readings = StatsReading()
        self._prompt_tokens: dict[str, int] = {}  # of requests without an output so far
        engine = LLMEngine.from_vllm_config(
            vllm_config, usage_context=UsageContext.LLM_CLASS, disable_log_stats=False
        )
        self.engine = engine
        self.vllm_config = vllm_config
        # The scheduler's readings come at each step, to `_step`. Those of vLLM's front end would
        # take a few calls for each token, and its loggers update dozens of metrics at every step.
        engine.logger_manager = None
        engine.log_stats = engine.output_processor.log_stats = False
        # Keys are unique already: no random suffix, whose system call gives the lock away.
        engine.input_processor.assign_request_id = _keep_request_id
        self._engine_core = engine.engine_core.engine_core
        self._vllms_step = self._engine_core.step_fn
        self._engine_core.step_fn = self._step
        self._has_executed = False
        # What is there now stays: no collection need ever look at it again.
        gc.collect()
        gc.freeze()

    def loaded(self) -> CoreLoaded:
        return CoreLoaded(
            tuple(self.engine.get_supported_tasks()),
            self.vllm_config.cache_config.num_gpu_blocks,
            self.vllm_config.model_config.max_model_len,
            self._attention_backend(),
        )

    def _attention_backend(self) -> str | None:
        """Return the names of the attention backends of the model's layers, as "CPU_ATTN".

        None if the layers are in another process, as with tensor parallelism.
        """
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        layers = self.vllm_config.compilation_config.static_forward_context.values()
        names = {
            layer.get_attn_backend().get_name()
            for layer in layers
            if isinstance(layer, AttentionLayerBase)
        }
        return ", ".join(sorted(names)) or None

    def run(self) -> None:
        """Step until the line ends. Raises whatever the engine raises."""
        next_stats = 0.0
        busy = False
        wait_s: float | None = None
        while True:
            messages = self.line.exchange(wait_s)
            if messages is None:
                return
            outputs = self._take(messages)
            if self._has_work():
                outputs += [(output.request_id, output) for output in self.engine.step()]
            was_busy, busy = busy, self.engine.has_unfinished_requests()
            if not busy:
                self.readings.rest()
            now = time.monotonic()
            if outputs or was_busy > busy or now >= next_stats:
                self.line.put(_framed_step(outputs, self.readings.snapshot()))
                next_stats = now + STATS_EVERY_S
            wait_s = self._wait_s()

    def end_workers(self) -> None:
        """Have vLLM end its workers, where there are several. A core alone may just end."""
        if multiprocessing.active_children():
            self.engine.engine_core.shutdown()

    def _has_work(self) -> bool:
        """Whether to step: as in vLLM's own loop, also for what only the scheduler has left.

        With asynchronous scheduling a step's outputs come one step later, so that one may be on its
        way although no request is left, the last having been aborted.
        """
        core = self._engine_core
        return bool(
            self.engine.has_unfinished_requests()
            or core.batch_queue
            or core.scheduler.has_requests()
        )

    def _wait_s(self) -> float | None:
        """How long to wait for a message before the next step; None: for ever, nothing is left.

        Where nothing could be scheduled (all wait for their grammars to be compiled, or for a
        transfer), whoever works on that needs Python, which a loop without a pause would hold.
        """
        if not self._has_work():
            return None
        stalled = not self._has_executed and self._engine_core.scheduler.has_requests()
        return STALLED_S if stalled else 0.0

    def _take(self, messages: list[ToCore]) -> list[tuple[str, Any]]:
        """Do as told; the exceptions of the requests that the engine would not have."""
        refused: list[tuple[str, Any]] = []
        aborted: list[str] = []
        for message in messages:
            if isinstance(message, Add):
                try:
                    self._add(message)
                except Exception as error:  # noqa: BLE001 - this request's own: it gets it
                    aborted.append(message.key)
                    refused.append((message.key, error))
            elif isinstance(message, Abort):
                # After the additions: a request may be aborted before it was ever added.
                aborted += message.keys
        if aborted:
            for key in aborted:
                self._prompt_tokens.pop(key, None)
            self.engine.abort_request(aborted)
        return refused

    def _add(self, addition: Add) -> None:
        request = addition.request
        self._prompt_tokens[addition.key] = len(request.prompt_token_ids or ())
        self.engine.add_request(
            addition.key, request, request.params, prompt_text=addition.prompt_text
        )

    def _step(self) -> tuple[Any, bool]:
        """vLLM's own step, and count its outputs. It returns None where they come with the next."""
        outputs, self._has_executed = self._vllms_step()
        # By client; this is the only one.
        if outputs and (ours := outputs.get(0)):
            self._count(ours)
        return outputs, self._has_executed

    def _count(self, outputs: Any) -> None:
        readings = self.readings
        readings.record(outputs.scheduler_stats)
        waiting = self._prompt_tokens
        for output in outputs.outputs:
            readings.generation_tokens += len(output.new_token_ids)
            if waiting:
                # One of several choices is named `<index>_<key>`.
                key = output.request_id.rpartition("_")[2]
                readings.prompt_tokens += waiting.pop(key, 0)
            for event in output.events or ():
                readings.preemptions += event.type.name == "PREEMPTED"


def _keep_request_id(request: Any) -> None:
    request.external_req_id = request.request_id


def _framed_step(outputs: list[tuple[str, Any]], stats: EngineStats) -> bytes:
    try:
        frame = framed(Stepped(outputs, stats))
        if any(isinstance(output, Exception) for _, output in outputs):
            next(unframed(bytearray(frame)))  # some don't come back
        return frame
    except Exception:  # noqa: BLE001 - exceptions have constructors of any kind
        plain = [
            (key, RuntimeError(str(output)) if isinstance(output, Exception) else output)
            for key, output in outputs
        ]
        return framed(Stepped(plain, stats))


class StatsReading:
    """The latest reading of the scheduler, and the sums over all of them."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_waiting = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.kv_cache_usage = 0.0
        self.steps = 0

    def record(self, scheduler_stats: Any) -> None:
        """Of one step, or None where it made no reading."""
        if scheduler_stats is None:
            return
        self.steps += 1
        self.num_running = scheduler_stats.num_running_reqs
        self.num_waiting = scheduler_stats.num_waiting_reqs + getattr(
            scheduler_stats, "num_skipped_waiting_reqs", 0
        )
        self.kv_cache_usage = scheduler_stats.kv_cache_usage
        prefix = scheduler_stats.prefix_cache_stats
        if prefix is not None:
            self.prefix_queries += prefix.queries
            self.prefix_hits += prefix.hits

    def rest(self) -> None:
        """Nothing is left to do: no step will say so."""
        self.num_running = self.num_waiting = 0
        self.kv_cache_usage = 0.0

    def snapshot(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            prompt_tokens_total=self.prompt_tokens,
            generation_tokens_total=self.generation_tokens,
            prefix_cache_queries_total=self.prefix_queries,
            prefix_cache_hits_total=self.prefix_hits,
            preemptions_total=self.preemptions,
            kv_cache_usage=self.kv_cache_usage,
            steps_total=self.steps,
            at_s=time.monotonic(),
        )
