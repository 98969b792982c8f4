"""Constraints that may be slow are compiled in a separate process before the engine gets them.

vLLM compiles a schema, an expression or a grammar in the engine process, a few at a time, and a
slow one holds up every other request with a constraint. A compilation can't be interrupted, so it
is tried first where it can be killed. `serve_checks` runs in a process that is forked before
anything starts a thread; it forks once more for each compilation.

Nothing here touches a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import pickle
import re
import resource
import signal
import socket
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson

from batch_app.engine.grammar_processes import Compilations
from batch_app.engine.lifeline import die_with_parent
from batch_app.engine.vllm_messages import RECEIVE_BYTES, framed, unframed

logger = logging.getLogger(__name__)

#: What one compilation may take before its constraint is refused: seconds of processor time in all
#: of its threads, and bytes of memory. A string with `maxLength` 1,000 takes 10 s of processor time
#: where the vocabulary has 128,000 tokens.
MAX_CPU_S = 60
MAX_BYTES = 4 << 30
#: Constraints shorter than this, without anything of `_SLOW`, compile in milliseconds.
PLAIN_BYTES = 4096
#: What can make a short schema slow: references, alternatives, patterns and counts of 3 digits.
_SLOW = re.compile(
    rb'"(?:\$\w*ref|allOf|anyOf|oneOf|not|if|pattern|patternProperties|grammar)"'
    rb'|"(?:min|max)(?:Length|Items|Properties)":\d{3}'
)
_MAX_VERDICTS = 10_000


class ConstraintRefused(ValueError):
    """This constraint would hold up the engine; the request gets a 400."""


def constraint_bytes(constraint: Any) -> bytes:
    """The JSON of what vLLM's `StructuredOutputsParams` asks for."""
    return orjson.dumps(
        [
            constraint.json,
            constraint.regex,
            constraint.choice,
            constraint.grammar,
            constraint.structural_tag,
            constraint.whitespace_pattern,
        ],
        default=str,
    )


def may_be_slow(constraint: Any, as_bytes: bytes) -> bool:
    """Whether to try this constraint elsewhere first."""
    if constraint.grammar is not None or constraint.regex is not None:
        return True
    if len(as_bytes) > PLAIN_BYTES:
        return True
    # A schema that came as a text has its quotes escaped.
    return _SLOW.search(as_bytes.replace(b"\\", b"").replace(b": ", b":")) is not None


class Prepare(NamedTuple):
    """What to compile for. `config`: a `VllmConfig`, pickled with what its classes need."""

    config: bytes


class Check(NamedTuple):
    key: bytes
    sampling_params: Any


class GrammarChecker:
    """The process that compiles, seen from the event loop that prepares requests."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self._pid = pid
        self._line = line
        self._config: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[bytes, asyncio.Future[str]] = {}
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._received = bytearray()
        self._sending = asyncio.Lock()
        self._is_prepared = False
        self._is_gone = False

    @classmethod
    def start(cls) -> GrammarChecker:
        """Fork it. No other thread may be running."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            return cls(pid, ours)
        try:
            ours.close()
            die_with_parent()
            serve_checks(theirs)
        finally:
            os._exit(1)

    def connect(self, loop: asyncio.AbstractEventLoop, vllm_config: Any) -> None:
        """Serve in `loop` from now on."""
        self._loop, self._config = loop, vllm_config
        self._line.setblocking(False)
        loop.add_reader(self._line, self._receive)

    async def check(self, sampling_params: Any, on_wait: Callable[[], None] | None = None) -> None:
        """Wait until the constraint of these parameters was compiled; `on_wait` is called before,
        unless the verdict is known.

        Raises ConstraintRefused where it took too long, too much memory, or killed its process.
        """
        as_bytes = constraint_bytes(sampling_params.structured_outputs)
        if self._is_gone or not may_be_slow(sampling_params.structured_outputs, as_bytes):
            return
        key = _key(as_bytes)
        verdict = self._verdicts.get(key)
        if verdict is None:
            if on_wait is not None:
                on_wait()
            verdict = await self._ask(key, sampling_params)
        if verdict:
            raise ConstraintRefused(verdict)

    def close(self) -> None:
        """End the process. Idempotent."""
        self._give_up()
        if self._pid:
            with contextlib.suppress(OSError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
            self._pid = 0

    # -- inside --------------------------------------------------------------------------------

    async def _ask(self, key: bytes, sampling_params: Any) -> str:
        assert self._loop is not None
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = self._loop.create_future()
            await self._send(Check(key, sampling_params))
        # Another request may wait for the same: one that is cancelled leaves it.
        return await asyncio.shield(asked)

    async def _send(self, check: Check) -> None:
        assert self._loop is not None
        async with self._sending:
            if self._is_gone:
                return
            frame = framed(check)
            if not self._is_prepared:
                self._is_prepared = True
                frame = framed(Prepare(_pickled(self._config))) + frame
            try:
                await self._loop.sock_sendall(self._line, frame)
            except OSError:
                self._give_up()

    def _receive(self) -> None:
        try:
            data = self._line.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            logger.warning("Constraints are compiled in the engine unchecked: the checker ended.")
            self._give_up()
            return
        self._received += data
        for verdict in unframed(self._received):
            self._verdicts[verdict.key] = verdict.refusal
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
            asked = self._asked.pop(verdict.key, None)
            if asked is not None and not asked.done():
                asked.set_result(verdict.refusal)

    def _give_up(self) -> None:
        """Let everything pass from now on."""
        if self._is_gone:
            return
        self._is_gone = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._line)
        self._line.close()
        asked, self._asked = self._asked, {}
        for future in asked.values():
            if not future.done():
                future.set_result("")


