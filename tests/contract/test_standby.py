"""An engine process that imports its libraries while another engine is still at work."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from batch_app.config import Settings
from batch_app.engine import slot
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineDied, EngineOutOfMemory
from batch_app.registry import ModelEntry
from contract.engine_conformance import chat, run


def make_slot(log: Path) -> EngineSlot:
    return EngineSlot(
        Settings(), log, lambda: False, LoweredLimits(log.with_name("lowered-limits.json"))
    )


@pytest.fixture
def sim_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated engine counts among those that take long to import, on a machine with room."""
    monkeypatch.setattr(slot, "IMPORTING_ENGINES", ("sim",))
    monkeypatch.setattr(slot, "STAND_BY_CPUS", 1)


@pytest.mark.usefixtures("sim_imports")
def test_the_next_engine_takes_the_process_that_was_started_beside_the_last_one(
    tmp_path: Path,
) -> None:
    log = tmp_path / "engine.log"
    entries = [ModelEntry(name=name, source=name, engine="sim") for name in "ab"]
    with closing(make_slot(log)) as one:
        first, _ = one.take(entries[0])
        assert one.stand_by(entries[1])
        assert not one.stand_by(entries[1])  # there is one
        assert one._ready is not None
        ready = one._ready
        with log.open("ab") as file:
            file.write(b"torch.OutOfMemoryError: CUDA out of memory\n")  # the first one's
        second, info = one.take(entries[1])
        assert (second.pid, info.model) == (ready.pid, "b")
        assert first.pid is None
        os.kill(ready.pid, signal.SIGTERM)
        ready.wait()
        with pytest.raises(EngineDied) as died:
            run(second, chat(0))
        assert not isinstance(died.value, EngineOutOfMemory)


@pytest.mark.usefixtures("sim_imports")
def test_a_process_waits_for_an_engine_of_its_kind_or_is_stood_down(tmp_path: Path) -> None:
    with closing(make_slot(tmp_path / "engine.log")) as one:
        assert one.stand_by(ModelEntry(name="a", source="a", engine="sim"))
        assert one._ready is not None
        ready = one._ready
        ready.engine = "vllm"
        host, _ = one.take(ModelEntry(name="a", source="a", engine="sim"))
        assert host.pid != ready.pid
        assert ready.wait(0) is None
        one.stand_down()
        assert ready.wait(0) is not None
        one.stand_down()


def test_no_process_stands_by_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = ModelEntry(name="a", source="a", engine="sim")
    with closing(make_slot(tmp_path / "engine.log")) as one:
        monkeypatch.setattr(slot, "STAND_BY_CPUS", 1)
        assert not one.stand_by(sim)  # nothing to import
        monkeypatch.setattr(slot, "IMPORTING_ENGINES", ("sim",))
        monkeypatch.setattr(slot, "STAND_BY_BYTES", 1 << 60)
        assert not one.stand_by(sim)
        monkeypatch.setattr(slot, "STAND_BY_BYTES", 0)
        monkeypatch.setattr(slot, "STAND_BY_CPUS", 1 << 20)
        assert not one.stand_by(sim)
