"""The place for one engine: which model is loaded, if any, and how it comes and goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil

from batch_app.cluster import RayCluster
from batch_app.config import Settings
from batch_app.core import EngineLimits
from batch_app.engine.base import EngineInfo, EngineRequest, EngineStats, ModelSpec
from batch_app.engine.gpu_memory import GpuMemoryWait
from batch_app.engine.host import EngineHost
from batch_app.engine.isolation import needs_network
from batch_app.engine.limits import LoweredLimits, limits_of, smaller
from batch_app.engine.load_attempts import LoadAttempts
from batch_app.engine.process import EngineProcess, Network
from batch_app.errors import EngineDied, EngineLoadError, EngineUnavailable
from batch_app.registry import ModelEntry

#: Those whose libraries take long to import.
IMPORTING_ENGINES = ("vllm",)
#: What the import needs: bytes of memory, twice what vLLM's takes; and processors, so that the
#: engine at work keeps its own. With fewer, the one would gain what the other loses.
STAND_BY_BYTES, STAND_BY_CPUS = 2 << 30, 4
#: Those that may use a GPU of this machine; the simulated one stands in for them.
LOCAL_ENGINES = ("vllm", "sim")
#: Those that prepare requests while they load a model.
PREPARING_ENGINES = ("vllm", "sim")


def model_spec(entry: ModelEntry) -> ModelSpec:
    """What the engine needs to know of a registry entry."""
    return ModelSpec(
        name=entry.name,
        engine=entry.engine,
        source=entry.source,
        revision=entry.revision,
        trust_remote_code=entry.trust_remote_code,
        engine_args=entry.engine_args,
    )


class EngineSlot:
    """Holds at most one engine. One thread."""

    def __init__(
        self,
        settings: Settings,
        log_path: Path,
        interrupted: Callable[[], bool],
        lowered: LoweredLimits,
        on_load: Callable[[str, float | None], None] = lambda *_: None,
        on_lost: Callable[[str], None] = lambda _: None,
        ready: EngineProcess | None = None,
        gpu_memory: GpuMemoryWait | None = None,
    ) -> None:
        """`on_load` is told of every attempt: the model, and its seconds; None where it failed.
        `on_lost`: of every engine that died or hung at work. `ready`: for the first engine."""
        self._settings = settings
        self._log_path = log_path
        self._interrupted = interrupted
        self._lowered = lowered
        self._on_load = on_load
        self._on_lost = on_lost
        self._ready = ready
        self._gpu_memory = gpu_memory or GpuMemoryWait()
        self._entry: ModelEntry | None = None
        self._host: EngineHost | None = None

    @property
    def model(self) -> str | None:
        """The registry's name of the model that is loaded."""
        return self._entry.name if self._entry else None

    @property
    def host(self) -> EngineHost | None:
        """The engine that is loaded, to be read by any thread."""
        return self._host

    def lost(self) -> None:
        """The engine died or was killed at work: the next `take` starts another one."""
        if self._entry is not None:
            self._on_lost(self._entry.name)
        self.unload()

    @property
    def folder(self) -> str:
        """Where the loaded model's files lie; empty where that isn't known."""
        return self._host.folder if self._host else ""

    def stats(self) -> EngineStats:
        """The engine's latest reading; all zero without one."""
        return self._host.stats() if self._host else EngineStats()

    def holds(self, entry: ModelEntry) -> bool:
        return self._entry == entry and self._host is not None

    def take(
        self,
        entry: ModelEntry,
        say: Callable[[str], None] = lambda _: None,
        ahead: Callable[[], Sequence[EngineRequest]] = tuple,
    ) -> tuple[EngineHost, EngineInfo]:
        """The engine for this model: the one that is loaded, or a fresh one in its place, which is
        told what comes first (`ahead`), if it can make use of that.

        It starts once the GPU memory of the last one is free. One that finds too little memory is
        started again with less, as long as that can help (`LoadAttempts`); `say` is told.

        Raises EngineLoadError, EngineUnavailable, EngineInterrupted; nothing is loaded then.
        """
        host = self._host
        if self.holds(entry) and host is not None and host.info is not None:
            return host, host.info
        self.unload()
        spec = model_spec(entry)
        first = ahead() if spec.engine in PREPARING_ENGINES else ()
        host, info = self._load(spec, say, first)
        self._host, self._entry = host, entry
        return host, info

    def stand_by(self, entry: ModelEntry) -> bool:
        """Start the process for the engine that is loaded next, beside the one at work: it imports
        its libraries meanwhile. Returns whether it did.

        Not where one stands ready already, where there is nothing to import, or no room for it.
        """
        if self._ready is not None or entry.engine not in IMPORTING_ENGINES:
            return False
        has_room = psutil.virtual_memory().available >= STAND_BY_BYTES
        if not has_room or len(os.sched_getaffinity(0)) < STAND_BY_CPUS:
            return False
        spec = model_spec(entry)
        network = network_for(spec, self._settings)
        self._ready = EngineProcess(self._log_path, network, spec.engine)
        return True

    def stand_down(self) -> None:
        """End the process that stands ready, if there is one: nobody needs it for now."""
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.close()

    def lower(self) -> EngineLimits | None:
        """Have the engine that is loaded, or just died, start with smaller limits from now on.

        Returns them; None where there are none, or no engine.
        """
        host = self._host
        if host is None or host.info is None:
            return None
        tried = limits_of(host.info)
        limits = smaller(tried.limits) if tried else None
        if tried is not None and limits is not None:
            spec = msgspec.structs.replace(host.spec, lowered=None, gpu_memory_utilization=None)
            if host.spec.gpu_memory_utilization is not None:  # that was for this load only
                limits = replace(limits, gpu_memory_utilization=None)
            self._lowered.set(spec, replace(tried, limits=limits))
        return limits

    def _load(
        self, spec: ModelSpec, say: Callable[[str], None], ahead: Sequence[EngineRequest]
    ) -> tuple[EngineHost, EngineInfo]:
        attempts = LoadAttempts(spec, self._lowered)
        while True:
            if spec.engine in LOCAL_ENGINES:
                self._gpu_memory.wait(self._interrupted)
            host = self._make_host(attempts.spec)
            started = time.monotonic()
            try:
                info = host.load(ahead)
            except EngineLoadError as error:
                self._on_load(spec.name, None)
                change = attempts.next_after(error)
                say(f"{error.message.rstrip('.')}. {change}")
            except (EngineDied, EngineUnavailable):
                self._on_load(spec.name, None)
                raise
            else:
                self._on_load(spec.name, time.monotonic() - started)
                return host, info

    def _make_host(self, spec: ModelSpec) -> EngineHost:
        ready = self._ready
        if ready is not None and ready.engine not in ("", spec.engine):
            ready = None  # it waits on, for the one that it is for
        if ready is not None:
            self._ready = None
            ready.begin()
        return EngineHost(
            spec,
            log_path=self._log_path,
            start_timeout_s=longest_start_s(spec, self._settings),
            hang_s=self._settings.engine_hang_s,
            isolated=network_for(spec, self._settings) == "isolated",
            interrupted=self._interrupted,
            ready=ready,
        )

    def unload(self) -> None:
        """End the engine process, which frees all its memory. Nothing happens if there is none."""
        if self._host is not None:
            self._host.close()
        self._host = self._entry = None

    def close(self) -> None:
        """As `unload`, and end the process that stood ready."""
        self.unload()
        self.stand_down()


def longest_start_s(spec: ModelSpec, settings: Settings) -> float:
    """A cluster has limits of its own, for each replica: this is to be none of them."""
    own = settings.engine_start_timeout_s
    if spec.engine != "ray":
        return own
    return max(own, RayCluster.of(spec.engine_args).longest_load_s)


def network_for(spec: ModelSpec, settings: Settings) -> Network:
    """Its own, unless the settings or what it does ask for the machine's."""
    own = settings.engine_network == "isolated"
    own = own and not settings.media_domains and not needs_network(spec.engine, spec.engine_args)
    return "isolated" if own else "host"
