"""A batch against vLLM's own server, beside the same requests on the engine within."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from batch_app.core import BatchStatus
from batch_app.engine.base import EngineRequest
from batch_app.engine.process import engine_environment
from batch_app.engine.vllm import VllmEngine
from batch_app.engine.vllm_setup import emulates_bfloat16
from contract.engine_conformance import CHAT, collect_all
from integration.beside_vllm import without_ids
from integration.conftest import DEMO_MODEL
from support.site import REPO, Site, kill_tree
from support.waiting import wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1200),  # two engines load
]

COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
#: Besides the shipped file: other fields, other endpoints, and what vLLM refuses.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI, "n": 2, "max_tokens": 3, "seed": 5}),
    (CHAT, {"messages": HI, "stop": ["e"], "max_tokens": 8}),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 4}),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 3000}]}),
    (CHAT, {"messages": HI, "top_p": 7}),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}, "max_tokens": 4}),
    (COMPLETIONS, {"prompt": "27 + 58", "max_tokens": 5}),
    (COMPLETIONS, {"prompt": ["27 + 58", "1"], "max_tokens": 5, "echo": True}),
    ("/v1/responses", {"input": "What is 27 + 58?", "max_output_tokens": 9}),
    ("/v1/embeddings", {"input": "no such endpoint there"}),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of vLLM's server with the demo model, under another name than ours."""
    pytest.importorskip("vllm")
    log = tmp_path_factory.mktemp("vllm") / "serve.log"
    command = [
        # What `vllm serve` starts; that command isn't in the package for processors.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO_MODEL)),
        *("--served-model-name", "demo-over-there", "--host", "127.0.0.1", "--port", "0"),
        *("--max-model-len", "2048", "--enforce-eager", "--enable-auto-tool-choice"),
        *("--tool-call-parser", "hermes"),
        *(("--dtype", "float32") if emulates_bfloat16() else ()),
    ]
    environment = engine_environment(os.environ) | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        url = wait_for(
            lambda: _address(process),
            timeout_s=600.0,
            every_s=0.5,
            what=f"vLLM's server listens; see {log}",
        )
        yield f"{url}/v1"
    finally:
        kill_tree(process.pid)
        process.wait(timeout=60)


def _address(process: subprocess.Popen[bytes]) -> str:
    """Where it listens, once it is healthy; it chose the port itself."""
    assert process.poll() is None, "vLLM's server has ended"
    for connection in psutil.Process(process.pid).net_connections(kind="inet"):
        if connection.status != psutil.CONN_LISTEN:
            continue
        url = f"http://127.0.0.1:{connection.laddr.port}"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return url
        except httpx.HTTPError:
            continue
    return ""


def test_the_bodies_are_those_of_the_engine_within(
    served: str, vllm_engine: VllmEngine, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (REPO / "batch_100_real.jsonl").read_text().splitlines()]
    for number, (endpoint, body) in enumerate(OTHERS):
        cold = {} if endpoint == "/v1/embeddings" else {"temperature": 0}
        lines.append({"custom_id": f"other-{number}", "url": endpoint, "body": cold | body})
    for line in lines:
        line["body"].pop("model", None)

    requests = [
        EngineRequest(number, line["url"], json.dumps(line["body"]).encode())
        for number, line in enumerate(lines)
    ]
    vllm_engine.submit(requests)
    within = collect_all(vllm_engine, range(len(lines)))

    site = Site(tmp_path)
    try:
        with site.settings.models.open("a") as registry:
            registry.write(
                '[[model]]\nname = "remote"\nengine = "openai"\nsource = "demo-over-there"\n'
                f'[model.engine_args]\nbase_url = "{served}"\n'
            )
        batch_id = site.submit(lines, "remote")
        site.start_worker()
        batch = site.wait_until_done(batch_id, timeout_s=300)
        results = site.results(batch_id)
        log = site.log(batch_id)
    finally:
        site.close()
    assert batch.status is BatchStatus.COMPLETED
    assert "remote server (openai vllm " in log
    assert [line["custom_id"] for line in results] == [line["custom_id"] for line in lines]
    tokens = [0, 0]
    for number, line in enumerate(results):
        ours, theirs = within[number], line["response"]
        case = json.dumps(lines[number])[:200]
        ours_said, theirs_said = json.loads(ours.body), theirs["body"]
        if lines[number]["url"] == "/v1/embeddings":  # each names what it has in its own way
            assert (ours.status_code, theirs["status_code"]) == (404, 404)
            continue
        assert (case, ours.status_code) == (case, theirs["status_code"])
        if ours.status_code == 200:
            assert theirs_said["model"] == "remote"
            ours_said["model"] = "remote"
        for said in (ours_said, theirs_said):
            said.pop("system_fingerprint", None)  # of the configuration, which has the model's name
        assert (case, without_ids(ours_said)) == (case, without_ids(theirs_said))
        tokens[0] += ours.prompt_tokens
        tokens[1] += ours.completion_tokens
    counted = batch.progress.tokens
    assert [counted.prompt_tokens, counted.completion_tokens] == tokens
