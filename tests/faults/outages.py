"""Outages of what batches depend on, one after the other, in the middle of ten queued batches.

    python -m faults.outages --seconds 60

The model hub and a remote server that are away, a model registry with a typo, a full disk, a locked
database. All ten batches must complete, with every id once and each answer its own. Needs to be
allowed to mount a file system, for the full disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

from batch_app import database
from batch_app.core import BatchStatus
from support.hub import HubStub
from support.model_server import ModelServerStub
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import PATIENCE_S, wait_for

NUM_BATCHES = 10
#: A batch that nothing disturbs takes this share of an outage.
BATCH_SHARE = 0.5
STEP_S, NUM_SEQS, WORDS = 0.02, 4, 3
DISK_BYTES = 24 << 20
#: So much longer than undisturbed work and all the outages it may take.
PATIENCE_FACTOR = 4
TYPO = '\n[[model]]\nname = "a typo\n'
#: Which batch runs on what, in the queue's order.
MODELS = ("fetched", "remote", "local")
SETTINGS: dict[str, Any] = {
    "lease_s": 5.0,
    "heartbeat_s": 0.3,
    "poll_interval_s": 0.3,
    "commit_interval_s": 0.05,
    "min_free_bytes": 0,
    "pause_longest_s": 5.0,
}


class CannotMount(Exception):
    """This user may not mount a file system."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, of a few MiB. Raises CannotMount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotMount(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room there is. Returns the file that has it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


