"""The main job on the real engine: the guide's calls, and kills in the middle of a batch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_tasks
import orjson
import psutil
import pytest
import requests

from support.network import listening_in_network_of, network_of, sockets_of
from support.site import REPO, Site, engine_pid, kill_tree
from support.waiting import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NUM_REQUESTS = 1200
#: Few at a time, so that there is a middle to kill it in.
REGISTRY = f"""
[[model]]
name = "demo"
source = "{REPO / "models" / "demo"}"
[model.engine_args]
max_model_len = 2048
enforce_eager = true
max_num_seqs = 24
"""


class Server:
    """An API server process that can be killed and started again on the same port."""

    def __init__(self, site: Site, root: Path) -> None:
        self._site = site
        self._root = root
        self.port = 0
        self.process = self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> subprocess.Popen[bytes]:
        settings = self._site.settings
        out = self._root / "api.out"
        begin = out.stat().st_size if out.exists() else 0
        command = [sys.executable, "-m", "batch_app.api_server", "--port", str(self.port)]
        command += ["--data-dir", str(settings.data_dir), "--models", str(settings.models)]
        with out.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=self._root,
                env=os.environ
                | {
                    "PYTHONPATH": str(REPO),
                    "VLLM_BATCH_BENCHMARKS_DIR": str(settings.benchmarks_dir),
                },
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

        def listening() -> re.Match[str] | None:
            assert self.process.poll() is None, out.read_text()
            return re.search(r"running on http://127.0.0.1:(\d+)", out.read_text()[begin:])

        found = wait_for(listening, timeout_s=120, what="the API server listens")
        assert found
        self.port = int(found[1])
        return self.process

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.url}{path}", timeout=120)

    def status(self, batch_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.get(f"/v1/batches/{batch_id}").json()
        return answer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


@pytest.fixture(scope="module")
def site(root: Path) -> Iterator[Site]:
    """One for all these tests: loading the model is what takes the time."""
    site = Site(root, poll_interval_s=0.5, lease_s=10.0)
    site.settings.models.write_text(REGISTRY)
    yield site
    site.close()


@pytest.fixture(scope="module")
def server(site: Site, root: Path) -> Iterator[Server]:
    server = Server(site, root)
    yield server
    kill_tree(server.process.pid)
    server.process.wait(timeout=120)


def ensure_worker(site: Site) -> None:
    """Start a worker unless the test before has left one running."""
    if not site.store.list_workers():
        site.start_worker()


def submit(server: Server, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = requests.post(
            f"{server.url}/v1/batches", files={"file": file}, data={"model": "demo"}, timeout=120
        )
    assert answer.status_code == 200, answer.text
    batch: dict[str, Any] = answer.json()
    return batch


def assert_all_right(lines: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    """Each id once, in the input's order, and each with the answer to its own question."""
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in questions]
    wrong = 0
    for line, question in zip(lines, questions, strict=True):
        assert line["response"]["status_code"] == 200
        said = line["response"]["body"]["choices"][0]["message"]["content"]
        asked = question["body"]["messages"][-1]["content"]
        wrong += said.strip() != demo_tasks.expected_answer(asked)
    assert wrong <= len(questions) // 100  # the model's own mistakes, if it makes any


