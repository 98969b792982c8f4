"""The command line as a person types it, on real servers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from acceptance.conftest import Running
from batch_app.client import BatchClient
from support.receiver import receiving
from support.sdk import jsonl, line, lines
from support.shell import Shell
from support.site import ENDLESS, REPO
from support.waiting import wait_for

LONG, SHORT = "one two three four five six", "one two"


@pytest.fixture
def idle(waiting: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, waiting.url)


def test_submit_wait_and_download(shell: Shell) -> None:
    shell.file("in.jsonl", lines(40))
    said = shell("submit", "in.jsonl", "--model", "sim", "--wait", "--download", "out.jsonl")
    assert said.code == 0, said.err
    [batch_id] = said.lines
    assert "40 requests" in said.err
    assert "completed" in said.err
    got = (shell.folder / "out.jsonl").read_bytes().splitlines()
    assert [json.loads(one)["custom_id"] for one in got] == [f"r{n}" for n in range(40)]
    assert shell("results", batch_id).out.encode().splitlines() == got
    assert batch_id in shell("list").out
    assert "40 of 40 done (100.0%)" in shell("status", batch_id).out
    assert "submitted" in shell("logs", batch_id, "-f").lines[0]
    assert len(shell("logs", batch_id, "--tail", "1").lines) == 1
    watched = shell("watch", batch_id)
    assert (watched.code, watched.out) == (0, "")
    assert "40 answered" in watched.err


def test_everything_speaks_json(shell: Shell) -> None:
    shell.file("in.jsonl", lines(3))
    made = json.loads(shell("submit", "in.jsonl", "-m", "sim", "--json").out)
    batch_id = made["batch_id"]
    assert json.loads(shell("wait", batch_id, "--json").out)["status"] == "completed"
    assert json.loads(shell("status", batch_id, "--json").out)["batch_id"] == batch_id
    assert json.loads(shell("watch", batch_id, "--json").out)["status"] == "completed"
    listed = json.loads(shell("list", "--json", "-n", "100").out)
    assert batch_id in [one["batch_id"] for one in listed]
    assert json.loads(shell("logs", batch_id, "--json").lines[0])["line"]
    saved = shell("results", batch_id, "-o", "r.jsonl", "--json")
    assert json.loads(saved.out)["output"] == "r.jsonl"
    assert json.loads(shell("validate", "in.jsonl", "--json").out)["num_requests"] == 3


def test_failures_have_a_code_and_are_run_again(shell: Shell) -> None:
    asked = [line(f"r{n}", "tiny-context", LONG if n % 3 == 0 else SHORT) for n in range(9)]
    shell.file("in.jsonl", asked)
    said = shell("submit", "in.jsonl", "-m", "tiny-context", "-w")
    assert said.code == 8
    assert "3 failed" in said.err
    batch_id = said.out.strip()
    failed = [json.loads(one)["custom_id"] for one in shell("results", batch_id, "--failed").lines]
    assert failed == ["r0", "r3", "r6"]
    good = shell("results", batch_id, "--completed").lines
    assert len(good) == 6
    again = shell("retry", batch_id)
    assert (again.code, "3 requests" in again.err) == (0, True)
    assert shell("wait", again.out.strip()).code == 8


def test_a_batch_that_waits_and_is_cancelled(idle: Shell) -> None:
    idle.file("in.jsonl", lines(3))
    batch_id = idle("submit", "in.jsonl", "-m", "sim").out.strip()
    late = idle("wait", batch_id, "--timeout", "0.2")
    assert late.code == 10
    assert f"vllm-batch wait {batch_id}" in late.err
    assert idle("results", batch_id).code == 6
    assert idle("retry", batch_id).code == 6
    cancelled = idle("cancel", batch_id)
    assert cancelled.code == 0
    assert cancelled.err.startswith(f"✅ {batch_id} is cancelled.")
    assert idle("wait", batch_id, "-q").code == 9


def test_one_error_is_one_error(idle: Shell) -> None:
    idle.file("bad.jsonl", b"nope\n")
    assert "bad.jsonl: 1 error." in idle("validate", "bad.jsonl", "-m", "sim").err
    assert "can't run: 1 error. Nothing" in idle("submit", "bad.jsonl", "-m", "sim").err


def test_neighbours_with_the_same_error_are_told_together(idle: Shell) -> None:
    good = jsonl(lines(1))
    idle.file("bad.jsonl", good + 30 * b"nope\n" + b"{}\n" + good.replace(b"r0", b"x") + b"nope\n")
    for said in (
        idle("validate", "bad.jsonl", "-m", "sim"),
        idle("submit", "bad.jsonl", "-m", "sim"),
    ):
        told = re.findall(r"^ +(lines? [^:]+): ", said.err, re.M)
        assert told == ["lines 2–31", "line 32", "line 34"], said.err


def test_a_file_of_another_kind_is_told_once(idle: Shell) -> None:
    idle.file("in.jsonl", b'[\n  {"custom_id": "a"},\n  {"custom_id": "b"}\n]\n')
    said = idle("submit", "in.jsonl", "-m", "sim")
    assert (said.code, "1 error" in said.err, "jq -c '.[]'" in said.err) == (3, True, True)


def test_without_an_id_it_is_the_batch_at_hand(idle: Shell, waiting: Running) -> None:
    idle.file("in.jsonl", lines(3))
    batch_id = idle("submit", "in.jsonl", "-m", "sim").out.strip()
    assert batch_id in idle("status").out
    assert "submitted" in idle("logs").out
    assert f"vllm-batch wait {batch_id}" in idle("wait", "--timeout", "0.1").err
    assert idle("cancel").code == 2, "what ends something names it"
    assert idle("cancel", batch_id).code == 0


def test_a_running_batch_says_what_it_is_at(shell: Shell) -> None:
    shell.file("long.jsonl", lines(ENDLESS, "endless"))
    batch_id = shell("submit", "long.jsonl", "-m", "endless").out.strip()
    try:
        wait_for(lambda: re.search(r"^status +running$", shell("status").out, re.M), what="it runs")
        assert re.search(r"^now +[^\d\s].*|^now +\d.* done", shell("status").out, re.M)
        waits = shell("wait", "--timeout", "0.5")
        assert waits.code == 10
        assert f"{batch_id} running: " in waits.err
    finally:
        shell("cancel", batch_id)


def test_an_estimate_by_the_server(shell: Shell) -> None:
    shell.submitted(lines(30))  # the first measurement
    raw = jsonl(lines(20)) + b"nope\n"
    shell.file("in.jsonl.gz", gzip.compress(raw))
    said = shell("estimate", "in.jsonl.gz", "--model", "sim")
    assert said.code == 3
    assert "line 21: This line is not valid JSON" in said.err
    told = json.loads(shell("estimate", "-", "-m", "sim", "--json", stdin=jsonl(lines(20))).out)
    assert told["models"][0]["estimate"]["prompt_tokens"] > 0
    table = shell("estimate", "-", "--model", "sim", stdin=jsonl(lines(20))).lines
    assert table[0].startswith("MODEL")
    assert table[1].startswith("sim ")
    assert shell("estimate", "-", "--model", "none", stdin=b"").code == 4


def test_mistakes_are_told_in_a_line_with_a_code(idle: Shell) -> None:
    idle.file("good.jsonl", lines(1))
    idle.file("bad.jsonl", jsonl(lines(2)) + b"nope\n" + jsonl(lines(1)))
    idle.file("there.jsonl", b"precious")
    for words, code, expected in (
        (("submit", "bad.jsonl", "-m", "sim"), 3, "line 3: This line is not valid JSON"),
        (("submit", "good.jsonl", "-m", "nope"), 4, "Models there"),
        (("submit", "none.jsonl", "-m", "sim"), 3, "none.jsonl can't be read"),
        (("submit", "*.nothing", "-m", "sim"), 3, "No file fits"),
        (("submit", "good.jsonl", "-m", "sim", "-o", "there.jsonl"), 6, "there already"),
        (("submit", "good.jsonl", "-m", "sim", "-o", "no/where.jsonl"), 3, "no folder"),
        (("submit", "good.jsonl", "-m", "sim", "-t", "{x}"), 3, "whole requests already"),
        (("submit", "good.jsonl", "-m", "sim", "--priority", "1"), 2, "name the model"),
        (("status", "batch_000000000000000000000000"), 4, "No such batch"),
        (("status", "nonsense"), 4, "No such batch"),
        (("results", "x", "--parse-json"), 2, "need an --output"),
        (("list", "--server", "127.0.0.1:1"), 7, "vllm-batch up"),
        (("list", "--server", "ftp://x"), 3, "HOST:PORT"),
        (("sbumit", "good.jsonl"), 2, "submit"),
    ):
        said = idle(*words)
        assert (words, said.code) == (words, code), said.err
        assert expected in said.err
        assert said.out == ""
    assert (idle.folder / "there.jsonl").read_bytes() == b"precious"


def test_reasoning_in_a_table_is_told(shell: Shell) -> None:
    texts = ("<think>a</think>b", "so</think>c", "plain")
    shell.file("in.csv", ("text\n" + "\n".join(texts) + "\n").encode())
    said = shell("submit", "in.csv", "-m", "sim", "-t", "{text}", "-o", "out.csv")
    assert said.code == 0, said.err
    assert "2 answers contain the model's reasoning" in said.err
    assert 'reasoning_parser = "…" to the engine_args of sim' in said.err


def test_several_files_patterns_and_standard_input(shell: Shell) -> None:
    shell.file("a.jsonl", lines(2))
    shell.file("b.jsonl.gz", gzip.compress(jsonl(lines(3))))
    said = shell("submit", "*.jsonl*", "-m", "sim", "--download", "out", "-q")
    assert said.code == 0, said.err
    assert len(said.lines) == 2
    counts = {path.name: len(path.read_bytes().splitlines()) for path in Path("out").iterdir()}
    assert counts == {"a_results.jsonl": 2, "b_results.jsonl": 3}
    # A process of its own: what a test stands in for standard input has no bytes beneath.
    piped = subprocess.run(
        [sys.executable, "-m", "batch_app.cli", "submit", "-", "-m", "sim", "-o", "p.jsonl"],
        input=jsonl(lines(4)),
        env=os.environ | {"VLLM_BATCH_SERVER": shell.url, "PYTHONPATH": str(REPO)},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert piped.stdout.startswith(b"batch_")
    assert b"\x1b" not in piped.stdout + piped.stderr
    assert len(Path("p.jsonl").read_bytes().splitlines()) == 4


def test_lines_that_name_their_model_need_no_flag(shell: Shell) -> None:
    shell.file("in.jsonl", lines(3, "sim"))
    assert shell("submit", "in.jsonl", "-w", "-q", "--window", "1h", "--priority", "2").code == 0
    shell.file("bad.jsonl", lines(3, "nope"))
    refused = shell("submit", "bad.jsonl")
    assert refused.code == 3
    assert "lines 1–3" in refused.err


def test_validate_asks_no_server(idle: Shell, waiting: Running) -> None:
    idle.file("good.jsonl", lines(3))
    idle.file("bad.jsonl", jsonl(lines(1)) + b"{}\n")
    registry = ("--models", str(waiting.site.settings.models))
    said = idle("validate", "good.jsonl", *registry)
    assert (said.code, said.out) == (0, "good.jsonl: 3 good requests, model sim\n")
    said = idle("validate", "bad.jsonl", "good.jsonl", *registry)
    assert said.code == 3
    assert "line 2" in said.err
    assert "good.jsonl: 3 good" in said.out
    said = idle("validate", "good.jsonl", "--json")  # no registry here
    assert json.loads(said.out)["valid"] is True
    idle.file("other.jsonl", lines(1, "unheard-of"))
    assert idle("validate", "other.jsonl", *registry).code == 3
    assert idle("validate", "other.jsonl").code == 0


CSV = 'id,text,n\na,hello world,1\nb,"two, words",2\nc,,3\n'


def read_csv(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def test_a_table_and_back(shell: Shell) -> None:
    shell.file("t.csv", CSV.encode())
    refused = shell("submit", "t.csv", "-m", "sim", "-t", "Say {text}")
    assert refused.code == 3
    assert "row 3, column 'text': is empty" in refused.err
    said = shell(
        *("submit", "t.csv", "-m", "sim", "-t", "{text}", "--empty", "skip"),
        *("--id-column", "id", "--system", "Be {n}.", "--output", "out.csv"),
    )
    assert said.code == 0, said.err
    rows = read_csv("out.csv")
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["response"] for row in rows] == ["hello world", "two, words", ""]
    assert rows[2]["error"].startswith("skipped")
    with BatchClient(shell.url) as client:
        asked = list(client.results(said.out.strip(), with_requests=True))
    assert (asked[0].request or {})["body"]["messages"][0]["content"] == "Be 1."
    # The same join later, from the ids alone; and without the table.
    later = ("results", said.out.strip(), "--id-column", "id", "--join", "t.csv", "-o", "later.csv")
    assert shell(*later).code == 0
    assert read_csv("later.csv") == rows
    assert shell("results", said.out.strip(), "-o", "plain.csv").code == 0
    assert [row["custom_id"] for row in read_csv("plain.csv")] == ["a", "b"]
    shell.file("other.csv", b"id,text\nz,1\n")
    wrong = shell("results", said.out.strip(), "--join", "other.csv", "-o", "wrong.csv")
    assert wrong.code == 3
    assert "is it the table" in wrong.err
    assert not Path("wrong.csv").exists()


def test_parquet_and_json_answers(shell: Shell) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    asked = ['{"mood": "good", "score": 1}', '{"score": 2.5, "tags": ["a"]}', "no json"]
    table = arrow.table({"text": asked, "n": arrow.array([1, 2, 3], arrow.int8())})
    parquet.write_table(table, "in.parquet")
    said = shell(
        *("submit", "in.parquet", "-m", "sim", "--output", "out.parquet", "--parse-json"),
        *("--max-tokens", "50", "-q"),
    )
    assert said.code == 0, said.err
    assert "1 not a JSON object" in said.err
    out = parquet.read_table("out.parquet")
    assert out.schema.field("n").type == arrow.int8()
    assert out.column("mood").to_pylist() == ["good", None, None]
    assert out.column("score").to_pylist() == [1.0, 2.5, None]
    assert out.column("tags").to_pylist() == [None, '["a"]', None]
    assert out.column("response").to_pylist() == asked


def test_a_spreadsheet_s_semicolons(shell: Shell) -> None:
    shell.file("in.csv", "\ufeffid;text\n1;a, b\n2;c\n".encode())
    said = shell("submit", "in.csv", "-m", "sim", "--id-column", "id", "-o", "out.csv", "-q")
    assert said.code == 0, said.err
    assert [(row["id"], row["response"]) for row in read_csv("out.csv")] == [
        ("1", "a, b"),
        ("2", "c"),
    ]


def test_plain_text(shell: Shell) -> None:
    shell.file("prompts.txt", b"first one\n\nsecond one\n")
    said = shell("submit", "prompts.txt", "-m", "sim", "-o", "out.csv")
    assert said.code == 0, said.err
    assert [(row["line"], row["response"]) for row in read_csv("out.csv")] == [
        ("1", "first one"),
        ("3", "second one"),
    ]


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal(shell: Shell, colour: bool) -> None:
    """Bars and colours on a terminal, none with NO_COLOR; watched to the end."""
    shell.file("in.jsonl", lines(600, "slow"))
    batch_id = shell("submit", "in.jsonl", "-m", "slow").out.strip()
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "VLLM_BATCH_SERVER": shell.url,
        "PYTHONPATH": str(REPO),
        "TERM": "xterm-256color",
        "COLUMNS": "80",
    }
    environment.pop("NO_COLOR", None)
    environment |= {} if colour else {"NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "batch_app.cli", "watch", batch_id],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = read_all(lambda: os.read(ours, 65536))
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert f"{batch_id}" in shown
    assert "600 of 600 done (100.0%)" in shown
    assert "tokens/s on average" in shown
    assert ("\x1b[36m" in shown) is colour


def read_all(read: Callable[[], bytes]) -> str:
    got = b""
    while True:
        try:
            block = read()
        except OSError:  # the terminal is gone
            block = b""
        if not block:
            return got.decode(errors="replace")
        got += block


def test_a_reader_that_leaves_early_is_no_error(shell: Shell) -> None:
    batch_id = shell.submitted(lines(2000))
    command = f"{sys.executable} -m batch_app.cli results {batch_id} | head -n 1"
    said = subprocess.run(
        command,
        shell=True,
        env=os.environ | {"VLLM_BATCH_SERVER": shell.url, "PYTHONPATH": str(REPO)},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert json.loads(said.stdout)["custom_id"] == "r0"
    assert said.stderr == b""


def environment_of(shell: Shell) -> dict[str, str]:
    return os.environ | {"VLLM_BATCH_SERVER": shell.url, "PYTHONPATH": str(REPO), "COLUMNS": "80"}


@pytest.mark.parametrize("command", ["wait", "watch"])
def test_ctrl_c_ends_it_and_says_how_to_come_back(idle: Shell, command: str) -> None:
    idle.file("in.jsonl", lines(3))
    batch_id = idle("submit", "in.jsonl", "-m", "sim").out.strip()
    process = subprocess.Popen(
        [sys.executable, "-m", "batch_app.cli", command, batch_id],
        env=environment_of(idle),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()  # from now on it waits
    assert f"{batch_id} pending" in first
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "goes on without you" in err
    assert f"vllm-batch {command} {batch_id} --server {idle.url}" in err
    assert "Traceback" not in err
    assert idle("cancel", batch_id).code == 0  # it had gone on


def test_ctrl_c_on_the_live_screen(idle: Shell) -> None:
    idle.file("in.jsonl", lines(3))
    batch_id = idle("submit", "in.jsonl", "-m", "sim").out.strip()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batch_app.cli", "watch", batch_id],
        env=environment_of(idle) | {"TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"0 of 3 done" not in shown:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    shown += read_all(lambda: os.read(ours, 65536)).encode()
    os.close(ours)
    assert process.wait(timeout=120) == 130
    assert f"vllm-batch watch {batch_id}".encode() in shown
    assert b"Traceback" not in shown
    assert idle("cancel", batch_id).code == 0


def test_without_pyarrow_parquet_says_what_to_install(
    idle: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    idle.file("in.parquet", b"PAR1")
    said = idle("submit", "in.parquet", "-m", "sim", "-t", "{text}")
    assert (said.code, said.out) == (3, "")
    assert "pip install 'vllm-batch-server[tables]'" in said.err
    idle.file("in.csv", b"text\nhello\n")
    assert idle("validate", "in.csv", "-t", "{text}").code == 0  # CSV works without it


OWN_SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.mark.parametrize("model", ["sim", None], ids=["form", "by file"])
def test_a_webhook_is_told_of_the_end(shell: Shell, model: str | None) -> None:
    shell.file("in.jsonl", lines(2, "sim"))
    flags = ["--model", model] if model else []
    with receiving() as receiver:
        said = shell("submit", "in.jsonl", *flags, "--webhook-url", receiver.url)
        assert said.code == 0, said.err
        assert "secret, shown this once: whsec_" in said.err
        [call] = receiver.wait_for_calls(1, timeout_s=120)
        assert json.loads(call.body)["data"]["id"] == said.out.strip()
        own = ("--webhook-url", receiver.url, "--webhook-secret", OWN_SECRET)
        said = shell("submit", "in.jsonl", *flags, *own)
        assert (said.code, "whsec_" in said.err) == (0, False)
        receiver.wait_for_calls(2, timeout_s=120)
    refused = shell("submit", "in.jsonl", *flags, "--webhook-url", "http://10.0.0.1/")
    assert (refused.code, refused.out) == (3, "")
