"""vLLM's own server on the model that our engine has loaded, to hold their answers together.

`python -m integration.beside_vllm QUESTIONS ANSWERS` does so in a process of its own, for a second
engine in one process breaks the first: it loads the model that the file QUESTIONS names, and leaves
`Answers` in the file ANSWERS.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec

from batch_app.engine.base import EngineInfo, EngineRequest, ModelSpec, Outcome
from batch_app.engine.vllm import VllmEngine
from contract.engine_conformance import run


class Questions(msgspec.Struct):
    spec: ModelSpec
    bodies: list[tuple[str, dict[str, Any]]]


class Answers(msgspec.Struct):
    """To each body: our outcome, and the status and body of vLLM's server."""

    info: EngineInfo
    ours: list[Outcome]
    theirs: list[tuple[int, bytes]]


def ask_vllms_server(engine: VllmEngine, endpoint: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Status and body of its whole application, over the engine and in the loop of `engine`."""
    requests, loop = engine._requests, engine._loop
    assert requests is not None
    assert loop is not None

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(requests.app.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            return await client.post(endpoint, json=body, timeout=120)

    response = loop.run_until_complete(ask())
    return response.status_code, response.content


def without_ids(value: Any) -> Any:
    """A body without what differs between any two answers; the keys and their order stay."""
    if isinstance(value, dict):
        return [
            (key, "…" if key in ("id", "created", "created_at") else without_ids(item))
            for key, item in value.items()
        ]
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    return value


def main(asked: Path, answered: Path) -> None:
    questions = msgspec.json.decode(asked.read_bytes(), type=Questions)
    engine = VllmEngine(questions.spec)
    info = engine.load()
    requests = [
        EngineRequest(number, endpoint, json.dumps(body).encode())
        for number, (endpoint, body) in enumerate(questions.bodies)
    ]
    answers = Answers(
        info,
        run(engine, *requests),
        [ask_vllms_server(engine, endpoint, body) for endpoint, body in questions.bodies],
    )
    answered.write_bytes(msgspec.msgpack.encode(answers))
    engine.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    os._exit(0)  # An interpreter that shuts down orderly around an engine takes seconds.
