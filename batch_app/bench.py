"""Benches: measures a model on purpose, with requests of three shapes.

Each shape is a batch of its own, run by a worker in this process on a data folder that is gone
afterwards; what remains are the benchmark records, as of any batch.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from batch_app.benchmarks import BenchmarkFolder, BenchmarkRecord
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, StoredFile, utc_now
from batch_app.errors import EngineError
from batch_app.failure_policy import decide_for_one_run
from batch_app.files import DataDir, new_id
from batch_app.intake import index_file
from batch_app.measuring import BENCH, PURPOSE
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.store import Store
from batch_app.validation import intake_rules
from batch_app.worker import Worker

LOOK_EVERY_S = 0.25
_SYLLABLES = ("ba", "ko", "mi", "ra", "tel", "son", "dur", "el", "pa", "nis", "gor", "vi")


@dataclass(frozen=True, slots=True)
class Shape:
    """Words of a prompt and tokens of an answer; both vary by a half around these."""

    name: str
    num_words: int
    num_tokens: int
    #: Of the requests, the share that is asked: long ones take longer.
    share: float


SHAPES = (
    Shape("short", 20, 16, 1.0),
    Shape("medium", 200, 128, 0.5),
    Shape("long", 800, 384, 0.25),
)
#: A context that is smaller than this leaves the long shape out of proportion: it is cut down.
WORDS_OF_CONTEXT = 0.25


def measure(
    entry: ModelEntry,
    settings: Settings,
    *,
    num_requests: int,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> list[BenchmarkRecord]:
    """Run the three shapes, and return the records they left, in this order. Minutes.

    Raises EngineError where the model can't be loaded or a batch fails; OSError, StorageFull.
    """
    stop = stop or threading.Event()
    with TemporaryDirectory(prefix="vllm-batch-bench-") as name:
        folder = Path(name)
        own = settings.model_copy(
            update={
                "data_dir": folder,
                "storage_url": "",
                "database_url": f"sqlite:///{folder / 'bench.db'}",
                "order": "arrival",
                "deduplicate": False,
            }
        )
        data = DataDir(folder)
        data.create()
        store = Store(own.resolved_database_url)
        try:
            store.migrate()
            batches = [_add(store, data, own, entry, shape, num_requests) for shape in SHAPES]
            with contextlib.redirect_stdout(sys.stderr):  # what the worker says of itself
                _run(store, own, batches, say, stop)
        finally:
            store.close()
    suffixes = [batch.id.rsplit("_", 1)[-1][:12] for batch in batches]
    records = BenchmarkFolder(settings.benchmarks_dir).all(entry.name)
    found = {record.test_id.rsplit("-", 1)[-1]: record for record in records}
    return [found[suffix] for suffix in suffixes if suffix in found]


def _run(
    store: Store,
    settings: Settings,
    batches: list[Batch],
    say: Callable[[str], None],
    stop: threading.Event,
) -> None:
    worker = Worker(settings, stop=stop, decide=decide_for_one_run)
    # Not a daemon: the engine process dies with the thread that started it.
    thread = threading.Thread(target=worker.run, name="worker")
    thread.start()
    try:
        for batch, shape in zip(batches, SHAPES, strict=True):
            say(f"{shape.name}: {batch.total:,} requests.")
            while thread.is_alive() and not store.get_batch(batch.id).is_terminal:
                time.sleep(LOOK_EVERY_S)
            ended = store.get_batch(batch.id)
            if ended.status is not BatchStatus.COMPLETED or not ended.progress.completed:
                why = ended.error_message or "no request succeeded"
                raise EngineError(f"The {shape.name} batch did not succeed: {why}")
    finally:
        stop.set()
        thread.join()


def _add(
    store: Store,
    data: DataDir,
    settings: Settings,
    entry: ModelEntry,
    shape: Shape,
    num_requests: int,
) -> Batch:
    now = utc_now()
    batch = Batch(
        id=new_id("batch"),
        dialect=Dialect.NATIVE,
        status=BatchStatus.QUEUED,
        endpoint="/v1/completions",
        model=entry.name,
        input_file_id=new_id("file"),
        created_at=now,
        queued_at=now,
        total=max(round(shape.share * num_requests), 10),
        metadata={PURPOSE: BENCH, "shape": shape.name},
        deduplicate=False,
    )
    path = data.input_file(batch.input_file_id)
    with path.open("wb") as file:
        file.writelines(_lines(entry, shape, batch.total))
    folder = data.work_dir(batch.id)
    folder.mkdir(parents=True)
    index_file(path, folder, intake_rules(batch, settings, ModelRegistry([entry])))
    size = path.stat().st_size
    input_file = StoredFile(batch.input_file_id, FilePurpose.BATCH, "bench.jsonl", size, now)
    return store.add_batch(batch, input_file)


def _lines(entry: ModelEntry, shape: Shape, num: int) -> Iterator[bytes]:
    """Prompts that share nothing, answers of a set length: the same for every model."""
    dice = random.Random(f"{shape.name} {num}")
    context = entry.max_model_len or 1 << 20
    for number in range(num):
        words = min(_around(dice, shape.num_words), max(int(context * WORDS_OF_CONTEXT), 1))
        tokens = min(_around(dice, shape.num_tokens), max(int(context * WORDS_OF_CONTEXT), 1))
        body: dict[str, Any] = {
            "prompt": " ".join(_word(dice) for _ in range(words)),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 1.0,
        }
        yield (
            orjson.dumps({"custom_id": f"{number}", "url": "/v1/completions", "body": body}) + b"\n"
        )


def _around(dice: random.Random, value: int) -> int:
    return max(round(value * dice.uniform(0.5, 1.5)), 1)


def _word(dice: random.Random) -> str:
    return "".join(dice.choices(_SYLLABLES, k=2))
