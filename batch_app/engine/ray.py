"""The engine that is a Ray cluster: replicas of one model on its nodes, each an engine of its own.

This process is Ray's driver. It starts replicas (`engine.replica`) as the cluster has room, hands
each what `engine.dispatch` says, one call a replica at a time, and gets answers back with the call
as they finish. What it holds is bounded by the replicas' windows. Replicas are Ray actors that
belong to the driver: when it ends, however that comes about, they do.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from batch_app import __version__
from batch_app.cluster import RayCluster, replica_args
from batch_app.core import LimitsTried
from batch_app.engine.base import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    ModelSpec,
    Outcome,
)
from batch_app.engine.channel import Loaded
from batch_app.engine.dispatch import Dispatch, window_of
from batch_app.engine.limits import limits_of, smaller
from batch_app.engine.replica import (
    LINGER_S,
    Orders,
    Placed,
    Replica,
    decode_report,
    decode_start,
    encode_orders,
    encode_spec,
)
from batch_app.errors import (
    BatchAppError,
    ConfigError,
    EngineDied,
    EngineError,
    EngineLoadError,
    EngineUnavailable,
)
from batch_app.suspects import DEATHS_ALONE, QUARANTINED

logger = logging.getLogger(__name__)

#: Whatever the nodes are: this machine says nothing about them.
DEVICE = "Ray cluster"
NAMESPACE = "vllm-batch"
#: How long a call may last without an answer in it.
CALL_S = 0.5
#: Replicas that could not start, one after the other, before the engine is given up; and the pause
#: after one, doubled each time.
MAX_FAILED_STARTS = 3
START_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
#: Engines that died in replicas without an answer from any in between.
MAX_DEATHS = 4
_PROBE_S = 5.0
_END_S = 10.0
_WAIT_S = 0.5
_COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "preemptions_total",
)


def import_libraries() -> None:
    """What `load` imports, done ahead of it. Raises ImportError."""
    # Nothing is told to others.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # As it is going to be: a replica without GPUs leaves the variables that show them alone.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    import ray  # noqa: F401


@dataclass(slots=True, eq=False)
class _Member:
    """A replica as the driver holds it. `call`: the one that is under way, since `since`."""

    key: int
    actor: Any
    state: Literal["placing", "loading", "up"]
    call: Any
    since: float
    info: EngineInfo | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    cancel: list[int] = field(default_factory=list)


class RayEngine(Engine):
    """A model's replicas on a cluster. One thread."""

    def __init__(self, spec: ModelSpec, auth_token: str = "") -> None:
        """`auth_token`: of the cluster, where it asks for one."""
        self._spec = spec
        self._auth_token = auth_token
        self._members: dict[int, _Member] = {}
        self._keys = itertools.count()
        self._dispatch = Dispatch()
        self._done: list[Outcome] = []
        self._first: EngineInfo | None = None
        self._lowered: LimitsTried | None = spec.lowered
        self._failed_starts = 0
        self._next_start_at = 0.0
        self._last_failure: EngineError | None = None
        self._deaths_in_a_row = 0
        self._has_answered = False
        self._without_any_since: float | None = None
        self._counted = dict.fromkeys(_COUNTERS, 0)  # by replicas that are gone
        self._is_connected = False
        self._has_connected = False  # by itself: a program of its own may have, before

    # -- loading -------------------------------------------------------------------------------

    def load(self) -> EngineInfo:
        """As `Engine.load`.

        Raises also:
            EngineUnavailable: there is no cluster there, or it has no room for the replicas.
        """
        started = time.monotonic()
        try:
            self._cluster = RayCluster.of(self._spec.engine_args)
        except ConfigError as error:
            raise EngineLoadError(f"model {self._spec.name!r}: {error.message}") from error
        try:
            self._connect()
            self._start_replicas(self._cluster.min_replicas)
            first = self._wait_for_replicas()
        except BatchAppError:
            self.close()
            raise
        most = self._cluster.max_replicas
        return EngineInfo(
            engine="ray",
            engine_version=f"{first.engine_version} ({first.engine}, Ray {self._ray.__version__})",
            model=self._spec.name,
            device=DEVICE,
            device_type="remote",
            load_s=time.monotonic() - started,
            max_model_len=first.max_model_len,
            max_num_seqs=first.max_num_seqs * most,
            max_num_batched_tokens=None,
            enable_prefix_caching=first.enable_prefix_caching,
            enable_chunked_prefill=first.enable_chunked_prefill,
            endpoints=first.endpoints,
            limits_source=(f"up to {most} replicas, {first.max_num_seqs:,} each on {first.device}"),
            bounds_requests=True,
            max_replicas=most,
        )

    def _connect(self) -> None:
        address = self._cluster.address
        if address != "auto":
            _probe(address)
        try:
            import_libraries()
        except ImportError as error:
            raise EngineLoadError(
                f"Ray is not installed here ({error}): pip install 'vllm-batch-server[ray]'"
            ) from error
        import ray

        self._ray = ray
        if self._auth_token:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._auth_token}
        try:
            if not ray.is_initialized():
                ray.init(
                    address=address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
                self._has_connected = True
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise EngineUnavailable(
                f"There is no way into the Ray cluster ({address}): {_last_line(error)}. This "
                "machine must be a node of it, as `ray start` makes it.",
                model=self._spec.name,
            ) from error
        self._is_connected = True
        self._replica_class = ray.remote(Replica)

    def _wait_for_replicas(self) -> EngineInfo:
        """Until there are `min_replicas`. Returns what one of them says of itself."""
        while True:
            up = [member for member in self._members.values() if member.state == "up"]
            if len(up) >= self._cluster.min_replicas and up[0].info is not None:
                return up[0].info
            failure = self._last_failure
            if failure is not None and (not up or self._failed_starts >= MAX_FAILED_STARTS):
                raise failure
            now = time.monotonic()
            self._look_for_room(now)
            if now >= self._next_start_at:
                self._start_replicas(self._cluster.min_replicas)
            self._wait(_WAIT_S)

    # -- running -------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._dispatch.add(requests)

    def cancel(self, numbers: Collection[int]) -> None:
        gone = frozenset(numbers)
        self._done = [outcome for outcome in self._done if outcome.number not in gone]
        for key, told in self._dispatch.forget(gone).items():
            self._members[key].cancel += told

    def collect(self, timeout_s: float) -> list[Outcome]:
        """As `Engine.collect`.

        Raises also:
            EngineUnavailable: no replica is left, and the cluster has no room for one.
        """
        if not self._is_connected:
            raise EngineDied("the engine isn't loaded")
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            self._tend(now)
            if self._done or now >= deadline or not self._num_requests:
                break
            self._wait(deadline - now)
        if not self._num_requests:
            self._wait(0.0)  # calls that nobody waits for
        done, self._done = self._done, []
        return done

    def stats(self) -> EngineStats:
        readings = [member.stats for member in self._members.values()]
        up = [member for member in self._members.values() if member.state == "up"]
        counts = {
            name: self._counted[name] + sum(getattr(one, name) for one in readings)
            for name in _COUNTERS
        }
        return EngineStats(
            num_running=sum(one.num_running for one in readings),
            num_waiting=sum(one.num_waiting for one in readings) + self._dispatch.num_waiting,
            kv_cache_usage=sum(one.kv_cache_usage for one in readings) / max(len(up), 1),
            at_s=time.monotonic(),
            **counts,
        )

    def close(self) -> None:
        members, self._members = list(self._members.values()), {}
        self._dispatch = Dispatch()
        self._done.clear()
        connected, self._is_connected = self._is_connected, False
        if not connected:
            return
        with contextlib.suppress(Exception):
            ends = [one.actor.end.remote() for one in members if one.state == "up"]
            if ends:
                self._ray.wait(ends, num_returns=len(ends), timeout=_END_S)
            for member in members:
                self._ray.kill(member.actor, no_restart=True)
        if self._has_connected:
            with contextlib.suppress(Exception):
                self._ray.shutdown()

    # -- the replicas that there are -----------------------------------------------------------

    @property
    def _num_requests(self) -> int:
        return self._dispatch.num_waiting + self._dispatch.num_in_flight

    def _tend(self, now: float) -> None:
        """Start and end replicas, and give work to those that can take some."""
        self._look_for_room(now)
        wanted = self._num_wanted()
        if len(self._members) < wanted and now >= self._next_start_at:
            self._start_replicas(wanted)
        for member in list(self._members.values()):
            if member.state == "up" and member.call is None:
                self._give_work(member, now)
            elif member.state == "up" and now - member.since > self._cluster.hang_s + _END_S:
                self._lose(member, "doesn't answer", by_engine=False)
            elif member.state == "loading" and now - member.since > self._longest_load_s:
                self._start_failed(
                    member, EngineLoadError("A replica did not load.", retriable=True)
                )
        surplus = len(self._members) - wanted
        for member in list(self._members.values()):
            if surplus > 0 and self._is_idle(member, now):
                self._give_back(member)
                surplus -= 1

    def _num_wanted(self) -> int:
        """As many as the requests that there are can keep busy."""
        each = self._first.max_num_seqs if self._first is not None else 1
        enough = -(-self._num_requests // each)
        return min(max(enough, self._cluster.min_replicas), self._cluster.max_replicas)

    @property
    def _longest_load_s(self) -> float:
        # The model's files may have to come from the hub, which has as long.
        return 2 * self._cluster.start_timeout_s + _END_S

    def _is_idle(self, member: _Member, now: float) -> bool:
        if member.state == "placing":
            return True
        return (
            member.state == "up"
            and member.call is None
            and now - member.since > self._cluster.idle_s
        )

    def _give_work(self, member: _Member, now: float) -> None:
        requests = self._dispatch.take(member.key)
        if not requests and not member.cancel and not self._dispatch.has(member.key):
            return
        orders = encode_orders(Orders(member.cancel, requests))
        member.cancel = []
        member.call, member.since = member.actor.exchange.remote(orders, CALL_S), now

    def _start_replicas(self, wanted: int) -> None:
        cluster = self._cluster
        spec = ModelSpec(
            name=self._spec.name,
            engine=cluster.engine,
            source=self._spec.source,
            revision=self._spec.revision,
            trust_remote_code=self._spec.trust_remote_code,
            engine_args=replica_args(self._spec.engine_args),
            lowered=self._lowered,
        )
        options = {
            "num_cpus": cluster.num_cpus,
            "num_gpus": cluster.gpus(spec.engine_args),
            "resources": dict(cluster.resources),
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        while len(self._members) < wanted:
            key = next(self._keys)
            actor = self._replica_class.options(**options).remote(
                encode_spec(spec), cluster.start_timeout_s, cluster.hang_s, LINGER_S
            )
            now = time.monotonic()
            self._members[key] = _Member(key, actor, "placing", actor.place.remote(), now)

    def _give_back(self, member: _Member) -> None:
        """End it in order: its device is free when the cluster hears of it."""
        self._forget(member)
        if member.state == "up":
            self._dispatch.give_back(member.key)
            member.actor.end.remote()
            member.actor.__ray_terminate__.remote()
        else:
            self._ray.kill(member.actor, no_restart=True)

    def _look_for_room(self, now: float) -> None:
        """Raises EngineUnavailable where for too long there was not one replica with a node."""
        if any(member.state != "placing" for member in self._members.values()):
            self._without_any_since = None
            return
        if self._without_any_since is None or not (self._num_requests or self._first is None):
            self._without_any_since = now
        if now - self._without_any_since > self._cluster.room_timeout_s:
            needs = {"CPU": self._cluster.num_cpus, **self._cluster.resources}
            needs["GPU"] = self._cluster.gpus(replica_args(self._spec.engine_args))
            asked = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            raise EngineUnavailable(
                f"The Ray cluster has had no room for a replica of {self._spec.name} for "
                f"{self._cluster.room_timeout_s:.0f} s. Each needs {asked or 'nothing'} of one "
                "node.",
                model=self._spec.name,
            )

    # -- what comes back -----------------------------------------------------------------------

    def _wait(self, timeout_s: float) -> None:
        """Until a call ends, or the time is over; then see to all that have ended."""
        calls = {one.call: one for one in self._members.values() if one.call is not None}
        if not calls:
            time.sleep(min(max(timeout_s, 0.0), 0.05))
            return
        refs = list(calls)
        ended, _ = self._ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ended and len(refs) > 1:
            ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        for call in ended:
            self._see_to(calls[call])

    def _see_to(self, member: _Member) -> None:
        call, member.call = member.call, None
        began, member.since = member.since, time.monotonic()
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            if member.state == "up":
                self._lose(member, f"is gone ({type(error).__name__})", by_engine=False)
            else:
                self._start_failed(member, self._why_not_started(member, error))
            return
        if member.state == "up":
            self._take_report(member, answer)
            return
        message = decode_start(answer)
        if isinstance(message, Placed):
            if message.version != __version__:
                failure = EngineLoadError(
                    f"The node {message.node} has version {message.version} of "
                    f"vllm-batch-server, this machine {__version__}: install the same on all."
                )
                self._start_failed(member, failure)
                return
            member.state, member.call = "loading", member.actor.load.remote()
        elif isinstance(message, Loaded):
            member.state, member.info = "up", message.info
            self._first = self._first or message.info
            self._failed_starts, self._last_failure = 0, None
            self._dispatch.open(member.key, window_of(message.info.max_num_seqs))
            logger.info("a replica has loaded in %.1f s", member.since - began)
        else:
            failure = EngineLoadError(
                message.message, retriable=message.retriable, too_large=message.too_large
            )
            self._start_failed(member, failure)

    def _take_report(self, member: _Member, answer: bytes) -> None:
        report = decode_report(answer)
        member.stats = report.stats
        outcomes = self._dispatch.finished(member.key, report.outcomes)
        if outcomes:
            self._done += outcomes
            self._deaths_in_a_row = 0
            self._has_answered = True
        if not report.died:
            return
        by_engine = not (report.out_of_memory and self._shrink(member))
        self._lose(member, f"has no engine any more: {report.died}", by_engine=by_engine)

    def _why_not_started(self, member: _Member, error: Exception) -> EngineLoadError:
        if isinstance(error, self._ray.exceptions.RayTaskError) or member.state == "placing":
            return EngineLoadError(
                f"A replica could not start on its node ({_last_line(error)}). Is "
                f"vllm-batch-server {__version__} installed there, for the same Python?",
                retriable=True,
            )
        return EngineLoadError("A node was lost while a replica loaded on it.", retriable=True)

    def _start_failed(self, member: _Member, failure: EngineLoadError) -> None:
        logger.warning("%s", failure.message)
        self._forget(member)
        self._kill(member)
        self._failed_starts += 1
        self._last_failure = failure
        pause_s = START_BACKOFF_S * 2.0 ** (self._failed_starts - 1)
        self._next_start_at = time.monotonic() + min(pause_s, LONGEST_BACKOFF_S)
        others = any(one.state == "up" for one in self._members.values())
        if others or self._first is None or not self._num_requests:
            return
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise EngineDied(f"No replica starts any more: {failure.message}")

    def _lose(self, member: _Member, what: str, *, by_engine: bool) -> None:
        """What it had in flight goes to others.

        Raises EngineDied where replica after replica dies without an answer.
        """
        num_in_flight = self._dispatch.has(member.key)
        logger.warning(
            "A replica %s. It had %d requests in flight, which run again.", what, num_in_flight
        )
        self._forget(member)
        self._kill(member)
        self._dispatch.lost(member.key, by_engine=by_engine)
        if self._has_answered:
            for number in self._dispatch.take_guilty():
                message = (
                    f"The engine died {DEATHS_ALONE} times with only this request in flight. "
                    "It was not run again."
                )
                self._done.append(Outcome(number, 500, message.encode(), error_code=QUARANTINED))
                self._deaths_in_a_row = 0
        if not by_engine:
            return
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MAX_DEATHS + self._dispatch.longest_search:
            raise EngineDied(
                f"The engines of {self._deaths_in_a_row} replicas died without an answer in "
                f"between. The last one {what}"
            )

    def _shrink(self, member: _Member) -> bool:
        """Have replicas start with less from now on. Returns whether that is possible."""
        tried = limits_of(member.info) if member.info is not None else None
        limits = smaller(tried.limits) if tried is not None else None
        if tried is None or limits is None:
            return False
        self._lowered = replace(tried, limits=limits)
        return True

    def _forget(self, member: _Member) -> None:
        del self._members[member.key]
        for name in _COUNTERS:
            self._counted[name] += getattr(member.stats, name)

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(member.actor, no_restart=True)


def _probe(address: str) -> None:
    """Ray would wait for minutes where nobody listens. Raises EngineUnavailable."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, OverflowError) as error:
        raise EngineUnavailable(
            f"The head of the Ray cluster, {address}, can't be reached: {error}."
        ) from error


def _last_line(error: BaseException) -> str:
    """What an error of Ray's says, without the stacks in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300].rstrip(".")
