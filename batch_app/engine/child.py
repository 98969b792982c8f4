"""The engine process: `python -m batch_app.engine.child FD NETWORK ENGINE`; see `engine.process`.

Holds one engine for one model. Ends when its channel does, so it never outlives its worker, even
when that is killed and even when the engine itself hangs: a thread of its own watches the channel.
With `isolated` as NETWORK it is in a network of its own (`engine.isolation`), with `host` in the
machine's. With a name as ENGINE it imports that engine's libraries at once, before it is told what
to load.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from batch_app.engine.base import Engine, EngineInfo, ModelSpec, Outcome
from batch_app.engine.channel import (
    Cancel,
    Cancelled,
    Channel,
    Fatal,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Reading,
    Submit,
    ToEngine,
    Unavailable,
    to_engine_decoder,
)
from batch_app.engine.isolation import ON_LOOPBACK, isolate_network, prepare_nvidia_devices
from batch_app.engine.lifeline import die_with_parent
from batch_app.errors import BatchAppError, EngineError, EngineLoadError, EngineUnavailable

#: Where each engine of the registry lives. Imported by name: no engine loads another's libraries.
ENGINES = {
    "vllm": ("batch_app.engine.vllm", "VllmEngine"),
    "openai": ("batch_app.engine.openai", "OpenAIEngine"),
    "ray": ("batch_app.engine.ray", "RayEngine"),
    "sim": ("batch_app.engine.sim", "SimEngine"),
}
#: Garbage is looked for seldom: imports and loading make a million objects that stay, and looking
#: through them again and again took a sixth of vLLM's import. The core, forked later, inherits it.
GC_THRESHOLDS = (50_000, 20, 100)
COLLECT_S = 0.05
IDLE_S = 5.0
#: On a CPU: how much nicer than the core is who prepares its requests. An operator waits for the
#: last of the core's threads, so a slice taken from one of them is taken from all.
NICER_ON_CPU = 10
STATS_EVERY_S = 0.5
#: Of bodies in one message, whose length has four bytes: a server's answers may be large.
MAX_FINISHED_BYTES = 256 << 20


def make_engine(spec: ModelSpec, api_key: str = "") -> Engine:
    """`api_key`: for an engine that is a server or a cluster.

    Raises EngineLoadError when the registry names an engine that doesn't exist.
    """
    try:
        module, name = ENGINES[spec.engine]
    except KeyError:
        raise EngineLoadError(
            f"The model {spec.name!r} asks for the engine {spec.engine!r}; there are: "
            f"{', '.join(sorted(ENGINES))}."
        ) from None
    try:
        engine_class = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise EngineLoadError(
            f"The engine {spec.engine!r} is not installed here: {error}"
        ) from error
    engine: Engine = engine_class(spec, api_key) if api_key else engine_class(spec)
    return engine


def get_ready(engine: str) -> None:
    """Import what this engine needs. What isn't there is said by `load`, to somebody who waits."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module(ENGINES[engine][0])
        if hasattr(module, "import_libraries"):
            module.import_libraries()


def serve(channel: Channel, engine_name: str = "", not_isolated: str = "") -> int:
    """Load what the first message says, then work until the channel ends. Returns an exit code.

    `engine_name`: what it is going to be, if that is known already.
    `not_isolated`: why this process has no network of its own, although it should; to be told.
    """
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    engines: list[Engine] = []
    threading.Thread(target=_listen, args=(channel, inbox, engines), daemon=True).start()
    if engine_name in ENGINES:
        get_ready(engine_name)
    first = inbox.get()
    if not isinstance(first, Load):
        return 2
    try:
        engine = make_engine(first.spec, first.api_key)
        engines.append(engine)
        info = engine.load(first.ahead)
    except EngineUnavailable as error:
        channel.send(Unavailable(error.message, error.retry_after_s))
        return 1
    except EngineLoadError as error:
        channel.send(LoadFailed(error.message, error.retriable, error.retry))
        return 1
    gc.freeze()  # what is there now stays
    if _is_on_cpu(info):
        _make_way()
    channel.send(Loaded(info, not_isolated))
    try:
        _work(engine, inbox, channel)
    except EngineUnavailable as error:
        channel.send(Unavailable(error.message, error.retry_after_s))
        return 1
    except EngineError as error:
        channel.send(Fatal(error.message, getattr(error, "exit_code", None)))
        return 1
    finally:
        engine.close()
    return 0