@dataclass
class Report:
    """`said`: by outage, what batch logs and the server said of it."""

    seconds_each: float
    num_requests: int = 0
    num_pauses: Counter[str] = field(default_factory=Counter)
    health: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class Outages:
    """One site on a disk of its own, and all that happens to it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.seconds = seconds
        self.folder = folder
        self.hub, self.server = HubStub(), ModelServerStub(step_s=STEP_S)
        self.num_requests = max(int(BATCH_SHARE * seconds * NUM_SEQS / (STEP_S * WORDS)), 20)
        self.report = Report(seconds, NUM_BATCHES * self.num_requests)

    def run(self) -> Report:
        """Raises AssertionError where a batch didn't complete as it should."""
        began = time.monotonic()
        with small_disk(self.folder / "disk") as disk:
            site = Site(disk, **SETTINGS)
            try:
                self._run(site, disk)
            finally:
                site.close()
                self.hub.stop()
                self.server.stop()
        self.report.seconds = round(time.monotonic() - began, 1)
        return self.report

    def _run(self, site: Site, disk: Path) -> None:
        good = site.settings.models.read_text() + self._models()
        site.settings.models.write_text(good)
        batch_ids = [
            site.submit((echo_line(n) for n in range(self.num_requests)), self._model(number))
            for number in range(NUM_BATCHES)
        ]
        url = site.start_server()
        # Outside the disk that fills: what the hub has is not the data folder's.
        site.start_worker(**self.hub.environment(self.folder / "hub"))
        site.wait_for_progress(batch_ids[MODELS.index("local")], 1)

        def registry() -> Callable[[], object]:
            site.settings.models.write_text(good + TYPO)
            return lambda: site.settings.models.write_text(good)

        def full_disk() -> Callable[[], object]:
            return fill(disk).unlink

        def locked() -> Callable[[], object]:
            path = database.sqlite_path(site.settings.resolved_database_url)
            connection = database.sqlite_driver().connect(
                str(path), timeout=PATIENCE_S, isolation_level=None, check_same_thread=False
            )
            connection.execute("BEGIN EXCLUSIVE")

            def unlock() -> None:
                connection.execute("ROLLBACK")
                connection.close()

            return unlock

        # Both are away from the beginning; whatever needs neither overtakes.
        self._during("registry", url, registry)
        self._during("full disk", url, full_disk)
        self._during("hub", url, lambda: self.hub.start)
        self._during("remote server", url, lambda: self.server.start)
        self._during("locked database", url, locked)
        patience_s = PATIENCE_S + PATIENCE_FACTOR * self.seconds * NUM_BATCHES
        for batch_id in batch_ids:
            batch = site.wait_until_done(batch_id, timeout_s=patience_s)
            assert batch.status is BatchStatus.COMPLETED, f"{batch_id}: {batch.error_message}"
            self._check(site, batch_id)
        wait_for(lambda: self._health(url) == "ok", what="all is well at the end")

    def _during(self, name: str, url: str, begin: Callable[[], Callable[[], object]]) -> None:
        """Have an outage for its time, and note what the server says of itself."""
        end = begin()
        until = time.monotonic() + self.seconds
        said: dict[str, None] = {}
        try:
            while (left_s := until - time.monotonic()) > 0:
                time.sleep(min(left_s, self.seconds / 10))
                if name != "locked database":  # it would wait for as long as that is locked
                    said[self._health(url)] = None
        finally:
            end()
        self.report.health[name] = " | ".join(one for one in said if one != "ok") or "ok"
        time.sleep(min(0.1 * self.seconds, 1.0))

    def _health(self, url: str) -> str:
        body = httpx.get(f"{url}/health", timeout=PATIENCE_S).json()
        bad = {name: said for name, said in body["checks"].items() if said != "ok"}
        return "; ".join(f"{name}: {said}" for name, said in bad.items()) or "ok"

    def _check(self, site: Site, batch_id: str) -> None:
        batch = site.batch(batch_id)
        counts = batch.progress
        assert (counts.completed, counts.failed) == (self.num_requests, 0), f"{batch_id}: {counts}"
        assert batch.error_file_id is None
        assert batch.output_file_id is not None
        output = site.data.output_file(batch.output_file_id).read_bytes().splitlines()
        ids = Counter(orjson.loads(line)["custom_id"] for line in output)
        assert ids == Counter(f"r{number}" for number in range(self.num_requests)), batch_id
        assert_answers_echo(site.results(batch_id), self.num_requests)
        for line in site.log(batch_id).splitlines():
            if " Paused " in line:
                self.report.num_pauses[line.split("(", 1)[1].split(")", 1)[0]] += 1

    def _model(self, number: int) -> str:
        kind = MODELS[number % len(MODELS)]
        return f"fetched-{number}" if kind == "fetched" else kind

    def _models(self) -> str:
        engine = f"max_num_seqs = {NUM_SEQS}\ndecode_step_s = {STEP_S}\n"
        text = (
            '\n[[model]]\nname = "local"\nengine = "sim"\nsource = "sim"\n'
            f"[model.engine_args]\n{engine}"
            '\n[[model]]\nname = "remote"\nengine = "openai"\nsource = "served-name"\n'
            f'[model.engine_args]\nbase_url = "{self.server.base_url}"\nmax_retries = 1\n'
            f"backoff_s = 0.05\nmax_concurrency = {NUM_SEQS}\n"
        )
        for number in range(NUM_BATCHES):
            name = self._model(number)
            if name.startswith("fetched"):
                text += (
                    f'\n[[model]]\nname = "{name}"\nengine = "sim"\nsource = "org/{name}"\n'
                    f"[model.engine_args]\nfrom_hub = true\n{engine}"
                )
        return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each outage lasts")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="outages-", ignore_cleanup_errors=True) as folder:
        try:
            report = Outages(Path(folder), seconds).run()
        except (AssertionError, CannotMount) as failure:
            print(f"FAILED: {type(failure).__name__}: {failure}"[:4000])
            return 1
    print(
        f"{NUM_BATCHES} of {NUM_BATCHES} batches completed: {report.num_requests:,} requests, "
        f"every id once, in {report.seconds:.0f} s with outages of {seconds:g} s each."
    )
    pauses = ", ".join(f"{kind} {count}" for kind, count in report.num_pauses.most_common())
    print(f"Pauses: {pauses or 'none'}.")
    for name, said in report.health.items():
        print(f"/health during {name}: {said[:300]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
