"""`vllm-batch run`: one file, no server, and going on after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from batch_app.cli.program import app
from batch_app.config import load_settings
from batch_app.core import BatchStatus
from batch_app.engine.process import EngineProcess
from batch_app.errors import BadLines, BadRequest, Conflict, ModelNotFound
from batch_app.one_shot import OneShot, work_folder
from batch_app.one_shot_model import one_shot_entry
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
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, model: str = "sim") -> tuple[int, str]:
        """The exit code, and what was said on standard error; standard output is for data."""
        process = self.start(*arguments, model=model)
        out, said = process.communicate(timeout=120)
        assert out == b""
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

    def one_shot(
        self, model: str = "sim", overwrite: bool = False, **engine_args: object
    ) -> OneShot:
        settings = load_settings(models=self.models, benchmarks_dir=self.root / "benchmarks")
        entry = one_shot_entry(model, settings, engine_args=engine_args)
        return OneShot(self.input, self.output, entry=entry, settings=settings, overwrite=overwrite)


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
    told = [line for line in said.splitlines() if " done (" in line or line.startswith("Loading")]
    assert len(told) == len(set(told)), "nothing is said twice"
    assert not work_folder(place.output).exists()


def test_it_tells_the_outcome_in_json(place: Place) -> None:
    place.write(3)
    process = place.start(str(place.input), str(place.output), "--json")
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert orjson.loads(out) == {
        "output": str(place.output),
        "status": "completed",
        "total": 3,
        "completed": 3,
        "failed": 0,
        "truncated": 0,
        "error": None,
    }


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[EngineProcess]:
    """The engine processes that are started in this process."""
    started: list[EngineProcess] = []
    begin = EngineProcess.__init__

    def note(self: EngineProcess, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        started.append(self)

    monkeypatch.setattr(EngineProcess, "__init__", note)
    return started


def test_a_run_has_one_engine_process_and_ends_it(
    place: Place, engines: list[EngineProcess]
) -> None:
    place.write(3)
    assert place.one_shot().run().status is BatchStatus.COMPLETED
    assert [engine.wait(0) is not None for engine in engines] == [True]


def test_a_file_that_cannot_run_leaves_no_engine(
    place: Place, engines: list[EngineProcess]
) -> None:
    place.input.write_text("{}\n")
    with pytest.raises(BadLines):
        place.one_shot().run()
    assert [engine.wait(0) is not None for engine in engines] == [True]
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


def test_flags_of_vllm_reach_the_engine_and_refusals_look_like_its(place: Place) -> None:
    lines = [echo_line(0), echo_line(1), echo_line(2)]
    lines[1]["body"]["messages"][0]["content"] = "much too long " * 20
    place.input.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    code, said = place.run(
        *("-i", str(place.input), "-o", str(place.output)),
        *("--max_model_len=50", "--served-model-name", "mine", "--port", "9"),
    )
    assert code == 0, said
    assert "--port has no effect" in said
    assert "2 of 3 answered, 1 failed" in said
    first, refused, last = place.lines()
    assert_answers_echo([first], 1)
    assert last["error"] is None
    assert first["response"]["body"]["model"] == "mine"  # type: ignore[index]
    assert refused["custom_id"] == "r1"
    assert refused["response"]["status_code"] == 400  # type: ignore[index]
    assert refused["response"]["body"] is None  # type: ignore[index]
    assert refused["error"]["error"]["code"] == 400  # type: ignore[index]


def test_it_goes_on_with_other_arguments_but_not_with_another_model(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(20)
    first = place.one_shot()
    first._stop.set()  # before anything ran
    first.run()
    other = place.root / "other"
    other.mkdir()
    elsewhere = one_shot_entry(str(other), load_settings(models=place.models))
    second = place.one_shot(max_num_seqs=4)
    second._entry = elsewhere.model_copy(update={"name": "sim"})
    with pytest.raises(Conflict, match="another input or model"):
        second.run()
    assert place.one_shot(max_num_seqs=4).run().status is BatchStatus.COMPLETED
    assert "other engine arguments" in capsys.readouterr().err
    assert_answers_echo(place.lines(), 20)


def test_a_wrong_flag_or_an_address_is_said_before_anything_is_done(place: Place) -> None:
    place.write(3)
    runner = CliRunner()
    for words, message in (
        (["in", "out", "--enforce-eagerly"], "--enforce-eager"),
        (["https://example.com/in.jsonl", str(place.output)], "curl -o"),
        ([str(place.input), "http://example.com/out"], "curl -T"),
    ):
        done = runner.invoke(app, ["run", *words, "--model", "sim", "--models", str(place.models)])
        assert done.exit_code == 2
        assert message in done.output
    assert sorted(path.name for path in place.root.iterdir()) == ["in.jsonl", "models.toml"]


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
