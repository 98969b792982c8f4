"""A site: data folder, registry and store, with the worker and API server processes on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson
import psutil

from batch_app import database
from batch_app.config import Settings, load_settings
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, StoredFile, utc_now
from batch_app.files import DataDir, new_id, wake_workers
from batch_app.intake import IntakeRules, index_file
from batch_app.registry import ModelRegistry
from batch_app.store import Store
from support.waiting import PATIENCE_S, wait_for

REPO = Path(__file__).parents[2]
LISTENING = "Uvicorn running on "

#: What the simulated models of a site are called, and their engine arguments. For what has to
#: happen while a batch runs, on any machine: `held` stands still after a hundred answers while its
#: site's `hold` exists; `endless` takes 0.4 s for two words, so that a batch of `ENDLESS` outlives
#: every test. Who starts one of those cancels it.
SIM_MODELS: dict[str, dict[str, Any]] = {
    "sim": {},
    "slow": {"decode_step_s": 0.02, "max_num_seqs": 16},
    "endless": {"decode_step_s": 0.2, "max_num_seqs": 1},
    "held": {"decode_step_s": 0.001, "max_num_seqs": 16, "hold_after": 100},
    "tiny-context": {"max_model_len": 5},
    "unloadable": {"fail_load": "No such weights."},
    "mortal": {"die_after": 300, "max_num_seqs": 16},
    "cramped": {"oom_above_seqs": 40},
    "hanging": {"hang_after": 30, "max_num_seqs": 8},
    "delicate": {"poison": "arsenic", "max_num_seqs": 16, "decode_step_s": 0.001},
    "small-memory": {"memory_seqs": 5, "max_num_seqs": 16, "decode_step_s": 0.001},
}
ENDLESS = 2000


def registry_text(hold: Path) -> str:
    """A registry with the simulated models and the demo model; `held` holds while `hold` exists."""
    parts = [f'[[model]]\nname = "demo"\nsource = "{REPO / "models" / "demo"}"\n']
    parts.append("[model.engine_args]\nmax_model_len = 2048\nenforce_eager = true\n")
    for name, args in SIM_MODELS.items():
        parts.append(f'[[model]]\nname = "{name}"\nsource = "sim"\nengine = "sim"\n')
        parts.append("[model.engine_args]\n")
        if "hold_after" in args:
            parts.append(f'hold_while = "{hold}"\n')
        parts += [f"{key} = {orjson.dumps(value).decode()}\n" for key, value in args.items()]
    return "".join(parts)


def echo_line(number: int, **body: Any) -> dict[str, Any]:
    """A request whose answer by the simulated engine says which request it was."""
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": f"say number {number}"}], **body},
    }


class Site:
    """Owns the worker processes it starts; `close` kills what is left of them."""

    def __init__(self, root: Path, **settings: Any) -> None:
        #: See `SIM_MODELS`.
        self.hold = root / "hold"
        (root / "models.toml").write_text(registry_text(self.hold))
        self.settings: Settings = load_settings(
            data_dir=root / "data",
            models=root / "models.toml",
            benchmarks_dir=root / "benchmarks",
            **settings,
        )
        self.data = DataDir(self.settings.data_dir)
        self.data.create()
        self.store = Store(self.settings.resolved_database_url)
        self.store.migrate()
        self._root = root
        self._given = settings
        self._processes: list[subprocess.Popen[bytes]] = []

    def submit(self, lines: Iterable[dict[str, Any]], model: str) -> str:
        """Queue a batch as the API server would. Returns its id."""
        file_id, batch_id = new_id("file"), new_id("batch")
        path = self.data.input_file(file_id)
        with path.open("wb") as file:
            for line in lines:
                file.write(orjson.dumps(line) + b"\n")
        folder = self.data.work_dir(batch_id)
        folder.mkdir()
        rules = IntakeRules(ModelRegistry.load(self.settings.models), model=model)
        summary = index_file(path, folder, rules)
        now = utc_now()
        self.store.add_batch(
            Batch(
                id=batch_id,
                dialect=Dialect.NATIVE,
                status=BatchStatus.QUEUED,
                endpoint=summary.endpoints[0],
                model=model,
                input_file_id=file_id,
                created_at=now,
                queued_at=now,
                total=summary.num_requests,
            ),
            StoredFile(file_id, FilePurpose.BATCH, "input.jsonl", path.stat().st_size, now),
        )
        wake_workers(self.data)
        return batch_id

    def start_worker(self, **environment: str) -> subprocess.Popen[bytes]:
        """A worker process with this site's settings, in a process group of its own."""
        return self._start("worker", environment=environment)

    def start_server(self, port: int = 0, **environment: str) -> str:
        """An API server process, by default on a free port. Returns its address, without a slash at
        the end."""
        said_before = self._output("api_server").count(LISTENING)
        process = self._start("api_server", "--port", str(port), environment=environment)

        def listens() -> bool:
            return self._output("api_server").count(LISTENING) > said_before

        wait_for(
            lambda: listens() or process.poll() is not None,
            what="the server listens",
        )
        assert listens(), self._output("api_server")
        return self._output("api_server").rsplit(LISTENING, 1)[1].split()[0]

    @property
    def last_process(self) -> subprocess.Popen[bytes]:
        """The one that was started last."""
        return self._processes[-1]

    def _start(
        self, module: str, *flags: str, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """`environment` goes on top of the settings. With `FAIL` in it, see `faults/child.py`."""
        given = environment
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("VLLM_BATCH_")
        }
        for name, value in {
            "data_dir": self.settings.data_dir,
            "models": self.settings.models,
            "benchmarks_dir": self.settings.benchmarks_dir,
            "config": self._root / "no-such-settings.toml",
            **self._given,
        }.items():
            environment[f"VLLM_BATCH_{name.upper()}"] = str(value)
        start = ["-m", f"batch_app.{module}"]
        if "FAIL" in given:
            start = ["-m", "faults.child", f"batch_app.{module}"]
        with (self._root / f"{module}.out").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *start, *flags],
                cwd=self._root,
                env=environment | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", **given},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def batch(self, batch_id: str) -> Batch:
        return self.store.get_batch(batch_id)

    def wait_until_done(self, batch_id: str, timeout_s: float = PATIENCE_S) -> Batch:
        wait_for(
            lambda: self.batch(batch_id).is_terminal,
            timeout_s=timeout_s,
            what=lambda: f"{batch_id} ends; its log:\n{self.log(batch_id)}\n{self.worker_output()}",
        )
        return self.batch(batch_id)

    def wait_for_progress(self, batch_id: str, done: int, timeout_s: float = PATIENCE_S) -> Batch:
        wait_for(
            lambda: self.batch(batch_id).progress.done >= done,
            timeout_s=timeout_s,
            what=f"{done} results of {batch_id}",
        )
        return self.batch(batch_id)

    def log(self, batch_id: str) -> str:
        path = self.data.log_file(batch_id)
        return path.read_text() if path.exists() else ""

    def worker_output(self) -> str:
        return self._output("worker")

    def _output(self, module: str) -> str:
        path = self._root / f"{module}.out"
        return path.read_text() if path.exists() else ""

    def results(self, batch_id: str) -> list[dict[str, Any]]:
        """The published lines of a finished batch, all of them, in order."""
        lines = self.data.results_file(self.batch(batch_id)).read_bytes().splitlines()
        return [orjson.loads(line) for line in lines]

    def set_row(self, table: str, row_id: str, **values: Any) -> None:
        """Change what the store knows, as time passing would."""
        engine = database.connect(self.settings.resolved_database_url)
        columns = getattr(database, table)
        writing = engine.connect().execution_options(**{database.WRITES: True})
        with writing as connection, connection.begin():
            connection.execute(columns.update().where(columns.c.id == row_id).values(**values))
        engine.dispose()

    def close(self) -> None:
        for process in self._processes:
            kill_tree(process.pid)
            process.wait(timeout=120)
        self.store.close()


