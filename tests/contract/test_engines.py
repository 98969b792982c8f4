"""The simulated engine, and an engine in a process of its own, held to what every engine does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_app.config import Settings
from batch_app.engine.base import Engine, EngineRequest, ModelSpec
from batch_app.engine.host import EngineHost
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.process import EngineProcess, engine_environment
from batch_app.engine.sim import SimEngine
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineDied, EngineHung, EngineInterrupted, EngineLoadError
from contract.engine_conformance import EngineConformance, EngineLifetime, chat, collect_all, run
from support.waiting import wait_for

#: A token takes a moment, so that there is a middle to cancel in.
SLOW_ENOUGH = {"decode_step_s": 0.01}


def spec(**engine_args: Any) -> ModelSpec:
    return ModelSpec(name="sim", engine="sim", source="sim", engine_args=engine_args)


def wordy(number: int, num_words: int = 40) -> EngineRequest:
    return chat(number, content="word " * num_words, max_tokens=num_words)


class TestSimEngine(EngineConformance, EngineLifetime):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = SimEngine(spec(**SLOW_ENOUGH))
        engine.load()
        yield engine
        engine.close()

    @pytest.fixture
    def make_engine(self) -> Callable[[], Engine]:
        return lambda: SimEngine(spec(**SLOW_ENOUGH))

    def slow_request(self, number: int) -> EngineRequest:
        return wordy(number)


def test_the_simulated_engine_holds_while_a_file_exists(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    engine = SimEngine(spec(hold_after=2, hold_while=str(hold), max_num_seqs=1))
    engine.load()
    engine.submit([chat(number) for number in range(5)])
    collect_all(engine, [0, 1])
    assert engine.collect(0.05) == []
    hold.unlink()
    collect_all(engine, [2, 3, 4])
    engine.close()


@pytest.fixture(scope="module")
def process_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("host") / "engine.log"
    engine = EngineHost(spec(**SLOW_ENOUGH), log_path=log)
    engine.load()
    yield engine
    engine.close()


class TestEngineInItsProcess(EngineConformance, EngineLifetime):
    @pytest.fixture
    def engine(self, process_engine: Engine) -> Engine:
        return process_engine

    @pytest.fixture
    def make_engine(self, tmp_path: Path) -> Callable[[], Engine]:
        return lambda: EngineHost(spec(**SLOW_ENOUGH), log_path=tmp_path / "engine.log")

    def slow_request(self, number: int) -> EngineRequest:
        return wordy(number)


def host(tmp_path: Path, *, hang_s: float = 60.0, **engine_args: Any) -> EngineHost:
    return EngineHost(spec(**engine_args), log_path=tmp_path / "engine.log", hang_s=hang_s)


def test_a_killed_engine_is_noticed_and_its_signal_named(tmp_path: Path) -> None:
    engine = host(tmp_path, decode_step_s=0.05)
    engine.load()
    engine.submit([wordy(number) for number in range(10)])
    assert engine.pid
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="SIGKILL") as caught:
        collect_all(engine, range(10))
    assert caught.value.exit_code == -signal.SIGKILL
    assert engine.pid is None


def test_a_hanging_engine_is_killed_with_its_stacks_in_the_log(tmp_path: Path) -> None:
    engine = host(tmp_path, hang_s=1.0, hang_after=1)
    engine.load()
    pid = engine.pid
    assert pid
    engine.submit([chat(1)])
    with pytest.raises(EngineHung, match="1 requests in flight"):
        collect_all(engine, [1])
    assert "in collect" in (tmp_path / "engine.log").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_answer_to_what_was_cancelled_is_not_that_to_another_of_its_number(
    tmp_path: Path,
) -> None:
    """Two batches have the same numbers: the second must not get what the first asked for."""
    engine = host(tmp_path)
    engine.load()
    for number in range(20):
        engine.submit([chat(number, "of the first")])
        wait_for(lambda: not engine._inbox.empty(), what="an answer is on its way")
        engine.cancel([number])
        (outcome,) = run(engine, chat(number, "of the second"))
        assert b"of the second" in outcome.body
    engine.close()


def test_an_engine_that_works_slowly_does_not_count_as_hanging(tmp_path: Path) -> None:
    engine = host(tmp_path, hang_s=2.0, decode_step_s=0.05, max_num_seqs=1)
    engine.load()
    started = time.monotonic()
    outcomes = run(engine, *(wordy(number, num_words=1) for number in range(50)))
    assert time.monotonic() - started > 2.0
    assert all(outcome.status_code == 200 for outcome in outcomes)
    engine.close()


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    engine = host(tmp_path, fail_load="No such weights.")
    with pytest.raises(EngineLoadError, match="No such weights"):
        engine.load()
    assert engine.pid is None


def test_an_unknown_argument_or_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match="'no_such_thing'"):
        host(tmp_path, no_such_thing=1).load()
    unknown = ModelSpec(name="m", engine="abacus", source="m")
    with pytest.raises(EngineLoadError, match="'abacus'"):
        EngineHost(unknown, log_path=tmp_path / "engine.log").load()


def test_loading_can_be_interrupted(tmp_path: Path) -> None:
    engine = EngineHost(spec(load_s=60), log_path=tmp_path / "engine.log", interrupted=lambda: True)
    started = time.monotonic()
    with pytest.raises(EngineInterrupted):
        engine.load()
    assert time.monotonic() - started < 30


def test_the_engine_process_gets_no_credentials() -> None:
    environment = {
        "PATH": "/bin",
        "HOME": "/root",
        "HF_TOKEN": "x",
        "OPENAI_API_KEY": "x",
        "AWS_REGION": "x",
        "VLLM_BATCH_DATABASE_URL": "postgresql://user:secret@db/x",
        "VLLM_BATCH_STORAGE_URL": "s3://bucket",
        "AWS_ACCESS_KEY_ID": "id",
        "AZURE_STORAGE_ACCOUNT_NAME": "name",
        "GOOGLE_SERVICE_ACCOUNT": "/file",
        "MY_PASSWORD": "x",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    kept = engine_environment(environment)
    assert set(kept) & set(environment) == {"PATH", "HOME", "VLLM_CPU_KVCACHE_SPACE"}
    assert kept["HF_HUB_OFFLINE"] == "1"


def test_the_engine_process_ends_with_its_channel(tmp_path: Path) -> None:
    engine = host(tmp_path, hang_after=1)
    engine.load()
    pid = engine.pid
    assert pid
    engine.submit([chat(1)])
    process = engine._process
    assert process
    process.channel.close()  # as when the worker is killed
    wait_for(
        lambda: process.wait(0) is not None,
        timeout_s=120,
        what="the engine process ends although it hangs",
    )
    engine.close()


# -- a process that stands ready before its model is known -----------------------------------------


@pytest.mark.parametrize("named", ["sim", "", "abacus"])
def test_an_engine_takes_the_process_that_stands_ready(tmp_path: Path, named: str) -> None:
    log = tmp_path / "engine.log"
    ready = EngineProcess(log, "isolated", named)
    engine = EngineHost(spec(), log_path=log, ready=ready)
    engine.load()
    assert engine.pid == ready.pid
    assert run(engine, chat(1))[0].status_code == 200
    engine.close()
    assert ready.wait(0) is not None


def test_a_process_of_the_wrong_network_is_not_taken(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    ready = EngineProcess(log, "isolated", "sim")
    engine = EngineHost(spec(), log_path=log, isolated=False, ready=ready)
    engine.load()
    assert engine.pid != ready.pid
    assert ready.wait(0) is not None
    engine.close()


def test_a_process_that_stood_ready_and_died_is_an_engine_that_died(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    ready = EngineProcess(log, "isolated", "sim")
    os.kill(ready.pid, signal.SIGKILL)
    ready.wait()
    with pytest.raises(EngineDied):
        EngineHost(spec(), log_path=log, ready=ready).load()


def test_a_slot_that_needed_no_engine_ends_the_one_that_stood_ready(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    ready = EngineProcess(log, "isolated", "sim")
    lowered = LoweredLimits(tmp_path / "lowered.json")
    slot = EngineSlot(Settings(), log, lambda: False, lowered, ready=ready)
    slot.unload()
    assert ready.wait(0) is None
    slot.close()
    assert ready.wait(0) is not None