def _is_on_cpu(info: EngineInfo) -> bool:
    return info.engine == "vllm" and info.device_type == "cpu"


def _make_way() -> None:
    """Let the core, forked already, go first wherever both want a processor."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            now = os.getpriority(os.PRIO_PROCESS, int(thread.name))
            os.setpriority(os.PRIO_PROCESS, int(thread.name), now + NICER_ON_CPU)


def _listen(
    channel: Channel, inbox: queue.SimpleQueue[ToEngine], engines: Sequence[Engine]
) -> None:
    while (data := channel.receive()) is not None:
        inbox.put(to_engine_decoder.decode(data))
    # The worker is gone, or has let go of us. Whatever the engine is doing, nobody waits for it;
    # its memory is freed by ending. Only processes that it started may need an orderly end.
    try:
        for engine in engines:
            engine.end_workers()
    finally:
        os._exit(0)


def _work(engine: Engine, inbox: queue.SimpleQueue[ToEngine], channel: Channel) -> None:
    in_flight: set[int] = set()
    next_stats = 0.0
    while True:
        try:
            try:
                message = inbox.get(block=not in_flight, timeout=IDLE_S)
            except queue.Empty:
                if not in_flight:
                    engine.collect(0.0)
                    continue
                raise
            while True:
                if isinstance(message, Submit):
                    engine.submit(message.requests)
                    in_flight.update(request.number for request in message.requests)
                elif isinstance(message, Cancel):
                    engine.cancel(message.numbers)
                    in_flight.difference_update(message.numbers)
                    channel.send(Cancelled())
                message = inbox.get_nowait()
        except queue.Empty:
            pass
        outcomes = engine.collect(COLLECT_S)
        if outcomes:
            in_flight.difference_update(outcome.number for outcome in outcomes)
            for some in _portions(outcomes):
                channel.send(Finished(some))
        now = time.monotonic()
        if now >= next_stats or not in_flight:
            channel.send(Reading(engine.stats()))
            next_stats = now + STATS_EVERY_S


def _portions(outcomes: list[Outcome], most_bytes: int = MAX_FINISHED_BYTES) -> list[list[Outcome]]:
    """The outcomes in lists that have so many bytes of bodies at most, or a single outcome."""
    portions: list[list[Outcome]] = [[]]
    size = 0
    for outcome in outcomes:
        size += len(outcome.body)
        if size > most_bytes and portions[-1]:
            portions.append([])
            size = len(outcome.body)
        portions[-1].append(outcome)
    return portions


def _isolate() -> str:
    """Leave the machine's network. Returns why that was not possible, if it wasn't."""
    prepare_nvidia_devices()
    try:
        isolate_network()
    except OSError as error:
        return error.strerror or str(error)
    os.environ.update(ON_LOOPBACK)
    return ""


def main() -> int:
    descriptor, network, engine_name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    not_isolated = _isolate() if network == "isolated" else ""
    # A second line behind `_listen`. After the isolation: new credentials end such a wish.
    die_with_parent()
    gc.set_threshold(*GC_THRESHOLDS)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Some library of an engine's raises the root's level, and would silence our warnings.
    logging.getLogger("batch_app").setLevel(logging.WARNING)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        return serve(channel, engine_name, not_isolated)
    except BatchAppError as error:
        channel.send(Fatal(error.message, getattr(error, "exit_code", None)))
        return 1


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown with an engine's threads and native pools around has nothing to give.
    os._exit(exit_code)
elif __name__ == "__mp_main__":
    # One of the processes that vLLM spawns, each for one of several GPUs: it imports the module in
    # which the core was forked. By itself it looks for its parent's end only once it has loaded.
    die_with_parent()
