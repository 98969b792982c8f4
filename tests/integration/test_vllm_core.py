"""The engine core as GPUs have it: spawned, stepped asynchronously, with several processes."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batch_app.engine.base import Engine, EngineStats, ModelSpec
from batch_app.engine.host import EngineHost
from batch_app.engine.process_group import group_members
from batch_app.engine.vllm import VllmEngine
from batch_app.errors import EngineDied, EngineLoadError
from contract.engine_conformance import EngineConformance, chat, collect_all, run
from integration.conftest import DEMO_MODEL, demo_spec
from support.network import network_of
from support.site import REPO, engine_core
from support.waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

CHILD = "batch_app.engine.vllm_core_child"


def core_of(engine: EngineHost) -> psutil.Process:
    assert engine.pid is not None
    return engine_core(engine.pid)


def said(body: bytes) -> str:
    content = json.loads(body)["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content.strip()


# -- a spawned core --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    engine = EngineHost(demo_spec(), log_path=tmp_path_factory.mktemp("spawned") / "engine.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_CORE_START", "spawn")
        engine.load()
    yield engine
    engine.close()


class TestSpawnedCore(EngineConformance):
    @pytest.fixture
    def engine(self, spawned: EngineHost) -> Engine:
        return spawned


def test_a_spawned_core_has_what_a_forked_one_inherits(spawned: EngineHost) -> None:
    core = core_of(spawned)
    assert CHILD in core.cmdline()
    assert spawned.pid
    assert network_of(core.pid) == network_of(spawned.pid) != network_of(os.getpid())
    assert os.getpgid(core.pid) == spawned.pid
    log = spawned._log_path
    assert "Starting the engine core by spawn: VLLM_BATCH_CORE_START is set." in log.read_text()
    spawned.submit([chat(0, max_tokens=1900, ignore_eos=True)])
    spawned.collect(0.5)
    spawned._dump_stacks()
    wait_for(lambda: "vllm_core.py" in log.read_text(), what="the core's stacks")
    spawned.cancel([0])


def test_a_spawned_core_ends_with_its_parent(tmp_path: Path) -> None:
    engine = EngineHost(demo_spec(), log_path=tmp_path / "engine.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_CORE_START", "spawn")
        engine.load()
    core = core_of(engine)
    engine.submit([chat(0, max_tokens=1900, ignore_eos=True)])
    assert engine.pid
    os.kill(engine.pid, signal.SIGKILL)
    wait_for(lambda: not core.is_running() or core.status() == "zombie", what="the core ends")
    with pytest.raises(EngineDied):
        collect_all(engine, [0])
    engine.close()


@pytest.mark.usefixtures("vllm_engine")  # vLLM is imported, and the hub out of reach
def test_a_spawned_core_says_why_it_cannot_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the words of the engine process, which knows the model's entry."""
    monkeypatch.setenv("VLLM_BATCH_CORE_START", "spawn")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO_MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # no tensor
    engine = VllmEngine(
        ModelSpec(
            name="broken", engine="vllm", source=str(folder), engine_args={"max_model_len": 256}
        )
    )
    with pytest.raises(
        EngineLoadError, match=r"'broken' could not be loaded: ValueError: .*weights"
    ):
        engine.load()


@pytest.mark.usefixtures("vllm_engine")
def test_a_core_that_loses_the_gpu_in_the_fork_is_spawned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A forked core has what is changed here, a spawned one doesn't: as with CUDA."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with …")

    monkeypatch.setattr(LLMEngine, "from_vllm_config", fail)
    caplog.set_level(logging.WARNING, "batch_app")  # as in an engine process
    engine = VllmEngine(demo_spec())
    try:
        engine.load([chat(0)])
        assert engine._client is not None
        assert CHILD in psutil.Process(engine._client.pid).cmdline()
        assert "Cannot re-initialize CUDA" in caplog.text
        (outcome,) = run(engine, chat(0, temperature=0))
        assert said(outcome.body) == "85"
    finally:
        engine.close()


OWN_CODE = """
from transformers import Qwen3Config

class OwnConfig(Qwen3Config):
    model_type = "own"
"""


