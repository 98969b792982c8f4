"""How many tokens the prompts of a batch have: counted, sampled, or told from their bytes.

Up to 10,000 requests are counted, each as the engine will; of more, or of very long ones, a sample
is (`sample.py`), whose error is known. The counting is done by a child process (`child.py`) with
the model's own tokenizer. Where that isn't on this machine, bytes are divided by what past runs had
per token.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from batch_app.counting.child import NOT_REACHED, REFUSED, Order, Report
from batch_app.counting.sample import choose, spread, stratify
from batch_app.index import Index
from batch_app.machine import hub_folder
from batch_app.registry import ModelEntry

logger = logging.getLogger(__name__)

#: Every request is counted up to here.
MAX_COUNTED = 10_000
MAX_COUNTED_BYTES = 64 << 20
#: Of a sample. Thrice as many would narrow the error to less than two thirds.
SAMPLE_REQUESTS = 3_000
SAMPLE_BYTES = 4 << 20
START_S = 20.0

#: Of a line's bytes, where nothing of the model is known: English chats in JSON lie around it.
USUAL_BYTES_PER_TOKEN = 4.5
#: One standard error of a sum that was told from bytes.
ERROR_OF_LEARNED, ERROR_OF_USUAL = 0.10, 0.30


_Counts = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BytesPerToken:
    """What to go by without a tokenizer. `learned`: from runs of this model."""

    ratio: float = USUAL_BYTES_PER_TOKEN
    learned: bool = False

    def counts(self, lengths: npt.NDArray[np.int64], reason: str = "") -> PromptCounts:
        """Of lines of so many bytes."""
        return PromptCounts(
            tokens=(lengths / self.ratio).astype(np.float32),
            basis="bytes" if self.learned else "guess",
            relative_error=ERROR_OF_LEARNED if self.learned else ERROR_OF_USUAL,
            reason=reason,
        )


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Prompt tokens of some requests, in the order they were asked for, shape (n,).

    `basis`: `counted`, `sampled` (so many `num_counted` of them), `bytes` (per token, of past
    runs), or `guess`. `relative_error`: one standard error of the sum, 0 where all were counted.
    `refused`: positions of those that the engine will refuse, among the ones looked at. `fixed`:
    of each whether its answer takes all the tokens it may, as far as that was looked at. `reason`:
    why there was no tokenizer.
    """

    tokens: npt.NDArray[np.float32]
    basis: str
    relative_error: float
    num_counted: int = 0
    refused: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    fixed: npt.NDArray[np.bool_] | None = None
    reason: str = ""

    @property
    def total(self) -> int:
        return round(float(self.tokens.sum(dtype=np.float64)))


def count_prompts(
    index: Index,
    numbers: npt.NDArray[np.int64],
    input_path: Path,
    entry: ModelEntry,
    *,
    budget_s: float,
    usual: BytesPerToken | None = None,
) -> PromptCounts:
    """Prompt tokens of these requests on this model.

    `budget_s`: counting ends after so many seconds at the latest, with what it has by then.
    """
    records = index.records[numbers]
    lengths = records["length"].astype(np.int64)
    if not len(lengths):
        return PromptCounts(np.empty(0, np.float32), "counted", 0.0)
    strata = stratify(lengths)
    few = len(lengths) <= MAX_COUNTED and int(lengths.sum()) <= MAX_COUNTED_BYTES
    chosen = choose(
        lengths,
        strata,
        max_requests=MAX_COUNTED if few else SAMPLE_REQUESTS,
        max_bytes=MAX_COUNTED_BYTES if few else SAMPLE_BYTES,
    )
    places = np.empty((len(chosen), 3), dtype=np.int64)
    for column, name in enumerate(("offset", "length", "endpoint")):
        places[:, column] = records[name][chosen]
    template = entry.engine_args.get("chat_template")
    order = Order(
        engine=entry.engine,
        source=str(entry.engine_args.get("tokenizer") or entry.source),
        revision=entry.revision,
        chat_template=template if isinstance(template, str) else None,
        input_path=str(input_path),
        endpoints=list(index.endpoints),
        num_lines=len(chosen),
        budget_s=budget_s,
    )
    if entry.engine != "sim" and not is_here(order.source):
        return (usual or BytesPerToken()).counts(lengths, "its files are not on this machine")
    report, counts, flags = _ask_child(order, places)
    reached = counts != NOT_REACHED
    if not reached.any():
        reason = report.reason or "counting took too long"
        return (usual or BytesPerToken()).counts(lengths, reason)
    refused = np.sort(chosen[counts == REFUSED])
    seen = chosen[reached]
    counts = np.maximum(counts[reached], 0)
    tokens, error = spread(lengths, strata, seen, counts)
    everything = len(seen) == len(lengths)
    flags = flags[reached]
    # Where not all were looked at, the rest is as most of these are.
    fixed = np.full(len(lengths), bool(flags.mean() > 0.5))
    fixed[seen] = flags
    return PromptCounts(
        tokens=tokens,
        basis="counted" if everything else "sampled",
        relative_error=error,
        num_counted=len(seen),
        refused=refused,
        fixed=fixed,
    )


def is_here(source: str) -> bool:
    """Whether it is worth looking: a folder, or in the model hub's cache under its usual name."""
    if Path(source).expanduser().is_dir():
        return True
    return hub_folder(source).is_dir()


def _ask_child(order: Order, places: npt.NDArray[np.int64]) -> tuple[Report, _Counts, _Flags]:
    """The report, counts and flags in the order of the places; none where it came to nothing."""
    nothing = np.full(len(places), NOT_REACHED, np.int64), np.zeros(len(places), bool)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "batch_app.counting.child"],
            input=msgspec.json.encode(order) + b"\n" + places.tobytes(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a library's complaint could quote a prompt
            timeout=order.budget_s + START_S,
            env=_environment(),
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        reason = f"the counting process did not answer ({type(error).__name__})"
        return Report(reason=reason), *nothing
    line, _, rest = done.stdout.partition(b"\n")
    try:
        report = msgspec.json.decode(line, type=Report)
        counts = np.frombuffer(rest[: 4 * len(places)], dtype=np.int32).astype(np.int64)
        flags = np.frombuffer(rest[4 * len(places) :], dtype=np.bool_)
    except (msgspec.MsgspecError, ValueError):
        return Report(reason=f"the counting process ended with {done.returncode}"), *nothing
    if report.reason or not len(counts) == len(flags) == len(places):
        return report, *nothing
    return report, counts, flags


def _environment() -> dict[str, str]:
    """No way to the hub, and no thread of the tokenizer's that forks could meet."""
    kept = {"PATH", "HOME", "LANG", "PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"}
    given = {name: value for name, value in os.environ.items() if name in kept}
    return given | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
