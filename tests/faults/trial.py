"""One trial: batches are submitted and run while something fails; then everything must be right.

All chance comes from the trial's seed: which requests there are, what fails, where and when. Only
how far the processes are at that moment is up to the machine.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

from batch_app import database
from batch_app.core import Batch, BatchStatus
from batch_app.faults import CRASH_POINTS
from batch_app.files import DataDir
from batch_app.orphans import remove_orphans
from faults.trial_outages import OUTAGES, Services
from faults.workloads import MAX_WORDS, DemoWorkload, EchoWorkload, Workload
from support.postgres import PostgresServer
from support.site import Site, engine_pid, kill_tree
from support.waiting import PATIENCE_S, wait_for

#: Crash points of the API server; all others are the worker's.
OF_THE_SERVER = ("upload-moved", "upload-added", "check-moved", "check-told", "closing-published")
#: A process that hasn't come to its crash point by then won't, even on a busy machine.
CRASHES_WITHIN_S = 30.0
#: Those that take a batch that is still running after its first results.
IN_THE_MIDDLE = ("suspects-written", "given-back")
#: Those that most batches come to several times.
COME_TO_OFTEN = ("results-written", "results-committed", "progress-told", "file-moved")
CALLS = ("write", "fsync", "rename", "link", "open", "commit")
#: Where the database is reached over a network.
MORE_CALLS = ("commit answer",)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
SETTINGS: dict[str, Any] = {
    "lease_s": 1.5,
    "heartbeat_s": 0.2,
    "poll_interval_s": 0.1,
    "commit_interval_s": 0.05,
    "drain_s": 1.0,
    "min_free_bytes": 0,
    "engine_backoff_s": 0.01,
}


def kinds(engine: str, *, on_postgres: bool) -> list[str]:
    """What may go wrong. Real vLLM takes half a minute to start: there it is what hits an engine at
    work."""
    if engine == "vllm":
        return ["kill", "registry", "hub"]
    more = ["database", "several"] if on_postgres else []
    return ["kill", "crash point", "failing call", *OUTAGES, *more]


@dataclass
class Report:
    """What one trial did. `computed` counts answers of the engine, `needed` those that count."""

    seed: int
    kind: str
    what: str
    hit: list[str] = field(default_factory=list)
    requests: int = 0
    needed: int = 0
    computed: int = 0
    seconds: float = 0.0
    failure: str | None = None


class Trial:
    """Make one, `run` it."""

    def __init__(
        self,
        root: Path,
        seed: int,
        kind: str | None = None,
        what: str = "",
        postgres: PostgresServer | None = None,
        engine: str = "sim",
    ) -> None:
        """With a server of PostgreSQL's, which it has for itself, the trial runs on that. `engine`:
        "sim", or "vllm" with the demo model."""
        self.chance = random.Random(seed)
        self.kind = kind or self.chance.choice(kinds(engine, on_postgres=postgres is not None))
        self.what = what
        self.workload: Workload = DemoWorkload() if engine == "vllm" else EchoWorkload()
        self.postgres = postgres
        settings = SETTINGS
        if postgres is not None:
            settings = SETTINGS | {"database_url": postgres.new_database_with_tables()}
        self.site = Site(root, **settings)
        self.journal = root / "journal"
        self.services = Services.of(self.kind, root, engine)
        entry = self.services.model_entry(engine, self._sim_args())
        registry = root / "models.toml"
        registry.write_text(registry.read_text() + entry)
        self.report = Report(seed, self.kind, what)
        self.accepted: set[str] = set()
        self.requests: dict[str, list[dict[str, Any]]] = {}

    def run(self) -> Report:
        began = time.monotonic()
        try:
            if self.kind in OUTAGES:
                OUTAGES[self.kind](self)
            else:
                getattr(self, "_" + self.kind.replace(" ", "_"))()
            self._bring_to_an_end()
            self._check()
        except AssertionError as failure:
            self.report.failure = str(failure)[:2000] or "assertion"
        finally:
            self.site.close()
            self.services.stop()
            if self.postgres is not None:
                self.postgres.drop(self.site.settings.resolved_database_url)
        self.report.seconds = round(time.monotonic() - began, 2)
        return self.report

    def _sim_args(self) -> dict[str, Any]:
        step_s = self.chance.choice([0.001, 0.003, 0.01])
        seqs = self.chance.choice([4, 16, 64])
        if self.what in IN_THE_MIDDLE:
            step_s, seqs = 0.05, 4
        # So that there is something to interrupt.
        if self.kind in ("kill", "database", "several", *OUTAGES):
            step_s, seqs = self.chance.choice([0.02, 0.05]), self.chance.choice([4, 16])
        return {
            "max_num_seqs": seqs,
            "max_model_len": MAX_WORDS,
            "decode_step_s": step_s,
            "journal": str(self.journal),
        }

    # -- what goes wrong -----------------------------------------------------------------------

    def _kill(self) -> None:
        """Kill processes at random times, one after the other, and start them again."""
        url, worker = self.start_both()
        server = self._server
        batch_id = self.upload(url)
        for _ in range(self.chance.randint(1, 3)):
            if self.site.batch(batch_id).is_terminal:
                break
            victim = self.chance.choice(["worker", "engine", "server", "everything"])
            if self.chance.random() < 0.7:
                before = self.site.batch(batch_id).progress.done
                with suppress(AssertionError):
                    wait_for(lambda before=before: self._has_moved(batch_id, before), timeout_s=20)
            time.sleep(self.chance.uniform(0.0, 0.7))
            self.report.hit.append(f"killed: {victim}")
            if victim == "engine":
                try:
                    os.kill(engine_pid(worker.pid, timeout_s=1.0), signal.SIGKILL)
                except (AssertionError, ProcessLookupError):
                    continue  # it isn't there yet, or any more
            if victim in ("worker", "everything"):
                kill_tree(worker.pid) if victim == "everything" else worker.kill()
                worker.wait(PATIENCE_S)
            if victim in ("server", "everything"):
                server.kill()
                server.wait(PATIENCE_S)
                self.site.start_server()
                server = self.site.last_process
            if victim in ("worker", "everything"):
                worker = self.start_worker()
        self.wait_a_while(batch_id)
        self.kill(worker)

    def _database(self) -> None:
        """Stop the database, or kill it, and start it again after a while."""
        assert self.postgres is not None
        url = self.site.start_server()
        server = self.site.last_process
        worker = self.site.start_worker()
        batch_id = self.upload(url)
        for _ in range(self.chance.randint(1, 3)):
            with suppress(AssertionError):
                wait_for(lambda: self._done(batch_id), timeout_s=20)
            time.sleep(self.chance.uniform(0.0, 0.7))
            how = self.chance.choice([signal.SIGINT, signal.SIGQUIT])
            self.report.hit.append(f"killed: database ({how.name})")
            self.postgres.stop(how)
            time.sleep(self.chance.uniform(0.0, 2.0))
            self.postgres.start()
        self.wait_a_while(batch_id)
        assert server.poll() is None, "the API server ended"
        assert worker.poll() is None, "the worker ended"
        for process in (server, worker):
            kill_tree(process.pid)

    def _several(self) -> None:
        """Two API servers and two workers on one database, while they are killed at random times,
        or stand still for longer than their lease."""
        urls = [self.site.start_server()]
        servers = [self.site.last_process]
        urls.append(self.site.start_server())
        servers.append(self.site.last_process)
        workers = [self.site.start_worker(), self.site.start_worker()]
        batch_ids = [self.upload(urls[number % 2]) for number in range(self.chance.randint(1, 3))]
        for _ in range(self.chance.randint(2, 4)):
            if all(self.site.batch(batch_id).is_terminal for batch_id in batch_ids):
                break
            time.sleep(self.chance.uniform(0.2, 1.5))
            victim = self.chance.choice(["worker", "stalled", "engine", "server", "everything"])
            one = self.chance.randrange(2)
            if victim == "stalled":
                self._stall({worker.pid for worker in workers})
                continue
            self.report.hit.append(f"killed: {victim}")
            if victim == "engine":
                self.kill_engine(workers[one].pid)
            for number in (0, 1) if victim == "everything" else (one,):
                if victim in ("worker", "everything"):
                    workers[number].kill()
                    workers[number].wait(PATIENCE_S)
                if victim in ("server", "everything"):
                    servers[number].kill()
                    servers[number].wait(PATIENCE_S)
            for number in (0, 1):
                if servers[number].poll() is not None:
                    self.site.start_server()
                    servers[number] = self.site.last_process
                if workers[number].poll() is not None:
                    workers[number] = self.site.start_worker()
        self.wait_a_while(batch_ids[-1])
        for process in workers:
            assert process.poll() is None, "a worker ended"
            kill_tree(process.pid)

    def _stall(self, workers: set[int]) -> None:
        """One that has a batch stands still. Its lease runs out; when it moves again, its batch may
        be the other one's."""
        self.report.hit.append("killed: worker (SIGSTOP)")
        busy = [row.pid for row in self.site.store.list_workers() if row.batch_id]
        pid = min(workers.intersection(busy) or workers)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(SETTINGS["lease_s"] + self.chance.uniform(0.5, 2.5))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _crash_point(self) -> None:
        name = self.what or self.chance.choice(CRASH_POINTS)
        count = self.chance.choice([1, 2, 3]) if name in COME_TO_OFTEN else 1
        self.report.what = f"{name}:{count}"
        crash = {"VLLM_BATCH_CRASH_AT": self.report.what}
        if name in OF_THE_SERVER:
            self._crash_the_server(name, crash)
            return
        batch_id = self.site.submit(self._lines(), "tried")
        self._remember(batch_id)
        worker = self.site.start_worker(**crash)
        if name == "suspects-written":
            wait_for(
                lambda: self._done(batch_id) or worker.poll() is not None, timeout_s=PATIENCE_S
            )
            if worker.poll() is None:
                self.kill_engine(worker.pid)
        if name == "given-back":
            wait_for(
                lambda: self._done(batch_id) or worker.poll() is not None, timeout_s=PATIENCE_S
            )
            worker.terminate()
        self._wait_for_crash(worker, name, batch_id)

    def _crash_the_server(self, name: str, crash: dict[str, str]) -> None:
        url = self.site.start_server(**crash)
        server = self.site.last_process
        if name.startswith("upload"):
            self._try_to(lambda: self.upload(url))
        elif name.startswith("check"):
            self._try_to(lambda: self._create(url))
        else:
            batch_id = self.upload(url)
            self._try_to(
                lambda: httpx.post(f"{url}/v1/batches/{batch_id}/cancel", timeout=PATIENCE_S)
            )
        self._wait_for_crash(server, name, None)
        self._end_leases_of_servers()

    def _failing_call(self) -> None:
        call = self.what or self.chance.choice(CALLS + MORE_CALLS if self.postgres else CALLS)
        wish: dict[str, Any] = {
            "call": call,
            "at": self.chance.randint(1, 12),
            "errno": self.chance.choice(ERRORS),
            "for_good": self.chance.random() < 0.5,
        }
        if call == "write" and self.chance.random() < 0.3:
            wish |= {"torn": True, "for_good": False}
        self.report.what = json.dumps(wish)
        batch_id = self.site.submit(self._lines(), "tried")
        self._remember(batch_id)
        worker = self.site.start_worker(FAIL=json.dumps(wish))
        self.wait_a_while(batch_id, worker)
        self.report.hit.append(f"failed: {call}, {'for good' if wish['for_good'] else 'once'}")
        kill_tree(worker.pid)
        worker.wait(PATIENCE_S)

    def _end_leases_of_servers(self) -> None:
        """They last for a minute, and for five: that time is passed by hand here."""
        engine = database.connect(self.site.settings.resolved_database_url)
        batches = database.batches
        of_servers = batches.c.lease_owner.startswith("server")
        with database.writing(engine) as connection:
            connection.execute(batches.update().where(of_servers).values(lease_owner=None))
        engine.dispose()

    def kill_engine(self, worker_pid: int) -> None:
        with suppress(AssertionError, ProcessLookupError):
            os.kill(engine_pid(worker_pid, timeout_s=5.0), signal.SIGKILL)

    def _wait_for_crash(self, process: Any, name: str, batch_id: str | None) -> None:
        """Until it died at the crash point, or there is nothing left to come to it with."""
        deadline = time.monotonic() + CRASHES_WITHIN_S

        def is_over() -> bool:
            ended = batch_id is not None and self.site.batch(batch_id).is_terminal
            return process.poll() is not None or ended or time.monotonic() > deadline

        wait_for(is_over, timeout_s=2 * CRASHES_WITHIN_S)
        try:
            process.wait(3.0)
        except Exception:
            kill_tree(process.pid)
            process.wait(PATIENCE_S)
            return
        if process.returncode == -signal.SIGKILL:
            self.report.hit.append(name)

    def start_both(self) -> tuple[str, subprocess.Popen[bytes]]:
        """An API server and a worker: the address of the one, the process of the other."""
        url = self.site.start_server(**self.services.environment())
        self._server = self.site.last_process
        return url, self.start_worker()

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self.site.start_worker(**self.services.environment())

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it and all that it started."""
        kill_tree(process.pid)
        process.wait(PATIENCE_S)

    def wait_for_results(self, batch_id: str) -> None:
        """Until it has some more, or the time for that is over."""
        before = self.site.batch(batch_id).progress.done
        with suppress(AssertionError):
            wait_for(lambda: self._has_moved(batch_id, before), timeout_s=20)
        time.sleep(self.chance.uniform(0.0, 0.5))

    def _done(self, batch_id: str) -> bool:
        return self.site.batch(batch_id).progress.done > 0

    def _has_moved(self, batch_id: str, before: int) -> bool:
        batch = self.site.batch(batch_id)
        return batch.progress.done > before or batch.is_terminal

    def wait_a_while(self, batch_id: str, worker: Any = None) -> None:
        deadline = time.monotonic() + self.chance.uniform(1.0, 3.0)
        while time.monotonic() < deadline and not self.site.batch(batch_id).is_terminal:
            if worker is not None and worker.poll() is not None:
                return
            time.sleep(0.05)

    # -- batches -------------------------------------------------------------------------------

    def _lines(self) -> list[dict[str, Any]]:
        at_least = 30 if self.what in IN_THE_MIDDLE else 1
        self._last_lines = self.workload.lines(self.chance, at_least)
        return self._last_lines

    def _remember(self, batch_id: str) -> str:
        self.accepted.add(batch_id)
        self.requests[batch_id] = self._last_lines
        return batch_id

    def upload(self, url: str) -> str:
        content = b"".join(orjson.dumps(line) + b"\n" for line in self._lines())
        answer = httpx.post(
            f"{url}/v1/batches",
            files={"file": ("in.jsonl", content)},
            data={"model": "tried"},
            timeout=PATIENCE_S,
        )
        assert answer.status_code == 200, answer.text
        return self._remember(answer.json()["batch_id"])

    def _create(self, url: str) -> str:
        lines = self._lines()
        for line in lines:
            line["body"]["model"] = "tried"
        content = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        files = {"file": ("in.jsonl", content)}
        file = httpx.post(
            f"{url}/v1/files", files=files, data={"purpose": "batch"}, timeout=PATIENCE_S
        )
        wish = {"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions"}
        answer = httpx.post(f"{url}/v1/batches", json=wish, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return self._remember(answer.json()["id"])

    def _try_to(self, do: Callable[[], object]) -> None:
        with suppress(httpx.TransportError):  # the server died over it: nothing was promised
            do()

    # -- the end -------------------------------------------------------------------------------

    def _bring_to_an_end(self) -> None:
        """With processes that nothing is wrong with."""
        url, worker = self.start_both()
        server = self._server
        if not self._batches():
            self.upload(url)  # as a client does who got no answer
        for batch in self._batches():
            self.requests.setdefault(batch.id, self._last_lines)
            wait_for(
                lambda batch=batch: self.site.batch(batch.id).is_terminal,
                timeout_s=PATIENCE_S,
                what=lambda batch=batch: f"{batch.id} ends; its log:\n{self.site.log(batch.id)}",
            )
        for process in (worker, server):
            process.terminate()
            process.wait(PATIENCE_S)

    def _batches(self) -> list[Batch]:
        batches, _ = self.site.store.list_batches(limit=100)
        return batches

    def _check(self) -> None:
        batches = {batch.id: batch for batch in self._batches()}
        assert self.accepted <= batches.keys(), "a batch that was accepted is gone"
        for batch in batches.values():
            self._check_batch(batch, self.requests[batch.id])
        self._check_nothing_is_left(self.site.data)
        path = database.sqlite_path(self.site.settings.resolved_database_url)
        if path is not None:
            connection = database.sqlite_driver().connect(path)
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.close()
        if self.journal.exists():
            self.report.computed = len(self.journal.read_bytes().splitlines())

    def _check_batch(self, batch: Batch, lines: list[dict[str, Any]]) -> None:
        cancelled = batch.status is BatchStatus.CANCELLED
        assert batch.status is BatchStatus.COMPLETED or cancelled, (
            f"{batch.status}: {batch.error_message}\n{self.site.log(batch.id)}"
        )
        expected = [line["custom_id"] for line in lines]
        outcomes = [self._published(file) for file in (batch.output_file_id, batch.error_file_id)]
        ids = Counter(line["custom_id"] for part in outcomes for line in part)
        assert ids == Counter(expected), "ids of output and error file aren't the input's"
        everything = self.site.results(batch.id)
        assert [line["custom_id"] for line in everything] == expected, "not in input order"
        num_bad = 0
        responses = []
        for line, result in zip(lines, everything, strict=True):
            if result["response"] is None:
                assert cancelled, f"{result['custom_id']} never ran: {result['error']}"
                num_bad += 1
                continue
            responses.append((line, result["response"]))
        num_good = self.workload.check(responses)
        num_bad += len(responses) - num_good
        assert [line["response"]["status_code"] for line in outcomes[0]] == [200] * num_good
        counts = batch.progress
        if not cancelled:
            assert (counts.completed, counts.failed) == (num_good, num_bad), f"counts: {counts}"
            self.report.needed += len(lines)
        self.report.requests += len(lines)

    def _published(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        raw = self.site.data.output_file(file_id).read_bytes()
        return [orjson.loads(line) for line in raw.splitlines()]

    def _check_nothing_is_left(self, data: DataDir) -> None:
        data.sweep_incoming(older_than_s=0.0)
        remove_orphans(data, self.site.store, older_than_s=0.0)
        batches = self._batches()
        files = {file for b in batches for file in (b.output_file_id, b.error_file_id) if file}
        known = {f"{file}.jsonl" for file in files}
        known |= {data.results_file(batch).name for batch in batches}
        for folder, names in (("active", set()), ("incoming", set()), ("output", known)):
            left = {path.name for path in (data.batches / folder).iterdir()} - names
            assert not left, f"left in {folder}: {sorted(left)}"