@pytest.mark.usefixtures("vllm_engine")
def test_a_models_own_code_reaches_a_spawned_core(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The configuration is of a class that only the engine process has loaded so far."""
    monkeypatch.setenv("VLLM_BATCH_CORE_START", "spawn")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO_MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(OWN_CODE)
    engine = VllmEngine(
        ModelSpec(
            name="own",
            engine="vllm",
            source=str(folder),
            trust_remote_code=True,
            engine_args={"max_model_len": 512, "enforce_eager": True},
        )
    )
    try:
        engine.load()
        assert engine._client is not None
        assert type(engine._client.model_config.hf_config).__name__ == "OwnConfig"
        (outcome,) = run(engine, chat(0, temperature=0))
        assert said(outcome.body) == "85"
    finally:
        engine.close()


# -- asynchronous scheduling, which is vLLM's default on GPUs --------------------------------------


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    spec = demo_spec(worker_cls="support.asynchronous_worker.AsynchronousWorker")
    log = tmp_path_factory.mktemp("asynchronous") / "engine.log"
    engine = EngineHost(spec, log_path=log)
    with pytest.MonkeyPatch.context() as patch:
        path = (str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH", ""))
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        engine.load()
    yield engine
    engine.close()


def settled(engine: EngineHost) -> EngineStats:
    """The reading after the last step, which comes soon after the last outcome."""

    def look() -> bool:
        before = engine.stats()
        time.sleep(0.5)
        engine.collect(0.05)
        return engine.stats() == before and before.num_running == 0

    wait_for(look, what="the engine is idle")
    return engine.stats()


class TestAsynchronousScheduling(EngineConformance):
    @pytest.fixture
    def engine(self, asynchronous: EngineHost) -> Iterator[Engine]:
        yield asynchronous
        assert asynchronous.collect(0) == []


def test_tokens_are_counted_once_when_outputs_come_a_step_later(
    asynchronous: EngineHost,
) -> None:
    run(asynchronous, chat(0))
    before = settled(asynchronous)
    requests = [chat(n, max_tokens=1 + n % 7, ignore_eos=True, temperature=0) for n in range(40)]
    requests.append(chat(40, n=2, max_tokens=5, ignore_eos=True))
    requests.append(chat(41, temperature=0, stop=["5"], max_tokens=16))
    outcomes = run(asynchronous, *requests)
    after = settled(asynchronous)
    generated = after.generation_tokens_total - before.generation_tokens_total
    assert generated == sum(outcome.completion_tokens for outcome in outcomes)
    prompt = after.prompt_tokens_total - before.prompt_tokens_total
    assert prompt == sum(outcome.prompt_tokens for outcome in outcomes)
    assert (after.num_running, after.num_waiting) == (0, 0)


def test_answers_are_those_of_synchronous_steps(
    asynchronous: EngineHost, vllm_engine: VllmEngine
) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    as_json = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    requests = [
        chat(0, temperature=0),
        chat(1, "What is 10 + 11?", temperature=0, max_tokens=24),
        chat(2, temperature=0, max_tokens=24, response_format=as_json),
        chat(3, temperature=0, stop=["5"], max_tokens=16),
        chat(4, temperature=2.0, seed=7, max_tokens=24, ignore_eos=True),
    ]
    ours, others = run(asynchronous, *requests), run(vllm_engine, *requests)
    assert [said(outcome.body) for outcome in ours] == [said(outcome.body) for outcome in others]


def test_the_last_request_may_be_aborted_with_a_step_on_its_way(
    asynchronous: EngineHost,
) -> None:
    """A step that was begun for it has no request any more; the next request is none the worse."""
    for number in range(5):
        asynchronous.submit([chat(number, max_tokens=500, ignore_eos=True)])
        asynchronous.collect(0.2)
        asynchronous.cancel([number])
        (outcome,) = run(asynchronous, chat(number, temperature=0))
        assert said(outcome.body) == "85"


# -- nothing can be scheduled ----------------------------------------------------------------------


def test_the_core_pauses_while_a_grammar_is_compiled(vllm_engine: VllmEngine) -> None:
    """Stepping without a pause, it holds up the thread that compiles: 26 s instead of 9 s, once."""
    run(vllm_engine, chat(0))
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=24)) for _ in range(3000)]
    schema = {"type": "object", "properties": {"n": {"enum": words}}, "required": ["n"]}
    as_json = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    before, started = vllm_engine.stats().steps_total, time.monotonic()
    (outcome,) = run(vllm_engine, chat(1, temperature=0, max_tokens=3, response_format=as_json))
    assert outcome.status_code == 200
    assert before is not None
    num_steps = (vllm_engine.stats().steps_total or 0) - before
    assert 10 < num_steps < 20 + 1000 * (time.monotonic() - started)


# -- several processes, as with several GPUs -------------------------------------------------------


def shared_memory(group: int) -> set[Path]:
    """The memory that the processes of a group share."""
    found = set()
    for process in group_members(group):
        for mapped in process.memory_maps():
            if mapped.path.startswith("/dev/shm/"):
                found.add(Path(mapped.path))
    return {path for path in found if path.exists()}  # some has no name any more


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[EngineHost]:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    spec = demo_spec(
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_model_len=512,
        max_num_seqs=8,
    )
    engine = EngineHost(spec, log_path=tmp_path / "engine.log")
    engine.load()
    group = engine.pid
    assert group
    shared = shared_memory(group)
    # What vLLM shares on CPUs alone it removes seldom.
    of_cpus = {path for path in shared if "cpushm" in path.name}
    assert shared > of_cpus
    assert len(group_members(group)) >= 5  # with a core, a tracker, and two workers
    (outcome,) = run(engine, chat(0, temperature=0))
    assert said(outcome.body) == "85"
    yield engine
    engine.close()
    assert group_members(group) == []
    assert not any(path.exists() for path in shared - of_cpus)
    for path in of_cpus:
        path.unlink(missing_ok=True)


def test_several_processes_end_in_order_and_leave_nothing(parallel: EngineHost) -> None:
    parallel.submit([chat(0, max_tokens=400, ignore_eos=True)])
    parallel.collect(0.1)
    parallel.close()
    assert "leaked" not in parallel._log_path.read_text()


def test_several_processes_end_with_an_engine_that_was_killed(parallel: EngineHost) -> None:
    group = parallel.pid
    assert group
    os.kill(group, signal.SIGKILL)
    wait_for(lambda: group_members(group) == [], what="nobody is left of the group")


def test_a_process_of_several_that_dies_is_an_engine_that_died(parallel: EngineHost) -> None:
    parallel.submit([chat(n, max_tokens=400, ignore_eos=True) for n in range(200)])
    worker = core_of(parallel).children()[-1]
    worker.kill()
    with pytest.raises(EngineDied):
        collect_all(parallel, range(200))
