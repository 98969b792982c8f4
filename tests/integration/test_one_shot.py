"""`vllm-batch run`: one file, no server, and going on after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from sqlalchemy import create_engine, text

from batch_app.config import load_settings
from batch_app.core import BatchStatus
from batch_app.errors import BadRequest, Conflict, ModelNotFound
from batch_app.one_shot import OneShot, work_folder
from support.site import REPO, assert_answers_echo, echo_line, kill_tree, registry_text
from support.waiting import wait_for


class Place:
    """A folder with an input, a registry and the commands that were started on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.input, self.output = root / "in.jsonl", root / "out.jsonl"
        self.models = root / "models.toml"
        self.hold = root / "hold"
        self.models.write_text(registry_text(self.hold))
        self.processes: list[subprocess.Popen[bytes]] = []

    def write(self, num_requests: int) -> None:
        lines = (echo_line(number) for number in range(num_requests))
        self.input.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))

    def start(self, *arguments: str, model: str = "sim") -> subprocess.Popen[bytes]:
        names = arguments or (str(self.input), str(self.output))
        process = subprocess.Popen(
            [sys.executable, "-m", "batch_app.cli", "run", *names, "--model", model],
            cwd=self.root,
            env=os.environ
            | {
                "PYTHONPATH": str(REPO),
                "VLLM_BATCH_MODELS": str(self.models),
                "VLLM_BATCH_DRAIN_S": "1",
                "VLLM_BATCH_BENCHMARKS_DIR": str(self.root / "benchmarks"),
                # The run has a database of its own, whatever the server here uses.
                "VLLM_BATCH_DATABASE_URL": "sqlite:////nowhere/at/all.db",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, model: str = "sim") -> tuple[int, str]:
        """The exit code, and what was said on standard error."""
        process = self.start(*arguments, model=model)
        _, said = process.communicate(timeout=120)
        return process.returncode, said.decode()

    def num_committed(self) -> int:
        """How many results of the run are known to be on disk."""
        database = work_folder(self.output) / "database" / "batch_jobs.db"
        if not database.exists():
            return 0
        engine = create_engine(f"sqlite:///file:{database}?mode=ro&uri=true")
        try:
            with engine.connect() as connection:
                return connection.scalar(text("SELECT max(completed) FROM batches")) or 0
        except Exception:  # being made
            return 0
        finally:
            engine.dispose()

    def lines(self) -> list[dict[str, object]]:
        return [orjson.loads(line) for line in self.output.read_bytes().splitlines()]

    def one_shot(self, model: str = "sim", overwrite: bool = False) -> OneShot:
        settings = load_settings(models=self.models, benchmarks_dir=self.root / "benchmarks")
        return OneShot(self.input, self.output, model=model, settings=settings, overwrite=overwrite)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for process in place.processes:
        kill_tree(process.pid)
        process.communicate(timeout=120)


def test_answers_a_file_and_leaves_only_the_output(place: Place) -> None:
    place.write(500)
    code, said = place.run("-i", str(place.input), "-o", str(place.output))
    assert code == 0, said
    assert "500 of 500 answered" in said
    assert_answers_echo(place.lines(), 500)
    assert not work_folder(place.output).exists()


def test_a_run_that_was_killed_goes_on(place: Place) -> None:
    place.write(1200)
    place.hold.touch()
    first = place.start(model="held")
    wait_for(lambda: place.num_committed() >= 100, what="100 results")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=120)
    assert not place.output.exists()
    place.input.write_bytes(place.input.read_bytes())  # another time of change, the same content
    place.hold.unlink()
    code, said = place.run(model="held")
    assert code == 0, said
    assert_answers_echo(place.lines(), 1200)
    [record] = (place.root / "benchmarks").glob("*.json")
    num_computed = orjson.loads(record.read_bytes())["results"]["num_requests"]
    assert num_computed <= 1100  # what was on disk before the kill did not run again


def test_ctrl_c_gives_back_and_the_next_run_finishes(place: Place) -> None:
    place.write(1200)
    place.hold.touch()
    first = place.start(model="held")
    wait_for(lambda: place.num_committed() >= 100, what="100 results")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130
    assert b"The same command goes on" in said
    place.hold.unlink()
    code, said_then = place.run(model="held")
    assert code == 0, said_then
    assert_answers_echo(place.lines(), 1200)


def test_does_not_replace_an_output_unasked(place: Place) -> None:
    place.write(3)
    place.output.write_text("precious")
    with pytest.raises(BadRequest, match="--overwrite"):
        place.one_shot().run()
    assert place.output.read_text() == "precious"
    assert not work_folder(place.output).exists()
    place.one_shot(overwrite=True).run()
    assert_answers_echo(place.lines(), 3)


def test_does_not_mix_two_inputs(place: Place) -> None:
    place.write(50)
    one_shot = place.one_shot()
    one_shot._stop.set()  # before anything ran
    assert not one_shot.run().is_terminal
    place.write(51)
    with pytest.raises(Conflict, match="another input"):
        place.one_shot().run()
    place.write(50)
    with pytest.raises(Conflict, match="another input or model"):
        place.one_shot(model="slow").run()
    assert place.one_shot().run().status is BatchStatus.COMPLETED
    assert_answers_echo(place.lines(), 50)


def test_bad_lines_are_named_and_leave_nothing(place: Place) -> None:
    place.write(3)
    with place.input.open("ab") as file:
        file.write(b'{"custom_id": "r9"}\n')
    code, said = place.run()
    assert code == 3
    assert "line 4" in said
    assert not work_folder(place.output).exists()
    assert not place.output.exists()


def test_a_wrong_model_leaves_nothing(place: Place) -> None:
    place.write(3)
    with pytest.raises(ModelNotFound, match="Models there: demo"):
        place.one_shot(model="no-such").run()
    assert not work_folder(place.output).exists()


def test_a_model_that_does_not_load_ends_it_and_it_can_begin_anew(place: Place) -> None:
    place.write(3)
    code, said = place.run(model="unloadable")
    assert code == 1
    assert "No such weights." in said
    assert not place.output.exists()
    assert place.one_shot().run().status is BatchStatus.COMPLETED
    assert_answers_echo(place.lines(), 3)
