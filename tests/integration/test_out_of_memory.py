"""An engine that runs out of memory at its start is started smaller, and remembered so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_app.config import Settings
from batch_app.core import BatchStatus
from batch_app.engine.limits import MAX_SMALLER_STARTS, LoweredLimits
from batch_app.engine.slot import EngineSlot
from batch_app.errors import EngineLoadError
from batch_app.registry import ModelEntry
from support.site import Site, assert_answers_echo, echo_line

CRAMPED = ModelEntry(
    name="cramped",
    source="sim",
    engine="sim",
    engine_args={"max_num_seqs": 256, "oom_above_seqs": 40},
)


def make_slot(folder: Path) -> EngineSlot:
    lowered = LoweredLimits(folder / "lowered-limits.json")
    return EngineSlot(Settings(), folder / "engine.log", lambda: False, lowered)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[EngineSlot]:
    slot = make_slot(tmp_path)
    yield slot
    slot.unload()


def test_it_is_tried_again_smaller_until_it_fits(slot: EngineSlot) -> None:
    said: list[str] = []
    _, info = slot.take(CRAMPED, said.append)
    assert info.max_num_seqs == 32
    assert ["128 requests" in said[0], "64 requests" in said[1], "32 requests" in said[2]] == [
        True
    ] * 3
    assert len(said) == 3
    assert all("out of memory" in line for line in said)


def test_the_next_load_begins_there(slot: EngineSlot, tmp_path: Path) -> None:
    slot.take(CRAMPED)
    slot.unload()
    said: list[str] = []
    other = make_slot(tmp_path)
    try:
        _, info = other.take(CRAMPED, said.append)
        assert (info.max_num_seqs, said) == (32, [])
        assert "memory" in info.limits_source
        changed = CRAMPED.model_copy(update={"engine_args": {"max_num_seqs": 48}})
        _, info = other.take(changed, said.append)
        assert info.max_num_seqs == 48
    finally:
        other.unload()


def test_an_engine_that_died_of_it_while_running_starts_smaller(slot: EngineSlot) -> None:
    assert slot.lower() is None
    slot.take(CRAMPED)
    lower = slot.lower()
    assert lower is not None
    assert lower.max_num_seqs == 16
    slot.unload()
    _, info = slot.take(CRAMPED)
    assert info.max_num_seqs == 16


def test_a_model_that_fits_in_no_way_is_given_up(slot: EngineSlot) -> None:
    hopeless = CRAMPED.model_copy(update={"engine_args": {"oom_above_seqs": 0}})
    said: list[str] = []
    with pytest.raises(EngineLoadError, match="out of memory"):
        slot.take(hopeless, said.append)
    assert len(said) == MAX_SMALLER_STARTS
    assert "4 requests" in said[-1]
    assert slot.model is None


def test_the_batch_runs_and_its_log_says_so(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        batch_id = site.submit((echo_line(n) for n in range(100)), "cramped")
        site.start_worker()
        assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
        assert_answers_echo(site.results(batch_id), 100)
        log = site.log(batch_id)
        assert "out of memory. Trying again with 128 requests" in log
        assert "Limits: 32 requests" in log
        again = site.submit([echo_line(0)], "cramped")
        assert site.wait_until_done(again).status is BatchStatus.COMPLETED
        assert "Trying again" not in site.log(again)
        loads = site.store.totals().loads["cramped"]
        assert (loads.num_loads, loads.num_failed) == (1, 3)
        assert 0 < loads.load_s < 60
    finally:
        site.close()
