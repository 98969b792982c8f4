"""Real vLLM on a real Ray cluster of two nodes, one of which is lost in the middle of a batch."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from batch_app.core import BatchStatus
from batch_app.engine.base import EngineRequest
from batch_app.engine.vllm import VllmEngine
from contract.engine_conformance import CHAT, run
from integration.conftest import DEMO_MODEL
from support.ray_cluster import ray_nodes
from support.site import Site

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.long, pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import demo_tasks  # noqa: E402

NUM_REQUESTS = 1200
OWN = ("id", "created", "model", "system_fingerprint")


def what_matters(body: dict[str, Any]) -> dict[str, Any]:
    """Of a response: all but what is new in each, or says how the engine was started."""
    return {name: body[name] for name in body if name not in OWN}


def test_a_batch_has_the_same_answers_on_a_cluster_that_loses_a_node(
    vllm_engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(8)
    bodies: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": demo_tasks.random_prompt(rng)}],
            "max_tokens": 16,
            "temperature": 0,
        }
        for _ in range(NUM_REQUESTS)
    ]
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body}
        for number, body in enumerate(bodies)
    ]
    asked = [
        EngineRequest(number, CHAT, json.dumps(body).encode()) for number, body in enumerate(bodies)
    ]
    expected = [what_matters(json.loads(outcome.body)) for outcome in run(vllm_engine, *asked)]

    site = Site(tmp_path)
    with ray_nodes() as nodes:
        nodes.add(CPU=1)
        second = nodes.add(CPU=1)
        site.settings.models.write_text(
            f'[[model]]\nname = "spread"\nsource = "{DEMO_MODEL}"\nengine = "ray"\n'
            "[model.engine_args]\nmax_model_len = 2048\nenforce_eager = true\nmax_num_seqs = 16\n"
            f'[model.engine_args.ray]\naddress = "{nodes.address}"\n'
            "num_gpus = 0\nmin_replicas = 2\nmax_replicas = 2\n"
        )
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", nodes.token)
        try:
            batch_id = site.submit(lines, "spread")
            site.start_worker()
            site.wait_for_progress(batch_id, 100, timeout_s=300)
            assert len(nodes.replicas()) == 2
            nodes.kill(second)
            ended = site.wait_until_done(batch_id, timeout_s=300)
            assert ended.status is BatchStatus.COMPLETED, site.log(batch_id)
            results = site.results(batch_id)
            assert "Loading" in site.log(batch_id)
        finally:
            site.close()

    assert [line["custom_id"] for line in results] == [line["custom_id"] for line in lines]
    assert [what_matters(line["response"]["body"]) for line in results] == expected
