"""SmolLM2-135M, a model that people use: the same answers as vLLM's own programs give.

`make real-model` fetches it; without it, these tests are skipped.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from support import llm_chat
from support.real_requests import MODEL_LEN, mixed_requests
from support.site import REPO
from support.waiting import PATIENCE_S, wait_for

MODEL = REPO / "models" / "smollm2"
pytestmark = [
    pytest.mark.long,
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (MODEL / "config.json").exists(),
        reason="models/smollm2 isn't there: make real-model fetches it",
    ),
]

FLAGS = ["--model", str(MODEL), "--served-model-name", "smollm2", "--dtype", "float32"]
FLAGS += ["--max-model-len", str(MODEL_LEN), "--enforce-eager"]
ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(REPO),
}
LONGEST_RUN_S = 1200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real-model")
    write_lines(folder / "questions.jsonl", mixed_requests("smollm2"))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> list[dict[str, Any]]:
    run(folder / "questions.jsonl", folder / "ours.jsonl")
    return read_lines(folder / "ours.jsonl")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def run(source: Path, output: Path, *more: str) -> None:
    """`vllm-batch run`, outside of any project."""
    command = [sys.executable, "-m", "batch_app.cli", "run", *FLAGS, *more]
    beside([*command, "-i", str(source), "-o", str(output)], output.parent)


def beside(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=LONGEST_RUN_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def answer_of(line: dict[str, Any]) -> dict[str, Any]:
    """What must be the same, whoever asked the model."""
    assert line["response"]["status_code"] == 200, line
    body = line["response"]["body"]
    (choice,) = body["choices"]
    return {
        "text": choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
        "prompt_tokens": body["usage"]["prompt_tokens"],
        "completion_tokens": body["usage"]["completion_tokens"],
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    assert ours.keys() == theirs.keys()
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def test_the_answers_are_those_of_llm_chat(ours: list[dict[str, Any]], folder: Path) -> None:
    answers = folder / "llm_chat.json"
    script = [sys.executable, llm_chat.__file__, str(folder / "questions.jsonl"), str(answers)]
    beside([*script, str(MODEL), str(MODEL_LEN)], folder)

    theirs = orjson.loads(answers.read_bytes())
    assert len(theirs) == 150
    assert differences({line["custom_id"]: answer_of(line) for line in ours}, theirs) == {}


def test_the_answers_are_those_of_vllms_batch_runner(
    ours: list[dict[str, Any]], folder: Path
) -> None:
    output = folder / "run_batch.jsonl"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", *FLAGS]
    beside([*command, "-i", str(folder / "questions.jsonl"), "-o", str(output)], folder)

    theirs = {line["custom_id"]: answer_of(line) for line in read_lines(output)}
    assert len(theirs) == 150
    assert differences({line["custom_id"]: answer_of(line) for line in ours}, theirs) == {}


def test_each_kind_of_request_gets_what_it_asked_for(
    ours: list[dict[str, Any]], folder: Path
) -> None:
    requests = {line["custom_id"]: line["body"] for line in read_lines(folder / "questions.jsonl")}
    num_stopped = num_long = 0
    texts = set()
    for line in ours:
        asked = requests[line["custom_id"]]
        answer = answer_of(line)
        texts.add(answer["text"])
        if "response_format" in asked:
            animal = orjson.loads(answer["text"])
            assert animal["animal"] in ("cat", "dog", "horse")
            assert 0 <= animal["legs"] <= 9
        if asked.get("logprobs"):
            tokens = line["response"]["body"]["choices"][0]["logprobs"]["content"]
            assert len(tokens) == answer["completion_tokens"]
            assert all(len(token["top_logprobs"]) == asked["top_logprobs"] for token in tokens)
        if stop := asked.get("stop"):
            stopped_by = line["response"]["body"]["choices"][0]["stop_reason"]
            num_stopped += stopped_by == stop[0]
            assert stop[0] not in answer["text"]
        num_long += answer["prompt_tokens"] > MODEL_LEN - 200
    assert num_stopped >= 10  # of 20: some answers end before
    assert num_long >= 2
    assert len(texts) > 60
    assert any("Paris" in text for text in texts)


def test_a_run_that_is_killed_goes_on_with_the_same_answers(
    ours: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "batch_app.cli", "run", *FLAGS, "--max-num-seqs", "8"]
    command += ["-i", str(folder / "questions.jsonl"), "-o", str(output)]
    said = tmp_path / "said"

    def some_answers() -> bool:
        assert process.poll() is None, said.read_text()
        return re.search(r"[1-9]\d* of 150 done", said.read_text()) is not None

    with said.open("wb") as file:
        environment = ENVIRONMENT | {"VLLM_BATCH_PROGRESS_LOG_S": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)
        try:
            wait_for(some_answers, timeout_s=2 * PATIENCE_S, what=said.read_text)
        finally:
            process.kill()
            process.wait(timeout=PATIENCE_S)
    assert not output.exists()

    run(folder / "questions.jsonl", output)

    lines = read_lines(output)
    assert set(Counter(line["custom_id"] for line in lines).values()) == {1}
    before = {line["custom_id"]: answer_of(line) for line in ours}
    assert differences({line["custom_id"]: answer_of(line) for line in lines}, before) == {}


def test_embeddings_are_the_same_in_both_encodings(tmp_path: Path) -> None:
    texts = ["A river.", "Ein Fluß.", "日本"]
    lines = [
        {
            "custom_id": f"{encoding}-{number}",
            "url": "/v1/embeddings",
            "body": {"model": "smollm2", "input": text, "encoding_format": encoding},
        }
        for encoding in ("float", "base64")
        for number, text in enumerate(texts)
    ]
    write_lines(tmp_path / "texts.jsonl", lines)
    run(tmp_path / "texts.jsonl", tmp_path / "vectors.jsonl", "--runner", "pooling")

    answers = {line["custom_id"]: line for line in read_lines(tmp_path / "vectors.jsonl")}
    for number in range(len(texts)):
        (plain,) = answers[f"float-{number}"]["response"]["body"]["data"]
        (packed,) = answers[f"base64-{number}"]["response"]["body"]["data"]
        data = base64.b64decode(packed["embedding"])
        vector = struct.unpack(f"<{len(data) // 4}f", data)
        assert len(vector) == 576
        assert vector == pytest.approx(plain["embedding"], abs=1e-4)
