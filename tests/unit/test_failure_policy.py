"""Which errors fail a batch, and which pause it: one decision for each."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from batch_app import errors
from batch_app.core import EngineLimits, LimitsTried, LineError, LoadRetry, PauseKind
from batch_app.errors import (
    BadLines,
    BatchAppError,
    ConfigError,
    EngineDied,
    EngineError,
    EngineLoadError,
    EngineOutOfMemory,
    EngineUnavailable,
    HubUnavailable,
    ModelNotFound,
    ObjectsUnavailable,
    ResultsLogError,
    StorageFull,
    StorageLost,
    StoreLost,
    StoreUnavailable,
)
from batch_app.failure_policy import MAX_UNKNOWN, Fail, Pause, decide, to_paused
from support.batches import a_batch

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TRIED = LimitsTried(EngineLimits(8, 512), "gpu", "1")


def ended_often(cause: EngineError) -> EngineError:
    error = EngineError("The engine ended 3 times without an answer in between.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "retries"),
    [
        (ConfigError("No TOML."), PauseKind.REGISTRY, True),
        (ModelNotFound("Not there."), PauseKind.REGISTRY, False),
        (EngineLoadError("No such argument."), PauseKind.REGISTRY, False),
        (HubUnavailable("Away."), PauseKind.HUB, True),
        (EngineUnavailable("Down."), PauseKind.REMOTE_SERVER, True),
        (EngineLoadError("Full.", retry=LoadRetry(too_large=TRIED)), PauseKind.MEMORY, True),
        (EngineOutOfMemory("Full."), PauseKind.MEMORY, True),
        (MemoryError(), PauseKind.MEMORY, True),
        (ended_often(EngineOutOfMemory("Full.")), PauseKind.MEMORY, True),
        (ended_often(EngineDied("Signal 11.")), PauseKind.ENGINE, True),
        (EngineLoadError("Too slow.", retriable=True), PauseKind.ENGINE, True),
        (StorageFull("Full."), PauseKind.DISK, True),
        (StorageLost("Gone."), PauseKind.DISK, True),
        (ResultsLogError("Torn."), PauseKind.DISK, True),
        (OSError(30, "Read-only file system"), PauseKind.DISK, True),
        (StoreUnavailable("Locked."), PauseKind.DATABASE, True),
        (StoreLost("Gone."), PauseKind.DATABASE, True),
        (ObjectsUnavailable("Away."), PauseKind.OBJECT_STORAGE, True),
        (KeyError("a prompt"), PauseKind.INTERNAL, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_a_change_can_mend_pauses(error: Exception, kind: PauseKind, retries: bool) -> None:
    decision = decide(error, a_batch())
    assert isinstance(decision, Pause)
    assert (decision.kind, decision.retries) == (kind, retries)
    assert decision.reason


def kinds(of: type[BatchAppError]) -> list[type[BatchAppError]]:
    return [one for child in of.__subclasses__() for one in (child, *kinds(child))]


def test_no_error_of_ours_is_taken_for_a_defect_unless_it_is_one() -> None:
    """A new error that a batch can meet has to be decided on."""
    environment = [EngineError, StoreUnavailable, StorageFull, StorageLost, ObjectsUnavailable]
    for kind in [one for each in environment for one in (each, *kinds(each))]:
        decision = decide(kind("Why."), a_batch())
        assert isinstance(decision, Pause), kind
        assert decision.kind is not PauseKind.INTERNAL, kind
    assert errors.EngineHung in kinds(EngineError)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("a prompt"), PauseKind.INTERNAL),
        (ended_often(EngineDied("Signal 11.")), PauseKind.ENGINE),
    ],
)
def test_what_is_unknown_fails_after_five_pauses(error: Exception, kind: PauseKind) -> None:
    batch = a_batch(pause_kind=kind, num_pauses=MAX_UNKNOWN - 1)
    assert isinstance(decide(error, batch), Pause)
    batch = a_batch(pause_kind=kind, num_pauses=MAX_UNKNOWN)
    decision = decide(error, batch)
    assert isinstance(decision, Fail)
    assert f"vllm-batch retry {batch.id}" in decision.message
    assert "a prompt" not in decision.message
    other = a_batch(pause_kind=PauseKind.DISK, num_pauses=100)
    assert isinstance(decide(error, other), Pause)


def test_what_is_known_never_fails() -> None:
    batch = a_batch(pause_kind=PauseKind.HUB, num_pauses=10_000)
    assert isinstance(decide(HubUnavailable("Away."), batch), Pause)


def bad_lines(*codes: str) -> BadLines:
    lines = [LineError(code, f"{code}!", number + 1) for number, code in enumerate(codes)]
    return BadLines("The file has bad lines.", lines, len(lines))


def test_lines_that_became_bad_fail_unless_only_their_model_is_missing() -> None:
    decision = decide(bad_lines("invalid_json_line", "model_not_found"), a_batch())
    assert isinstance(decision, Fail)
    assert "Line 1: invalid_json_line!" in decision.message
    decision = decide(bad_lines("model_not_found"), a_batch())
    assert isinstance(decision, Pause)
    assert decision.kind is PauseKind.REGISTRY


def lengths(pause: Pause, **batch: Any) -> tuple[float | None, int]:
    paused, number = to_paused(
        pause, a_batch(**batch), NOW, first_s=1.0, longest_s=60.0, entry_of=lambda m: f"of {m}"
    )
    assert paused.entry == (f"of {pause.model}" if pause.model else None)
    assert paused.since == NOW
    return (paused.retry_at - NOW).total_seconds() if paused.retry_at else None, number


def test_pauses_grow_to_a_bound_and_begin_anew_for_another_kind() -> None:
    away = Pause(PauseKind.HUB, "Away.", "m")
    assert lengths(away) == (1.0, 1)
    assert lengths(away, pause_kind=PauseKind.HUB, num_pauses=1) == (2.0, 2)
    assert lengths(away, pause_kind=PauseKind.HUB, num_pauses=5) == (32.0, 6)
    assert lengths(away, pause_kind=PauseKind.HUB, num_pauses=5000) == (60.0, 5001)
    assert lengths(away, pause_kind=PauseKind.DISK, num_pauses=5) == (1.0, 1)
    assert lengths(Pause(PauseKind.ENGINE, "Dies.")) == (30.0, 1)
    assert lengths(Pause(PauseKind.REGISTRY, "Rejected.", "m", retries=False)) == (None, 1)
    asked = Pause(PauseKind.REMOTE_SERVER, "Busy.", "m", retry_after_s=90.0)
    assert lengths(asked) == (90.0, 1)
    absurd = Pause(PauseKind.REMOTE_SERVER, "Busy.", "m", retry_after_s=1e9)
    assert lengths(absurd) == (3600.0, 1)
