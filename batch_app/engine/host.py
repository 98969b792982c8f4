"""An engine in a process of its own, seen from the worker: the same interface, one step removed.

Adds what only the outside can do: notice that the engine died or hangs, and kill it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from batch_app.cluster import auth_token
from batch_app.engine.base import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    ModelSpec,
    Outcome,
)
from batch_app.engine.channel import (
    Cancel,
    Cancelled,
    Channel,
    Fatal,
    Finished,
    FromEngine,
    Load,
    Loaded,
    LoadFailed,
    Reading,
    Submit,
    ToEngine,
    Unavailable,
    from_engine_decoder,
)
from batch_app.engine.fetch import local_folder
from batch_app.engine.memory import num_oom_kills, says_out_of_memory
from batch_app.engine.process import EngineProcess, Network
from batch_app.errors import (
    ConfigError,
    EngineDied,
    EngineHung,
    EngineInterrupted,
    EngineLoadError,
    EngineOutOfMemory,
    EngineUnavailable,
)
from batch_app.model_server import ModelServer

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_DUMP_GRACE_S = 1.0
_LOG_TAIL_BYTES = 4096
#: The longest silence allowed, in steps of the size and pace seen so far; and in `hang_s`, so that
#: a pace that is measured wrongly never hides an engine that hangs.
_STEPS_ALLOWED = 3
_MOST_HANG_LIMITS = 4
NOT_ISOLATED = (
    "The engine has no network of its own (%s): where it listens on 127.0.0.1, every user of this "
    "machine can connect to it. Allow the worker network namespaces, or set engine_network=host "
    "to accept this without a warning. See docs/security.md."
)


class EngineHost(Engine):
    """Runs the engine that `spec` names in a child process.

    `isolated`: in a network of its own, where the kernel allows it; where not, a warning says so.
    `interrupted` is asked while the model loads; when it answers True, loading is given up.
    `ready`: a process to take instead of a new one, if it has the network that is asked for.
    Loading and collecting belong to one thread, as with every engine.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        log_path: Path,
        start_timeout_s: float = 1800.0,
        hang_s: float = 300.0,
        isolated: bool = True,
        interrupted: Callable[[], bool] = lambda: False,
        ready: EngineProcess | None = None,
    ) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        #: Of the model's files, once it loads.
        self.folder = spec.source
        self._log_path = log_path
        self._start_timeout_s = start_timeout_s
        self._hang_s = hang_s
        self._network: Network = "isolated" if isolated else "host"
        self._interrupted = interrupted
        self._ready = ready
        self._process: EngineProcess | None = None
        self._inbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._stats = EngineStats()
        self._in_flight: set[int] = set()
        # Numbers come again, in the next batch: until the engine says that it has heard of the
        # n-th cancelling, what comes under a number of it is the answer to what was cancelled.
        self._cancelled: dict[int, int] = {}
        self._num_cancels = self._num_heard_of = 0
        self._last_progress = 0.0
        # Tokens that came, and the seconds of waiting for them: the pace of the longest step.
        self._tokens = 0
        self._computing_s = 0.0
        self._raised = False

    @property
    def pid(self) -> int | None:
        """Of the engine process, while there is one."""
        return self._process.pid if self._process else None

    def load(self, ahead: Sequence[EngineRequest] = ()) -> EngineInfo:
        folder = self.spec.source
        if self.spec.engine == "vllm" or self.spec.engine_args.get("from_hub"):
            folder = self.folder = local_folder(self.spec, self._start_timeout_s, self._interrupted)
        self._start()
        spec = msgspec.structs.replace(self.spec, source=folder)
        self._send(Load(spec, self._api_key(), list(ahead)))
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            message = self._next(_TICK_S)
            if isinstance(message, Loaded):
                self.info = message.info
                if message.not_isolated:
                    logger.warning(NOT_ISOLATED, message.not_isolated)
                self._last_progress = time.monotonic()
                return message.info
            if isinstance(message, LoadFailed):
                self.close()
                raise EngineLoadError(
                    message.message, retriable=message.retriable, retry=message.retry
                )
            if self._interrupted():
                self.close()
                raise EngineInterrupted(f"Loading {self.spec.name} was interrupted.")
            if time.monotonic() > deadline:
                self._dump_stacks()
                self.close()
                raise EngineLoadError(
                    f"{self.spec.name} did not load within {self._start_timeout_s:.0f} s "
                    "(engine_start_timeout_s).",
                    retriable=True,
                )

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        if not self._in_flight:
            self._last_progress = time.monotonic()
        self._in_flight.update(request.number for request in requests)
        self._send(Submit(list(requests)))

    def cancel(self, numbers: Collection[int]) -> None:
        self._in_flight.difference_update(numbers)
        self._num_cancels += 1
        self._cancelled.update(dict.fromkeys(numbers, self._num_cancels))
        self._send(Cancel(list(numbers)))

    def collect(self, timeout_s: float) -> list[Outcome]:
        """As `Engine.collect`.

        Raises also:
            EngineHung: requests are in flight and no token came for `hang_s`; it was killed.
        """
        outcomes: list[Outcome] = []
        deadline = time.monotonic() + timeout_s
        while self._in_flight:
            remaining = deadline - time.monotonic()
            message = self._next(0 if outcomes else max(0.0, min(remaining, _TICK_S)))
            if isinstance(message, Finished):
                self._last_progress = time.monotonic()
                for outcome in message.outcomes:
                    if self._is_awaited(outcome.number):
                        self._in_flight.discard(outcome.number)
                        outcomes.append(outcome)
                continue
            if isinstance(message, Reading | Cancelled):
                continue
            if outcomes or remaining <= 0:
                break
            self._check_hang()
        else:
            # Nothing is awaited; a last reading, or the engine's end, may have come all the same.
            while not outcomes and self._process is not None and self._next(0) is not None:
                pass
        return outcomes

    def stats(self) -> EngineStats:
        return self._stats

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight; then `stats` is as old as the last request. Any thread."""
        return not self._in_flight

    @property
    def silent_s(self) -> float:
        """Seconds without any token although requests are in flight; 0 with none. Any thread."""
        return time.monotonic() - self._last_progress if self._in_flight else 0.0

    def close(self) -> None:
        process, self._process = self._process, None
        self._in_flight.clear()
        if process is not None:
            process.close()

    # -- inside --------------------------------------------------------------------------------

    def _is_awaited(self, number: int) -> bool:
        """Whether an outcome under this number is that of the request in flight."""
        is_old = self._cancelled.get(number, 0) > self._num_heard_of
        return number in self._in_flight and not is_old

    def _api_key(self) -> str:
        """For the server or cluster that has the model; its process doesn't inherit it."""
        if self.spec.engine not in ("openai", "ray"):
            return ""
        try:
            if self.spec.engine == "ray":
                return auth_token(os.environ)
            return ModelServer.of(self.spec.engine_args).api_key(os.environ)
        except ConfigError as error:
            self.close()
            raise EngineLoadError(f"model {self.spec.name!r}: {error.message}") from None

    def _start(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None and ready.network != self._network:
            ready.close()
            ready = None
        self._process = ready or EngineProcess(self._log_path, self._network)
        self._inbox = queue.SimpleQueue()
        threading.Thread(
            target=_listen,
            args=(self._process.channel, self._inbox),
            name="engine-channel",
            daemon=True,
        ).start()

    def _send(self, message: ToEngine) -> None:
        if self._process is None:
            raise EngineDied("The engine is not running.")
        try:
            self._process.channel.send(message)
        except OSError:
            raise self._died() from None

    def _next(self, timeout_s: float) -> FromEngine | None:
        """The next message, None after `timeout_s` without one. Raises EngineDied."""
        try:
            message = self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
        except queue.Empty:
            return None
        if message is None:
            raise self._died()
        if isinstance(message, Fatal):
            kind: type[EngineDied] = EngineDied
            if says_out_of_memory(message.message) or self._ran_out_of_memory(message.exit_code):
                kind = EngineOutOfMemory
            self.close()
            raise kind(f"The engine failed: {message.message}", exit_code=message.exit_code)
        if isinstance(message, Unavailable):
            self.close()
            raise EngineUnavailable(
                message.message, retry_after_s=message.retry_after_s, model=self.spec.name
            )
        if isinstance(message, Cancelled):
            self._num_heard_of += 1
            if self._num_heard_of == self._num_cancels:
                self._cancelled.clear()
        if isinstance(message, Reading):
            is_sign_enough = self.info is not None and self.info.bounds_requests
            if is_sign_enough or _has_progressed(self._stats, message.stats):
                now = time.monotonic()
                if self._in_flight:
                    self._computing_s += now - self._last_progress
                    self._tokens += _num_tokens(message.stats) - _num_tokens(self._stats)
                self._last_progress = now
            self._stats = message.stats
        return message

    def _died(self) -> EngineDied:
        exit_code = self._process.wait() if self._process is not None else None
        how = f"exit code {exit_code}"
        if exit_code is not None and exit_code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-exit_code).name}"
        kind: type[EngineDied] = EngineDied
        if self._ran_out_of_memory(exit_code):
            kind, how = EngineOutOfMemory, f"out of memory, {how}"
        self.close()
        return kind(
            f"The engine process ended ({how}); its output is in {self._log_path}.",
            exit_code=exit_code,
        )

    def _ran_out_of_memory(self, exit_code: int | None) -> bool:
        process = self._process
        if process is None:
            return False
        if exit_code == -signal.SIGKILL:  # nothing can be said after that; the kernel keeps count
            return num_oom_kills() > process.oom_kills_before
        try:
            with self._log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(process.log_start, end - _LOG_TAIL_BYTES))
                return says_out_of_memory(log.read().decode(errors="replace"))
        except OSError:
            return False

    def _check_hang(self) -> None:
        silent_s = time.monotonic() - self._last_progress
        if silent_s < self._hang_s:
            return
        step_tokens = (self.info.max_num_batched_tokens if self.info else None) or 0
        allowed_s = silence_allowed_s(self._hang_s, step_tokens, self._tokens, self._computing_s)
        if silent_s < allowed_s:
            if not self._raised:
                self._raised = True
                logger.warning(
                    "No token for %.0f s (engine_hang_s): waiting for up to %.0f s, since a step "
                    "of %d tokens takes long at the %.1f tokens/s seen so far.",
                    silent_s,
                    allowed_s,
                    step_tokens,
                    self._tokens / self._computing_s,
                )
            return
        self._dump_stacks()
        num_in_flight = len(self._in_flight)
        self.close()
        raise EngineHung(
            f"No token for {silent_s:.0f} s with {num_in_flight} requests in flight "
            f"(engine_hang_s): the engine was killed. Its stacks are in {self._log_path}."
        )

    def _dump_stacks(self) -> None:
        if self._process is not None:
            self._process.dump_stacks()
            self._process.wait(_DUMP_GRACE_S)


def silence_allowed_s(hang_s: float, step_tokens: int, tokens: int, computing_s: float) -> float:
    """Seconds without a token after which an engine hangs: at least `hang_s`.

    More where `_STEPS_ALLOWED` steps of `step_tokens` take longer, at the pace of `tokens` that
    came in `computing_s`; never more than `_MOST_HANG_LIMITS` times `hang_s`.
    """
    if tokens <= 0 or computing_s <= 0:
        return hang_s
    expected_s = _STEPS_ALLOWED * step_tokens * computing_s / tokens
    return min(max(hang_s, expected_s), _MOST_HANG_LIMITS * hang_s)


def _num_tokens(stats: EngineStats) -> int:
    return stats.prompt_tokens_total + stats.generation_tokens_total


def _has_progressed(before: EngineStats, now: EngineStats) -> bool:
    return (
        now.generation_tokens_total > before.generation_tokens_total
        or now.prompt_tokens_total > before.prompt_tokens_total
    )


def _listen(channel: Channel, inbox: queue.SimpleQueue[FromEngine | None]) -> None:
    """Always reading, so that the engine never blocks on a worker that is busy sending to it."""
    while (data := channel.receive()) is not None:
        inbox.put(from_engine_decoder.decode(data))
    inbox.put(None)
