"""Replicas as Ray's actors: started, called, waited for, ended. The only module that knows Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from batch_app.cluster import RayCluster, replica_args
from batch_app.core import LimitsTried
from batch_app.engine.base import EngineInfo, EngineStats, ModelSpec
from batch_app.engine.replica import LINGER_S, Orders, Replica, encode_orders, encode_spec
from batch_app.errors import EngineLoadError, EngineUnavailable

NAMESPACE = "vllm-batch"
#: How long a call may last without an answer in it.
CALL_S = 0.5
_PROBE_S = 5.0
_END_S = 10.0


def import_libraries() -> None:
    """What `connect` imports, done ahead of it. Raises ImportError."""
    # Nothing is told to others.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # As it is going to be: a replica without GPUs leaves the variables that show them alone.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    import ray  # noqa: F401


class CallFailed(Exception):
    """A call has no answer, and its actor is of no more use. Says why, in the words of Ray.

    `by_ours`: our own code failed in it, or couldn't be found on the node.
    """

    def __init__(self, why: str, *, by_ours: bool) -> None:
        super().__init__(why)
        self.by_ours = by_ours


@dataclass(slots=True, eq=False)
class Member:
    """A replica as the driver holds it. `call`: the one that is under way, since `since`."""

    key: int
    actor: Any
    state: Literal["placing", "loading", "up"]
    call: Any
    since: float
    info: EngineInfo | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    #: Numbers to be cancelled with the next call.
    cancel: list[int] = field(default_factory=list)


class RayActors:
    """Makes replicas of one model on one cluster. One thread."""

    def __init__(self, spec: ModelSpec, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._spec = msgspec.structs.replace(
            spec, engine=cluster.engine, engine_args=replica_args(spec.engine_args)
        )
        self._needs = {"CPU": cluster.num_cpus, "GPU": cluster.gpus(self._spec.engine_args)}
        self._needs |= cluster.resources
        self._has_connected = False  # by itself: a program of its own may have, before
        self.version = ""

    @property
    def needs(self) -> str:
        """What a replica takes of one node, in words."""
        asked = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items() if amount)
        return asked or "nothing"

    def connect(self, auth_token: str) -> None:
        """Raises EngineLoadError without Ray, EngineUnavailable without a cluster."""
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
        self.version = str(ray.__version__)
        if auth_token:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": auth_token}
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
        self._replica_class = ray.remote(Replica)

    def disconnect(self, members: Collection[Member]) -> None:
        """End these, and the connection. Never raises."""
        with contextlib.suppress(Exception):
            ends = [one.actor.end.remote() for one in members if one.state == "up"]
            if ends:
                self._ray.wait(ends, num_returns=len(ends), timeout=_END_S)
            for member in members:
                self.kill(member)
        if self._has_connected:
            with contextlib.suppress(Exception):
                self._ray.shutdown()

    def start(self, key: int, lowered: LimitsTried | None) -> Member:
        """A replica that waits for its place on a node; its call ends when it has one."""
        cluster = self._cluster
        spec = msgspec.structs.replace(self._spec, lowered=lowered)
        actor = self._replica_class.options(
            num_cpus=cluster.num_cpus,
            num_gpus=self._needs["GPU"],
            resources=dict(cluster.resources),
            max_restarts=0,
            max_task_retries=0,
        ).remote(encode_spec(spec), cluster.start_timeout_s, cluster.hang_s, LINGER_S)
        return Member(key, actor, "placing", actor.place.remote(), time.monotonic())

    def load(self, member: Member) -> None:
        member.state, member.since = "loading", time.monotonic()
        member.call = member.actor.load.remote()

    def exchange(self, member: Member, orders: Orders) -> None:
        member.since = time.monotonic()
        member.call = member.actor.exchange.remote(encode_orders(orders), CALL_S)

    def wait(self, members: Iterable[Member], timeout_s: float) -> list[Member]:
        """Those whose call has ended, as soon as there is one."""
        calls = {one.call: one for one in members if one.call is not None}
        if not calls:
            time.sleep(min(max(timeout_s, 0.0), 0.05))
            return []
        refs = list(calls)
        ended, _ = self._ray.wait(refs, num_returns=1, timeout=max(timeout_s, 0.0))
        if ended and len(refs) > 1:
            ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return [calls[ref] for ref in ended]

    def answer(self, member: Member) -> bytes:
        """What its call brought back. Raises CallFailed."""
        call, member.call, member.since = member.call, None, time.monotonic()
        errors = self._ray.exceptions
        try:
            answer: bytes = self._ray.get(call)
        except errors.RayError as error:
            by_ours = isinstance(error, errors.RayTaskError) or member.state == "placing"
            why = _last_line(error) if by_ours else type(error).__name__
            raise CallFailed(why, by_ours=by_ours) from error
        return answer

    def end(self, member: Member) -> None:
        """In order: its device is free when the cluster hears of it."""
        if member.state == "up":
            member.actor.end.remote()
            member.actor.__ray_terminate__.remote()
        else:
            self.kill(member)

    def kill(self, member: Member) -> None:
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