def _key(as_bytes: bytes) -> bytes:
    return hashlib.sha256(as_bytes).digest()


def _pickled(config: Any) -> bytes:
    import cloudpickle
    from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

    maybe_register_config_serialize_by_value()  # classes of a model's own code
    pickled: bytes = cloudpickle.dumps(config)
    return pickled


# -- in the process that compiles -----------------------------------------------------------------


def serve_checks(line: socket.socket) -> None:
    """Answer each `Check` with a `Verdict` until the line ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # vLLM would log each constraint that it can't compile
    compiler: _Compiler | None = None
    compilations = Compilations(max(1, (os.cpu_count() or 1) // 2))
    received = bytearray()
    while True:
        verdicts = compilations.wait(line)
        if verdicts:
            line.sendall(b"".join(map(framed, verdicts)))
        if not compilations.has_input:
            continue
        data = line.recv(RECEIVE_BYTES)
        if not data:
            return
        received += data
        for message in unframed(received):
            if isinstance(message, Prepare):
                compiler = _Compiler(pickle.loads(message.config))  # noqa: S301 - our own
            elif compiler is not None:
                compilations.add(message.key, compiler.compile, message.sampling_params)


class _Compiler:
    """vLLM's own structured-output manager, used as its engine uses it."""

    def __init__(self, config: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.structured_output import StructuredOutputManager

        self._config = config
        self._manager = StructuredOutputManager(config)
        self._manager._use_async_grammar_compilation = False  # in this thread
        # Make the tables of the vocabulary once, for all compilations to inherit.
        with contextlib.suppress(Exception):
            any_object = StructuredOutputsParams(json_object=True)
            self._run(SamplingParams(structured_outputs=any_object))

    def compile(self, sampling_params: Any) -> None:
        """Compile it, within bounds on processor time and memory. Raises MemoryError.

        Whatever else goes wrong says the engine, in its own words.
        """
        _bound_this_process()
        try:
            error = self._run(sampling_params)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - vLLM's validators raise all sorts of things
            return
        if isinstance(error, MemoryError):
            raise error

    def _run(self, sampling_params: Any) -> Any:
        from vllm.v1.structured_output.request import StructuredOutputRequest

        config = self._config
        sampling_params._validate_structured_outputs(
            config.model_config, config.structured_outputs_config, self._manager.tokenizer
        )
        request = StructuredOutputRequest.from_sampling_params(sampling_params)
        self._manager.grammar_init(
            SimpleNamespace(
                request_id="", sampling_params=sampling_params, structured_output_request=request
            )
        )
        return request.grammar if request is not None else None


def _bound_this_process() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