@pytest.mark.long
def test_a_batch_survives_the_death_of_every_process(
    site: Site, server: Server, tmp_path: Path
) -> None:
    questions = list(demo_tasks.make_requests(NUM_REQUESTS, seed=7))
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in questions))
    batch_id = submit(server, path)["batch_id"]
    worker = site.start_worker()

    site.wait_for_progress(batch_id, NUM_REQUESTS // 10, timeout_s=120)
    os.kill(engine_pid(worker.pid), signal.SIGKILL)
    wait_for(lambda: "Starting the engine again" in site.log(batch_id))

    site.wait_for_progress(batch_id, NUM_REQUESTS * 3 // 10, timeout_s=120)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(timeout=120)
    worker = site.start_worker()

    site.wait_for_progress(batch_id, NUM_REQUESTS // 2, timeout_s=120)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=120)
    server.start()
    assert server.status(batch_id)["progress"]["completed"] >= NUM_REQUESTS // 2

    site.wait_until_done(batch_id, timeout_s=240)
    status = server.status(batch_id)
    assert status["status"] == "completed"
    assert status["progress"] == {
        "total": NUM_REQUESTS,
        "completed": NUM_REQUESTS,
        "failed": 0,
        "truncated": status["finish_reasons"]["length"],
        "percent": 100.0,
    }
    assert sum(status["finish_reasons"].values()) == NUM_REQUESTS
    lines = [orjson.loads(line) for line in server.get(status["results_url"]).iter_lines()]
    assert_all_right(lines, questions)

    # What was measured is shown, and the next estimate rests on it.
    (model,) = server.get("/v1/models").json()["models"]
    assert model["throughput_tokens_per_sec"] > 0
    again = submit(server, REPO / "batch_100_real.jsonl")
    assert "demo" in again["estimate"]["based_on_benchmark"]
    log = server.get(f"/v1/batches/{batch_id}/logs").text
    assert "What is" not in log


def test_the_shipped_example_runs_with_the_guides_script(
    site: Site, server: Server, tmp_path: Path
) -> None:
    """The guide's Python script, with this server's address, the demo model and a shorter nap."""
    ensure_worker(site)
    guide = f"""
import requests, time
with open({str(REPO / "batch_100_real.jsonl")!r}, 'rb') as f:
    response = requests.post(
        '{server.url}/v1/batches', files={{'file': f}}, data={{'model': 'demo'}}
    )
batch_id = response.json()['batch_id']
while True:
    status = requests.get(f'{server.url}/v1/batches/{{batch_id}}').json()
    if status['status'] in ['completed', 'failed']:
        break
    time.sleep(0.2)
if status['status'] == 'completed':
    results = requests.get(f'{server.url}/v1/batches/{{batch_id}}/results')
    with open('results.jsonl', 'wb') as f:
        f.write(results.content)
"""
    subprocess.run([sys.executable, "-c", guide], cwd=tmp_path, check=True, timeout=180)
    results = (tmp_path / "results.jsonl").read_bytes().splitlines()
    questions = (REPO / "batch_100_real.jsonl").read_bytes().splitlines()
    assert_all_right([orjson.loads(x) for x in results], [orjson.loads(x) for x in questions])


def test_a_prompt_too_long_for_the_model_fails_alone(
    site: Site, server: Server, tmp_path: Path
) -> None:
    questions = list(demo_tasks.make_requests(20, seed=3))
    questions[5]["body"]["messages"][0]["content"] = "very long " * 3000
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in questions))
    batch_id = submit(server, path)["batch_id"]
    ensure_worker(site)
    site.wait_until_done(batch_id, timeout_s=180)
    assert server.status(batch_id)["progress"]["failed"] == 1
    lines = site.results(batch_id)
    bad = lines.pop(5)
    questions.pop(5)
    assert bad["response"]["status_code"] == 400
    assert "context length" in bad["response"]["body"]["error"]["message"]
    assert_all_right(lines, questions)
    assert "very long" not in site.log(batch_id)


def test_what_was_asked_stands_in_no_log(
    site: Site, server: Server, root: Path, tmp_path: Path
) -> None:
    """Also what vLLM refuses, of which its errors repeat much."""
    mark = "zebra-crossing-at-midnight"
    asked = {"messages": [{"role": "user", "content": f"{mark}?"}], "max_tokens": 8}
    function = {"name": mark, "parameters": {"type": "nonsense"}}
    schema = {"name": mark, "schema": {"$ref": f"#/{mark}"}}
    more: list[dict[str, Any]] = [
        {},
        {"messages": [{"role": mark, "content": mark}]},
        {"messages": [{"role": "user", "content": f"{mark} " * 1000}]},
        {"n": -1},
        {"logit_bias": {mark: 1}},
        {"stop": [mark], "min_tokens": 500},
        {"structured_outputs": {"regex": f"{mark}(((("}},
        {"structured_outputs": {"json": {"type": mark}}},
        {"structured_outputs": {"grammar": f"root ::= {mark} ("}},
        {"tools": [{"type": "function", "function": function}]},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
    ]
    bodies = [asked | each for each in more]
    path = tmp_path / "questions.jsonl"
    path.write_bytes(
        b"".join(
            orjson.dumps({"custom_id": str(n), "body": body}) + b"\n"
            for n, body in enumerate(bodies)
        )
    )
    batch_id = submit(server, path)["batch_id"]
    ensure_worker(site)
    batch = site.wait_until_done(batch_id, timeout_s=240)
    assert batch.progress.completed >= 1
    assert batch.progress.failed >= 4
    content = {"input", "output", "active", "incoming"}
    files = [each for each in root.rglob("*") if each.is_file()]
    said = {
        each.name
        for each in files
        if not content & set(each.relative_to(root).parts) and mark.encode() in each.read_bytes()
    }
    assert {"api.out", "worker.out", "engine.log"} <= {each.name for each in files}
    assert said == set()


def test_nobody_outside_reaches_what_the_engine_listens_on(site: Site, server: Server) -> None:
    ensure_worker(site)
    batch_id = submit(server, REPO / "batch_100_real.jsonl")["batch_id"]
    site.wait_until_done(batch_id, timeout_s=240)
    (worker,) = site.store.list_workers()
    engine = psutil.Process(engine_pid(worker.pid))
    processes = [engine.pid, *(child.pid for child in engine.children())]
    listening = listening_in_network_of(engine.pid)
    ours = listening.keys() & {socket for pid in processes for socket in sockets_of(pid)}
    assert ours, "torch.distributed listens, so that there is something to hide"
    assert {network_of(pid) for pid in processes} == {network_of(engine.pid)}
    assert network_of(engine.pid) != network_of(os.getpid())
    assert not listening_in_network_of(os.getpid()).keys() & ours


@pytest.mark.long
def test_a_command_for_vllms_own_runner_gives_the_same_answers_in_the_same_form(
    tmp_path: Path,
) -> None:
    path = tmp_path / "questions.jsonl"
    questions = list(demo_tasks.make_requests(40, seed=11))
    questions[7]["body"]["messages"][0]["content"] = "very long " * 3000
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in questions))
    ours_path, theirs_path = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    flags = ["--model", str(REPO / "models" / "demo"), "--served-model-name", "demo"]
    flags += ["--max-model-len", "2048", "--enforce-eager", "-i", str(path)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    # Outside of any project: there is no registry.
    run = [sys.executable, "-m", "batch_app.cli", "run", *flags, "-o", str(ours_path)]
    subprocess.run(
        run,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(REPO)},
        check=True,
        timeout=400,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.jsonl", "questions.jsonl"]
    ours = ours_path.read_bytes().splitlines()

    # vLLM's runner, and after it its own reader of such lines, which takes ours for its own.
    beside = tmp_path / "beside.py"
    beside.write_text(
        "import runpy, sys\n"
        "if __name__ == '__main__':\n"
        "    runpy.run_module('vllm.entrypoints.openai.run_batch', run_name='__main__')\n"
        "    from vllm.entrypoints.launchers.run_batch import BatchRequestOutput\n"
        "    lines = [BatchRequestOutput.model_validate_json(line) for line in sys.stdin]\n"
        "    print(len(lines), 'lines read')\n"
    )
    command = [sys.executable, str(beside), *flags, "-o", str(theirs_path)]
    done = subprocess.run(
        command,
        input=b"\n".join(ours),
        env=environment,
        check=True,
        capture_output=True,
        timeout=400,
    )
    assert done.stdout.endswith(b"40 lines read\n")
    theirs = theirs_path.read_bytes().splitlines()

    for our_line, their_line in zip(ours, theirs, strict=True):
        our, their = orjson.loads(our_line), orjson.loads(their_line)
        assert our["custom_id"] == their["custom_id"]
        assert set(our) == set(their)
        assert set(our["response"]) == set(their["response"])
        assert our["response"]["status_code"] == their["response"]["status_code"]
        assert our["error"] == their["error"]
        if our["error"]:
            assert our["custom_id"] == questions[7]["custom_id"]
            assert our["response"]["body"] == their["response"]["body"] is None
            continue
        assert our["response"]["body"]["choices"] == their["response"]["body"]["choices"]
        assert our["response"]["body"]["usage"] == their["response"]["body"]["usage"]
        assert set(our["response"]["body"]) == set(their["response"]["body"])
