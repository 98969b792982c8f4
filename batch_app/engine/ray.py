"""The engine that is a Ray cluster: replicas of one model on its nodes, each an engine of its own.

This process is Ray's driver. It starts replicas (`engine.replica`) as the cluster has room, hands
each what `engine.dispatch` says, one call a replica at a time, and gets answers back with the call
as they finish. What it holds is bounded by the replicas' windows. Replicas are Ray actors that
belong to the driver: when it ends, however that comes about, they do.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from batch_app import __version__
from batch_app.cluster import RayCluster
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
from batch_app.engine.ray_actors import CallFailed, Member, RayActors, import_libraries
from batch_app.engine.replica import Orders, Placed, decode_report, decode_start
from batch_app.errors import (
    BatchAppError,
    ConfigError,
    EngineDied,
    EngineError,
    EngineLoadError,
    EngineUnavailable,
)
from batch_app.suspects import DEATHS_ALONE, QUARANTINED

__all__ = ["RayEngine", "import_libraries"]  # by name: `engine.child`

logger = logging.getLogger(__name__)

#: Whatever the nodes are: this machine says nothing about them.
DEVICE = "Ray cluster"
#: Replicas that could not start, one after the other, before the engine is given up; and the pause
#: after one, doubled each time.
MAX_FAILED_STARTS = 3
START_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
#: Engines that died in replicas without an answer from any in between.
MAX_DEATHS = 4
_GRACE_S = 10.0
_WAIT_S = 0.5
_COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "preemptions_total",
)


class RayEngine(Engine):
    """A model's replicas on a cluster. One thread."""

    def __init__(self, spec: ModelSpec, auth_token: str = "") -> None:
        """`auth_token`: of the cluster, where it asks for one."""
        self._spec = spec
        self._auth_token = auth_token
        self._members: dict[int, Member] = {}
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

    # -- loading -------------------------------------------------------------------------------

    def load(self, ahead: Sequence[EngineRequest] = ()) -> EngineInfo:
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
            self._actors = RayActors(self._spec, self._cluster)
            self._actors.connect(self._auth_token)
            self._is_connected = True
            self._start_replicas(self._cluster.min_replicas)
            first = self._wait_for_replicas()
        except BatchAppError:
            self.close()
            raise
        most = self._cluster.max_replicas
        return EngineInfo(
            engine="ray",
            engine_version=f"{first.engine_version} ({first.engine}, Ray {self._actors.version})",
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

    def _wait_for_replicas(self) -> EngineInfo:
        """Until there are `min_replicas`, or as many of them as the cluster has had room for in
        `room_timeout_s`. Returns what one of them says of itself."""
        up_since: float | None = None
        while True:
            up = [member for member in self._members.values() if member.state == "up"]
            now = time.monotonic()
            if up and up[0].info is not None:
                up_since = now if up_since is None else up_since
                if len(up) >= self._cluster.min_replicas:
                    return up[0].info
                waited = now - up_since > self._cluster.room_timeout_s
                if waited and not any(one.state == "loading" for one in self._members.values()):
                    logger.warning(
                        "The cluster has room for %d of at least %d replicas; going on with those.",
                        len(up),
                        self._cluster.min_replicas,
                    )
                    return up[0].info
            failure = self._last_failure
            if failure is not None and (not up or self._failed_starts >= MAX_FAILED_STARTS):
                raise failure
            self._look_for_room(now)
            if now >= self._next_start_at:
                self._start_replicas(self._cluster.min_replicas)
            self._give_up_loading(now)
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
        if self._is_connected:
            self._is_connected = False
            self._actors.disconnect(members)

    # -- the replicas that there are -----------------------------------------------------------

    @property
    def _num_requests(self) -> int:
        return self._dispatch.num_waiting + self._dispatch.num_in_flight

    def _tend(self, now: float) -> None:
        """Start and end replicas, and give work to those that can take some."""
        self._look_for_room(now)
        self._give_up_loading(now)
        wanted = self._num_wanted()
        if len(self._members) < wanted and now >= self._next_start_at:
            self._start_replicas(wanted)
        for member in list(self._members.values()):
            if member.state == "up" and member.call is None:
                self._give_work(member)
            elif member.state == "up" and now - member.since > self._cluster.hang_s + _GRACE_S:
                self._lose(member, "doesn't answer", by_engine=False)
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

    def _give_up_loading(self, now: float) -> None:
        for member in list(self._members.values()):
            longest_s = self._cluster.longest_start_s + _GRACE_S
            if member.state == "loading" and now - member.since > longest_s:
                failure = EngineLoadError("A replica did not load.", retriable=True)
                self._start_failed(member, failure)

    def _is_idle(self, member: Member, now: float) -> bool:
        if member.state == "placing":
            return True
        return (
            member.state == "up"
            and member.call is None
            and now - member.since > self._cluster.idle_s
        )

    def _give_work(self, member: Member) -> None:
        requests = self._dispatch.take(member.key)
        if not requests and not member.cancel and not self._dispatch.has(member.key):
            return
        orders, member.cancel = Orders(member.cancel, requests), []
        self._actors.exchange(member, orders)

    def _start_replicas(self, wanted: int) -> None:
        while len(self._members) < wanted:
            key = next(self._keys)
            self._members[key] = self._actors.start(key, self._lowered)

    def _give_back(self, member: Member) -> None:
        """End it in order: its device is free when the cluster hears of it."""
        self._forget(member)
        if member.state == "up":
            self._dispatch.give_back(member.key)
        self._actors.end(member)

    def _look_for_room(self, now: float) -> None:
        """Raises EngineUnavailable where for too long there was not one replica with a node."""
        if any(member.state != "placing" for member in self._members.values()):
            self._without_any_since = None
            return
        if self._without_any_since is None or not (self._num_requests or self._first is None):
            self._without_any_since = now
        if now - self._without_any_since > self._cluster.room_timeout_s:
            raise EngineUnavailable(
                f"The Ray cluster has had no room for a replica of {self._spec.name} for "
                f"{self._cluster.room_timeout_s:.0f} s. Each needs {self._actors.needs} of one "
                "node.",
                model=self._spec.name,
            )

    # -- what comes back -----------------------------------------------------------------------

    def _wait(self, timeout_s: float) -> None:
        """Until a call ends, or the time is over; then see to all that have ended."""
        for member in self._actors.wait(self._members.values(), timeout_s):
            self._see_to(member)

    def _see_to(self, member: Member) -> None:
        began = member.since
        try:
            answer = self._actors.answer(member)
        except CallFailed as error:
            if member.state == "up":
                self._lose(member, f"is gone ({error})", by_engine=False)
            else:
                self._start_failed(member, _why_not_started(error))
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
            self._actors.load(member)
        elif isinstance(message, Loaded):
            member.state, member.info = "up", message.info
            self._first = self._first or message.info
            self._failed_starts, self._last_failure = 0, None
            self._dispatch.open(member.key, window_of(message.info.max_num_seqs))
            logger.info("a replica has loaded in %.1f s", member.since - began)
        else:
            failure = EngineLoadError(
                message.message, retriable=message.retriable, retry=message.retry
            )
            self._start_failed(member, failure)

    def _take_report(self, member: Member, answer: bytes) -> None:
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

    def _start_failed(self, member: Member, failure: EngineLoadError) -> None:
        logger.warning("%s", failure.message)
        self._forget(member)
        self._actors.kill(member)
        self._failed_starts += 1
        self._last_failure = failure
        pause_s = START_BACKOFF_S * 2.0 ** min(self._failed_starts - 1, 10)
        self._next_start_at = time.monotonic() + min(pause_s, LONGEST_BACKOFF_S)
        others = any(one.state == "up" for one in self._members.values())
        if others or self._first is None or not self._num_requests:
            return
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise EngineDied(f"No replica starts any more: {failure.message}")

    def _lose(self, member: Member, what: str, *, by_engine: bool) -> None:
        """What it had in flight goes to others.

        Raises EngineDied where replica after replica dies without an answer.
        """
        num_in_flight = self._dispatch.has(member.key)
        logger.warning(
            "A replica %s. It had %d requests in flight, which run again.", what, num_in_flight
        )
        self._forget(member)
        self._actors.kill(member)
        self._dispatch.lost(member.key, by_engine=by_engine)
        self._quarantine()
        self._deaths_in_a_row += 1
        most = MAX_DEATHS + self._dispatch.longest_search
        if not by_engine:
            most += 2 * self._cluster.max_replicas  # a large node may have had many
        if self._deaths_in_a_row > most:
            raise EngineDied(
                f"{self._deaths_in_a_row} replicas were lost without an answer in between. The "
                f"last one {what}"
            )

    def _quarantine(self) -> None:
        """Give the guilty their error lines.

        While nothing at all was answered, that waits: engines may die of anything. Raises
        EngineDied where then nothing else is left to try.
        """
        if not self._has_answered:
            if self._dispatch.num_guilty and self._dispatch.num_guilty == self._num_requests:
                raise EngineDied("The engines of replicas died of every request.")
            return
        for number in self._dispatch.take_guilty():
            message = (
                f"The engine died {DEATHS_ALONE} times with only this request in flight. "
                "It was not run again."
            )
            self._done.append(Outcome(number, 500, message.encode(), error_code=QUARANTINED))
            self._deaths_in_a_row = 0  # engines work, but for these

    def _shrink(self, member: Member) -> bool:
        """Have replicas start with less from now on. Returns whether that is possible."""
        tried = limits_of(member.info) if member.info is not None else None
        limits = smaller(tried.limits) if tried is not None else None
        if tried is None or limits is None:
            return False
        known = self._lowered
        if known is None or limits.max_num_seqs < known.limits.max_num_seqs:
            self._lowered = replace(tried, limits=limits)
        return True

    def _forget(self, member: Member) -> None:
        del self._members[member.key]
        for name in _COUNTERS:
            self._counted[name] += getattr(member.stats, name)


def _why_not_started(error: CallFailed) -> EngineLoadError:
    if not error.by_ours:
        return EngineLoadError("A node was lost while a replica loaded on it.", retriable=True)
    return EngineLoadError(
        f"A replica could not start on its node ({error}). Is vllm-batch-server {__version__} "
        "installed there, for the same Python?",
        retriable=True,
    )
