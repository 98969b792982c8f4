"""Whether an error fails a batch or pauses it. The one place that decides that.

A batch fails only if no change of configuration or environment could make it succeed. Everything
else pauses it: it goes back to the queue with what it has, and is tried again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from batch_app.core import Batch, Paused, PauseKind
from batch_app.errors import (
    BadLines,
    ConfigError,
    EngineError,
    EngineLoadError,
    EngineOutOfMemory,
    EngineUnavailable,
    HubUnavailable,
    ModelNotFound,
    NotFound,
    ObjectsUnavailable,
    ResultsLogError,
    StorageFull,
    StorageLost,
    StoreUnavailable,
)

#: Of what is unknown: so often a batch is tried again without getting further before it fails.
MAX_UNKNOWN = 5
_UNKNOWN = frozenset({PauseKind.ENGINE, PauseKind.INTERNAL})
#: Trying these again costs a load of the model, which others wait for.
_COSTLY = frozenset({PauseKind.ENGINE, PauseKind.MEMORY})
COSTLY_FACTOR = 30.0
_FOR_SOMEBODY = frozenset({PauseKind.REGISTRY, PauseKind.MEMORY, *_UNKNOWN})
#: A server's own wish is followed up to this.
LONGEST_RETRY_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True)
class Fail:
    """End the batch, with its results so far."""

    message: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Try the batch again later.

    `retries`: whether time alone may help; otherwise it waits for its model's registry entry to
    change. `retry_after_s`: not before that.
    """

    kind: PauseKind
    reason: str
    model: str = ""
    retries: bool = True
    retry_after_s: float = 0.0


Decision: TypeAlias = Fail | Pause
#: How an error, its batch and the model that was at work are decided on.
Decide: TypeAlias = Callable[[Exception, Batch, str], Decision]


def decide(error: Exception, batch: Batch, model: str = "") -> Decision:
    """What an error means for the batch that met it. `model`: the one that was at work."""
    model = model or batch.model
    match error:
        case BadLines():
            return _bad_lines(error, batch, model)
        case ModelNotFound():
            return Pause(PauseKind.REGISTRY, error.message, model, retries=False)
        case ConfigError():
            return Pause(PauseKind.REGISTRY, error.message, model)
        case StorageFull() | StorageLost() | ResultsLogError():
            return Pause(PauseKind.DISK, error.message)
        case StoreUnavailable():
            return Pause(PauseKind.DATABASE, error.message)
        case NotFound():  # a worker asks only for what was there
            return Pause(PauseKind.DATABASE, f"The database has lost something: {error.message}")
        case ObjectsUnavailable():
            return Pause(PauseKind.OBJECT_STORAGE, error.message)
        case EngineError():
            return _engine_error(error, batch, model)
        case MemoryError():
            return Pause(PauseKind.MEMORY, "The worker ran out of memory.")
        case OSError():
            return Pause(PauseKind.DISK, str(error))
        case _:
            place = _place_of(error)
            return _unknown(
                PauseKind.INTERNAL,
                f"Internal error ({type(error).__name__}, {place}): a defect of this program. "
                "The worker's output has the details.",
                batch,
            )


def decide_for_one_run(error: Exception, batch: Batch, model: str = "") -> Decision:
    """As `decide`, for a run that somebody waits for: what only they can change fails it now."""
    decision = decide(error, batch, model)
    if isinstance(decision, Pause) and decision.kind in _FOR_SOMEBODY:
        return Fail(decision.reason)
    return decision


def to_paused(
    pause: Pause,
    batch: Batch,
    now: datetime,
    *,
    first_s: float,
    longest_s: float,
    entry_of: Callable[[str], str] = lambda _: "",
) -> tuple[Paused, int]:
    """The pause as the store keeps it, and which one in a row it is. Each is twice as long as the
    one before, from `first_s` up to `longest_s`. `entry_of`: the fingerprint of a model's entry."""
    num_pauses = batch.num_pauses + 1 if batch.pause_kind is pause.kind else 1
    factor = COSTLY_FACTOR if pause.kind in _COSTLY else 1.0
    wait_s = factor * min(first_s * 2.0 ** min(num_pauses - 1, 60), longest_s)
    wait_s = max(wait_s, min(pause.retry_after_s, LONGEST_RETRY_AFTER_S))
    paused = Paused(
        kind=pause.kind,
        reason=pause.reason,
        since=now,
        retry_at=now + timedelta(seconds=wait_s) if pause.retries else None,
        model=pause.model,
        entry=entry_of(pause.model) if pause.model else None,
    )
    return paused, num_pauses


def _engine_error(error: EngineError, batch: Batch, model: str) -> Decision:
    # "It ended so often" is raised from the last of these ends.
    cause = error if type(error) is not EngineError else (error.__cause__ or error)
    match cause:
        case HubUnavailable():
            after_s = cause.retry_after_s
            return Pause(PauseKind.HUB, error.message, model, retry_after_s=after_s)
        case EngineUnavailable():
            return Pause(
                PauseKind.REMOTE_SERVER,
                error.message,
                cause.model or model,
                retry_after_s=cause.retry_after_s,
            )
        case EngineOutOfMemory():
            return Pause(PauseKind.MEMORY, error.message, model)
        case EngineLoadError() if cause.retry is not None:
            return Pause(PauseKind.MEMORY, error.message, model)
        case EngineLoadError() if not cause.retriable:
            return Pause(PauseKind.REGISTRY, error.message, model, retries=False)
        case _:
            return _unknown(PauseKind.ENGINE, error.message, batch, model)


def _unknown(kind: PauseKind, reason: str, batch: Batch, model: str = "") -> Decision:
    if batch.pause_kind is kind and batch.num_pauses >= MAX_UNKNOWN:
        return Fail(
            f"{reason.rstrip('.')}. It was tried {MAX_UNKNOWN + 1} times without getting further. "
            f"The results so far are kept; once the cause is removed, run the rest: "
            f"vllm-batch retry {batch.id}"
        )
    assert kind in _UNKNOWN
    return Pause(kind, reason, model)


def _bad_lines(error: BadLines, batch: Batch, model: str) -> Decision:
    """The lines were good when the batch was queued; they are checked again where their index is
    lost."""
    if all(one.code == ModelNotFound.code for one in error.errors) and error.errors:
        return Pause(PauseKind.REGISTRY, error.errors[0].message, model)
    first = error.errors[0] if error.errors else None
    where = f" Line {first.line}: {first.message}" if first is not None else ""
    return Fail(
        f"{error.message.rstrip('.')}.{where} Its input file was good when the batch was queued: "
        "either it was changed on disk, or a limit in the settings was lowered since. Correct "
        f"that, then run it again: vllm-batch retry {batch.id}"
    )


def _place_of(error: Exception) -> str:
    """File and line where it was raised. Not its message, which may repeat a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
