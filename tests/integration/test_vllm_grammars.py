"""A constraint that takes long to compile costs its own request, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [pytest.mark.long, pytest.mark.engine]

#: Loads the demo model with a bound on the compiler that a small vocabulary can exceed.
_PROGRAM = """
import json
import sys
import time

from batch_app.engine import vllm_grammars
from batch_app.engine.base import EngineRequest
from batch_app.engine.vllm import VllmEngine
from integration.conftest import demo_spec
from support.waiting import PATIENCE_S

vllm_grammars.MAX_CPU_S = 1
SLOW = {"structured_outputs": {"choice": ["x" * 505 + str(number) for number in range(1000)]}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
PLAIN = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}
#: Tried, as it has a pattern, and fast.
QUICK = {"structured_outputs": {"regex": "(yes|no){1,3}"}}

tried = 0


class Counted(vllm_grammars.GrammarChecker):
    async def _send(self, check):
        global tried
        tried += 1
        await super()._send(check)


vllm_grammars.GrammarChecker = Counted


def request(number, fields):
    body = {"messages": [{"role": "user", "content": f"{number}?"}], "max_tokens": 24} | fields
    return EngineRequest(number, "/v1/chat/completions", json.dumps(body).encode())


def answers(*requests):
    engine.submit(requests)
    found = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < len(requests) and time.monotonic() < deadline:
        found.update((outcome.number, outcome) for outcome in engine.collect(1.0))
    return found


engine = VllmEngine(demo_spec())
engine.load()
try:
    first = answers(request(0, SLOW), request(1, SLOW), request(2, QUICK),
                    *(request(number, PLAIN) for number in range(3, 20)))
    again = answers(request(0, SLOW), request(2, QUICK))
finally:
    engine.close()
print(json.dumps({
    "first": {number: outcome.status_code for number, outcome in first.items()},
    "slow": first[0].body.decode(),
    "quick": json.loads(first[2].body)["choices"][0]["message"]["content"],
    "tried": tried,
    "again": {number: outcome.status_code for number, outcome in again.items()},
}), file=sys.stderr)
"""


def test_a_slow_constraint_is_refused_and_the_others_are_answered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PROGRAM)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stderr.strip().splitlines()[-1])
    slow = {"0": 400, "1": 400}
    assert told["first"] == slow | {str(number): 200 for number in range(2, 20)}
    assert "takes too long to compile" in json.loads(told["slow"])["error"]["message"]
    assert "maxLength" in told["slow"], "it says what to do"
    assert set(told["quick"].replace("yes", "").replace("no", "")) == set()
    assert told["again"] == {"0": 400, "2": 200}
    assert told["tried"] == 2, "each distinct constraint is compiled once"
