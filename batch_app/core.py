"""The nouns that every other module speaks of. Depends on nothing but the standard library.

A *File* is bytes a person gave us or we made for them. A *Batch* is the resource that runs: one
input file, one queue entry, one outcome. A *Request* is one line of the input file, known to the
code by its `number` (0-based, in input order) and to its owner by its `custom_id`. A *Result* is
the response or the error of one request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


def utc_now() -> datetime:
    """The default clock: aware UTC. Everything that needs the time takes a clock to be injected."""
    return datetime.now(UTC)


class Dialect(StrEnum):
    """The HTTP dialect a batch was created in, and is answered in by default."""

    NATIVE = "native"
    OPENAI = "openai"


class Endpoint(StrEnum):
    """What a line's `url` may name."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    SCORE = "/v1/score"
    RERANK = "/v1/rerank"


class BatchStatus(StrEnum):
    """The states of a batch; `docs/state_machine.md` draws them.

    Two of them exist only here: `QUEUED` (checked, waiting for a worker) and `RUNNING`. The native
    dialect shows them as `pending` and `running`, the OpenAI dialect shows both as `in_progress`.
    """

    VALIDATING = "validating"
    QUEUED = "queued"
    RUNNING = "running"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


#: The one transition table. A change of state that does not stand here is refused by the store.
#: `RUNNING -> RUNNING` is a rescue: another worker claims the batch under a higher epoch.
#: `RUNNING -> QUEUED` is a pause: the batch goes back to the queue with what it has.
TRANSITIONS: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.QUEUED, BatchStatus.FAILED, BatchStatus.CANCELLING}
    ),
    BatchStatus.QUEUED: frozenset(
        {BatchStatus.RUNNING, BatchStatus.FAILED, BatchStatus.CANCELLING, BatchStatus.EXPIRED}
    ),
    BatchStatus.RUNNING: frozenset(
        {
            BatchStatus.QUEUED,
            BatchStatus.RUNNING,
            BatchStatus.FINALIZING,
            BatchStatus.FAILED,
            BatchStatus.CANCELLING,
            BatchStatus.EXPIRED,
        }
    ),
    BatchStatus.FINALIZING: frozenset(
        {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.CANCELLING}
    ),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.FAILED: frozenset(),
    BatchStatus.EXPIRED: frozenset(),
    BatchStatus.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, nexts in TRANSITIONS.items() if not nexts)


class FilePurpose(StrEnum):
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


@dataclass(frozen=True, slots=True)
class LineError:
    """Why one line of an input file cannot run.

    `line` counts from 1 as an editor does; None when the error concerns the whole file. `param`
    names the offending field (`body.temperature`), or None.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


#: What the results log can hold of each count of a result.
MAX_TOKENS = (1 << 32) - 1


def token_count(value: object) -> int:
    """A number of tokens that came from outside: between 0 and `MAX_TOKENS`, 0 for what is no
    number."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return min(max(value, 0), MAX_TOKENS)


