"""The engine that is a Ray cluster, held to what every engine does; and its own part: replicas that
come and go, nodes and drivers that are lost, requests that kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from batch_app.core import BatchStatus
from batch_app.engine.base import Engine, EngineRequest, ModelSpec
from batch_app.engine.host import EngineHost
from batch_app.engine.ray import RayEngine
from batch_app.errors import EngineDied, EngineLoadError, EngineUnavailable
from contract.engine_conformance import EngineConformance, EngineLifetime, chat, collect_all, run
from support.ray_cluster import RayNodes, ray_nodes
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import wait_for

pytestmark = pytest.mark.long

pytest.importorskip("ray", reason="the extra `ray` is not installed")

#: A token takes a moment, so that there is a middle to cancel in.
SLOW_ENOUGH = {"decode_step_s": 0.01}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        nodes.add(CPU=2, spot=1)
        yield nodes


@pytest.fixture(autouse=True)
def token(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", nodes.token)


def spec(nodes: RayNodes, ray: dict[str, Any] | None = None, **engine_args: Any) -> ModelSpec:
    table = {"address": nodes.address, "engine": "sim", "num_cpus": 0.1, **(ray or {})}
    args = {**engine_args, "ray": table}
    return ModelSpec(name="sim", engine="ray", source="sim", engine_args=args)


@contextmanager
def loaded(
    nodes: RayNodes, folder: Path, ray: dict[str, Any] | None = None, **engine_args: Any
) -> Iterator[EngineHost]:
    engine = EngineHost(
        spec(nodes, ray, **engine_args), log_path=folder / "engine.log", isolated=False
    )
    engine.load()
    try:
        yield engine
    finally:
        engine.close()


def wordy(number: int, num_words: int = 40) -> EngineRequest:
    return chat(number, content="word " * num_words, max_tokens=num_words)


@pytest.fixture(scope="module")
def two_replicas(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", nodes.token)
        folder = tmp_path_factory.mktemp("ray")
        ray = {"min_replicas": 2, "max_replicas": 2}
        with loaded(nodes, folder, ray, max_num_seqs=16, **SLOW_ENOUGH) as engine:
            yield engine


class TestRayEngine(EngineConformance, EngineLifetime):
    @pytest.fixture
    def engine(self, two_replicas: EngineHost) -> Engine:
        return two_replicas

    @pytest.fixture
    def make_engine(self, nodes: RayNodes, tmp_path: Path) -> Callable[[], Engine]:
        return lambda: EngineHost(
            spec(nodes, **SLOW_ENOUGH), log_path=tmp_path / "engine.log", isolated=False
        )

    def slow_request(self, number: int) -> EngineRequest:
        return wordy(number)


def test_it_tells_of_all_replicas_together(two_replicas: EngineHost) -> None:
    info = two_replicas.info
    assert info is not None
    assert (info.max_num_seqs, info.max_replicas, info.device) == (32, 2, "Ray cluster")
    assert info.bounds_requests


def test_a_request_that_kills_gets_its_error_line_and_no_other_does(
    nodes: RayNodes, tmp_path: Path
) -> None:
    ray = {"max_replicas": 2}
    with loaded(nodes, tmp_path, ray, max_num_seqs=4, poison="arsenic") as engine:
        requests = [chat(number, f"say {number}") for number in range(40)]
        requests[17] = chat(17, "say arsenic")
        outcomes = run(engine, *requests)
        assert [one.number for one in outcomes if one.error_code] == [17]
        assert outcomes[17].error_code == "request_quarantined"
        for outcome in outcomes[:17] + outcomes[18:]:
            said = json.loads(outcome.body)["choices"][0]["message"]["content"]
            assert said == f"say {outcome.number}"


def test_engines_that_die_of_everything_are_one_engine_that_died(
    nodes: RayNodes, tmp_path: Path
) -> None:
    with loaded(nodes, tmp_path, poison="arsenic") as engine:
        engine.submit([chat(1, "say arsenic")])
        with pytest.raises(EngineDied, match="died of every request"):
            collect_all(engine, [1])


def test_a_lost_node_costs_only_what_was_in_flight(nodes: RayNodes, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    second = nodes.add(CPU=1, spot=1)
    ray = {"min_replicas": 2, "max_replicas": 2, "resources": {"spot": 1}}
    before = nodes.replicas()
    arguments = {"max_num_seqs": 4, "decode_step_s": 0.02, "journal": str(journal)}
    with loaded(nodes, tmp_path, ray, **arguments) as engine:
        assert len(nodes.replicas() - before) == 2
        engine.submit([wordy(number, num_words=2) for number in range(300)])
        done: list[int] = []
        while len(done) < 100:
            done += [one.number for one in engine.collect(60.0)]
        nodes.kill(second)
        rest = set(range(300)) - set(done)
        outcomes = collect_all(engine, rest)
        assert {one.status_code for one in outcomes.values()} == {200}
        assert len(nodes.replicas() - before) == 1
        # A replica has at most 8 at a time, and of those it had some answers travelled yet.
        computed = journal.read_text().split()
        assert set(computed) == {str(number) for number in range(300)}
        assert len(computed) <= 300 + 8


def test_replicas_come_with_the_work_and_go_when_it_is_done(
    nodes: RayNodes, tmp_path: Path
) -> None:
    before = nodes.replicas()
    ray = {"max_replicas": 3, "idle_s": 0.5}
    with loaded(nodes, tmp_path, ray, max_num_seqs=4, decode_step_s=0.2) as engine:
        assert len(nodes.replicas() - before) == 1
        numbers = range(2000)
        engine.submit([chat(number) for number in numbers])
        wait_for(
            lambda: engine.collect(0.1) is not None and len(nodes.replicas() - before) == 3,
            what="there are three replicas",
        )
        engine.cancel(numbers)
        wait_for(lambda: len(nodes.replicas() - before) == 1, what="two are given back")
        assert run(engine, chat(5000))[0].status_code == 200


def test_a_model_that_cannot_be_loaded_says_why(nodes: RayNodes, tmp_path: Path) -> None:
    with (
        pytest.raises(EngineLoadError, match="No such weights"),
        loaded(nodes, tmp_path, fail_load="No such weights."),
    ):
        pass


def test_a_cluster_without_room_makes_the_batch_wait(nodes: RayNodes, tmp_path: Path) -> None:
    ray = {"num_gpus": 100, "room_timeout_s": 1}
    with (
        pytest.raises(EngineUnavailable, match=r"no room for a replica of sim.*100 GPU"),
        loaded(nodes, tmp_path, ray),
    ):
        pass


@pytest.fixture
def half_of_two(nodes: RayNodes, tmp_path: Path) -> Iterator[EngineHost]:
    """One replica, since the cluster has no room for the other one that is wanted."""
    ray: dict[str, Any] = {"resources": {"spot": 1}, "min_replicas": 2, "max_replicas": 2}
    for room_timeout_s in (3, 100):  # on a busy machine the first one takes longer than that
        engine = EngineHost(
            spec(nodes, ray | {"room_timeout_s": room_timeout_s}),
            log_path=tmp_path / "engine.log",
            isolated=False,
        )
        try:
            engine.load()
            break
        except EngineUnavailable:
            engine.close()
    yield engine
    engine.close()


def test_a_cluster_with_room_for_some_does_with_those_beside_another_model(
    nodes: RayNodes, two_replicas: EngineHost, half_of_two: EngineHost
) -> None:
    wait_for(lambda: len(nodes.replicas()) == 2 + 1, what="there is one more")
    two_replicas.submit([wordy(number) for number in range(64)])
    assert [one.status_code for one in run(half_of_two, chat(1), chat(2))] == [200, 200]
    outcomes = collect_all(two_replicas, range(64)).values()
    assert {one.status_code for one in outcomes} == {200}


def test_a_cluster_that_is_not_there_makes_the_batch_wait(nodes: RayNodes) -> None:
    with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:1, can't be reached"):
        RayEngine(spec(nodes, {"address": "127.0.0.1:1"})).load()


def test_a_batch_goes_on_after_its_worker_was_killed(nodes: RayNodes, tmp_path: Path) -> None:
    site = Site(tmp_path, engine_backoff_s=0.1)
    registry = site.settings.models
    table = f'address = "{nodes.address}"\nengine = "sim"\nnum_cpus = 0.1\n'
    registry.write_text(
        '[[model]]\nname = "spread"\nsource = "sim"\nengine = "ray"\n'
        f"[model.engine_args]\nmax_num_seqs = 8\ndecode_step_s = 0.02\n"
        f"[model.engine_args.ray]\n{table}min_replicas = 2\nmax_replicas = 2\n"
    )
    before = nodes.replicas()
    try:
        batch_id = site.submit([echo_line(number) for number in range(1000)], "spread")
        worker = site.start_worker()
        site.wait_for_progress(batch_id, 100)
        worker.kill()
        worker.wait()
        wait_for(lambda: not nodes.replicas() - before, what="the replicas have ended")
        site.start_worker()
        assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
        assert_answers_echo(site.results(batch_id), 1000)
    finally:
        site.close()