def engine_pid(worker_pid: int, timeout_s: float = PATIENCE_S) -> int:
    """The process id of a worker's engine process."""

    def look() -> int | None:
        for child in psutil.Process(worker_pid).children(recursive=True):
            try:
                if "batch_app.engine.child" in " ".join(child.cmdline()):
                    return child.pid
            except psutil.Error:
                continue
        return None

    found = wait_for(look, timeout_s=timeout_s, what="an engine process")
    assert found
    return found


def engine_core(engine_pid: int) -> psutil.Process:
    """The core of an engine process: what it started last, after the one that tries constraints."""
    children = psutil.Process(engine_pid).children()
    return max(children, key=lambda child: (child.create_time(), child.pid))


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it started."""
    try:
        processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    wait_for(lambda: all(map(_has_ended, processes)), timeout_s=120, what=f"the end of {processes}")


def _has_ended(process: psutil.Process) -> bool:
    """Also of one that nobody has asked for its exit code yet: an orphan's heir takes its time."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def assert_answers_echo(lines: list[dict[str, Any]], num_requests: int) -> None:
    """Every request once, in input order, each with the answer to its own question."""
    assert [line["custom_id"] for line in lines] == [f"r{n}" for n in range(num_requests)]
    for number, line in enumerate(lines):
        message = line["response"]["body"]["choices"][0]["message"]
        assert message["content"] == f"say number {number}"