def is_success(status_code: int | None) -> bool:
    """Return whether a request that was answered with this status counts as completed.

    Only 200 does; all others count as failed, a redirect and another 2xx, too. None: the request
    has no response.
    """
    return status_code == 200


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one result, or summed over many."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def of_one_result(self) -> TokenCounts:
        """Within what the results log can hold of a single result."""
        return TokenCounts(
            token_count(self.prompt_tokens),
            token_count(self.completion_tokens),
            token_count(self.cached_tokens),
            token_count(self.reasoning_tokens),
        )

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class FinishReason(StrEnum):
    """Why the model ended an answer: OpenAI's values, and `OTHER` for a server's own."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class FinishReasonCounts:
    """Completed requests by the finish reason of their answers. Answers without one, such as
    embeddings, are in none of the counts."""

    stop: int = 0
    length: int = 0
    tool_calls: int = 0
    content_filter: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.stop + self.length + self.tool_calls + self.content_filter + self.other

    def __add__(self, more: FinishReasonCounts) -> FinishReasonCounts:
        return FinishReasonCounts(
            self.stop + more.stop,
            self.length + more.length,
            self.tool_calls + more.tool_calls,
            self.content_filter + more.content_filter,
            self.other + more.other,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is, counting only results that are safely on disk.

    `deduplicated`: of the done ones, those whose answer was computed for another request.
    """

    completed: int = 0
    failed: int = 0
    tokens: TokenCounts = field(default_factory=TokenCounts)
    deduplicated: int = 0
    finish_reasons: FinishReasonCounts = field(default_factory=FinishReasonCounts)

    @property
    def done(self) -> int:
        return self.completed + self.failed

    @property
    def truncated(self) -> int:
        """Of the completed requests, those with an answer that was cut off at its `max_tokens`."""
        return self.finish_reasons.length

    def __add__(self, more: Progress) -> Progress:
        return Progress(
            self.completed + more.completed,
            self.failed + more.failed,
            self.tokens + more.tokens,
            self.deduplicated + more.deduplicated,
            self.finish_reasons + more.finish_reasons,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a batch was at a time: the series of them is its pace."""

    at: datetime
    completed: int
    failed: int
    total_tokens: int

    @property
    def done(self) -> int:
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A File: what the store knows of it. The bytes lie where `files.DataDir` says."""

    id: str
    purpose: FilePurpose
    filename: str
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None = None
    owner: str | None = None


class PauseKind(StrEnum):
    """What a paused batch waits for."""

    #: Its model's entry in the registry: it is missing, or the engine rejected it.
    REGISTRY = "registry"
    #: The model hub, from which its model has to be downloaded.
    HUB = "hub"
    #: The server or cluster that has its model.
    REMOTE_SERVER = "remote_server"
    #: Memory of the device or the machine.
    MEMORY = "memory"
    #: The engine, which keeps ending.
    ENGINE = "engine"
    #: Room on a disk, or a folder that can be used.
    DISK = "disk"
    DATABASE = "database"
    OBJECT_STORAGE = "object_storage"
    #: A defect of this program.
    INTERNAL = "internal"


#: Pauses that every batch of the same model would meet, too.
PAUSES_OF_A_MODEL = frozenset({PauseKind.REGISTRY, PauseKind.HUB, PauseKind.REMOTE_SERVER})


@dataclass(frozen=True, slots=True)
class Paused:
    """Why a batch can't go on at the moment, and when it is tried again.

    `by`: who paused it; `server`: this program, on an error. `retry_at`: None if time alone changes
    nothing. `model`: the one concerned. `entry`: the fingerprint of its registry entry, empty if
    there was none; a change of it ends the pause at once. None: no entry is concerned.
    """

    kind: PauseKind
    reason: str
    since: datetime
    retry_at: datetime | None = None
    by: str = "server"
    model: str = ""
    entry: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A Batch as the store knows it. Times are aware UTC, durations seconds.

    `epoch` counts the claims of this batch; a worker that writes under an older epoch than the
    stored one changes nothing (fencing). `lease_owner` is None when nobody holds it; who does
    counts `heartbeats` up, and is believed gone when that stood still for `lease_s` seconds.
    `paused`: why it can't go on at the moment; None if it can, or a worker tries just now. Since
    its last progress it was paused `num_pauses` times, always for `pause_kind`.
    `expires_at` ends its completion window; None: it has all the time there is. Files published for
    it expire `output_expires_after_s` after they were made. `passed_over_at`: see `Waiting`.
    `deduplicate`: whether equal requests may be computed once. `workload`: what it asks of which
    model, as `workloads.to_json` writes it, from counted prompts since `counted_at`. `outlook`:
    what its worker last said is left, as `outlook.Left` writes it. `provenance`: what it ran on.
    """

    id: str
    dialect: Dialect
    status: BatchStatus
    endpoint: str
    model: str
    input_file_id: str
    created_at: datetime
    total: int = 0
    progress: Progress = field(default_factory=Progress)
    completion_window: str = "24h"
    expires_at: datetime | None = None
    metadata: Mapping[str, str] | None = None
    errors: tuple[LineError, ...] = ()
    error_message: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None
    throughput_tokens_per_s: float | None = None
    epoch: int = 0
    lease_owner: str | None = None
    lease_s: float | None = None
    heartbeats: int = 0
    paused: Paused | None = None
    pause_kind: PauseKind | None = None
    num_pauses: int = 0
    owner: str | None = None
    provenance: Mapping[str, Any] | None = None
    priority: int = 0
    retry_of: str | None = None
    output_expires_after_s: int | None = None
    passed_over_at: datetime | None = None
    deduplicate: bool = True
    workload: Sequence[Any] | None = None
    counted_at: datetime | None = None
    outlook: Mapping[str, Any] | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def pause_reason(self) -> str | None:
        return self.paused.reason if self.paused else None

    @property
    def ended_at(self) -> datetime | None:
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch that could be claimed now. `place` grows with every batch that is created.

    `passed_over_at`: when another batch first went before this older one; None: none has.
    `begun`: a worker had it before, and is gone. `paused`: as in `Batch`.
    """

    batch_id: str
    model: str
    num_requests: int
    place: int
    priority: int = 0
    passed_over_at: datetime | None = None
    begun: bool = False
    paused: Paused | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The batch whose turn it is, and those that it goes before although they are older."""

    batch_id: str
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine may have in hand in one step; by vLLM's names.

    `gpu_memory_utilization` is None where there is no GPU. `least_batched_tokens`: with fewer
    tokens a step the model's longest request would no longer fit.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float | None = None
    least_batched_tokens: int = 512


@dataclass(frozen=True, slots=True)
class LimitsTried:
    """Limits, and where they hold: on this device, with this version of the engine."""

    limits: EngineLimits
    device: str
    engine_version: str


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU's memory, and how much of it is free."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LoadRetry:
    """How to start an engine again, at once, that found too little memory.

    `too_large`: its limits; retry with smaller ones, and remember them. Its
    `gpu_memory_utilization` is None if that one is to stay as it is.
    `in_use`: other processes use the rest of this GPU; retry with the share that is free, and
    remember nothing.
    Neither: retry as before; memory was freed or taken while the engine measured it.
    """

    too_large: LimitsTried | None = None
    in_use: GpuMemory | None = None


class UploadStatus(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Upload:
    """A File that arrives in parts. `size_bytes` is what its owner announced."""

    id: str
    filename: str
    purpose: FilePurpose
    size_bytes: int
    mime_type: str
    status: UploadStatus
    created_at: datetime
    expires_at: datetime
    file_expires_after_s: int | None = None
    file_id: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class UploadPart:
    id: str
    upload_id: str
    size_bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's word for one act of creating: the same key again means the same batch.

    `fingerprint` tells whether it is also the same request.
    """

    key: str
    fingerprint: str
