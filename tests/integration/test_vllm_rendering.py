"""A prompt that takes long to render costs its own request time, and fails no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from integration.conftest import DEMO_MODEL

pytestmark = [pytest.mark.long, pytest.mark.engine]

#: Loads a model whose template takes seconds for a prompt that says so, under a short limit.
_PROGRAM = """
import json
import os
import sys
import time

os.environ["VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT"] = "0.5"
import msgspec
from batch_app.engine.base import EngineRequest
from batch_app.engine.vllm import VllmEngine
from integration.conftest import demo_spec
from support.waiting import PATIENCE_S


def request(number, text):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    return EngineRequest(number, "/v1/chat/completions", json.dumps(body).encode())


engine = VllmEngine(msgspec.structs.replace(demo_spec(), source=sys.argv[1]))
engine.load()
try:
    slow = [request(number, "slow") for number in range(2)]
    engine.submit([*slow, *(request(number, "hello") for number in range(2, 30))])
    found = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < 30 and time.monotonic() < deadline:
        found.update((outcome.number, outcome.status_code) for outcome in engine.collect(1.0))
finally:
    engine.close()
print(json.dumps(found), file=sys.stderr)
"""
_SLOW = (
    "{% if messages[0].content == 'slow' %}{% for a in range(10000) %}{% for b in range(2000) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)


def test_neighbours_of_a_slow_prompt_are_answered(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = _SLOW + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(model)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stderr.strip().splitlines()[-1])
    assert told == {str(number): 200 for number in range(30)}
