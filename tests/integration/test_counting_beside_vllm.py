"""Prompt tokens as counted without an engine are those of vLLM's own `usage`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_app.benchmarks import BenchmarkFolder
from batch_app.config import Settings
from batch_app.counting.count import count_prompts
from batch_app.counting.prompts import Prompt
from batch_app.counting.tokenizer import ModelTokenizer
from batch_app.dry_run import DryRuns
from batch_app.engine.base import EngineRequest
from batch_app.engine.vllm import VllmEngine
from batch_app.index import Index
from batch_app.intake import IntakeRules, index_file
from batch_app.outlook import Outlook
from batch_app.registry import ModelEntry, ModelRegistry
from contract.engine_conformance import collect_all
from integration.conftest import DEMO_MODEL

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENTRY = ModelEntry(name="demo", source=str(DEMO_MODEL), engine_args={"max_model_len": 2048})
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds “two” numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 27}'},
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [user("What is 27 + 58?")]}),
    (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")]}),
    (
        CHAT,
        {"messages": [user("Hi"), {"role": "assistant", "content": "Yes?"}, user("Añ 日 🚀")]},
    ),
    (CHAT, {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}),
    (CHAT, {"messages": [{"role": "developer", "content": "Be brief."}, user("Hi")]}),
    (CHAT, {"messages": [{**user("Hi"), "name": "ana"}]}),
    (CHAT, {"messages": [user("Add.")], "tools": [TOOL]}),
    (CHAT, {"messages": [user("Add.")], "tools": [TOOL, TOOL], "tool_choice": "none"}),
    (
        CHAT,
        {
            "messages": [
                user("Add."),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "28"},
            ],
            "tools": [TOOL],
        },
    ),
    (CHAT, {"messages": [user("Hi <|im_end|> there")]}),
    (CHAT, {"messages": [user("Hi")], "add_generation_prompt": False}),
    (CHAT, {"messages": [user("word " * 300)]}),
    (COMPLETIONS, {"prompt": "The capital of France is"}),
    (COMPLETIONS, {"prompt": ["one", "two three"]}),
    (COMPLETIONS, {"prompt": "x", "add_special_tokens": False}),
]


def test_counts_are_those_of_the_engine(vllm_engine: VllmEngine, tmp_path: Path) -> None:
    bodies = [(url, {**body, "max_tokens": 1, "temperature": 0}) for url, body in BODIES]
    index, path = indexed(tmp_path, bodies)
    counts = count_prompts(index, np.arange(len(index)), path, ENTRY, budget_s=30)
    assert counts.basis == "counted", counts.reason

    told = answers(vllm_engine, bodies)

    for number, (_, body) in enumerate(bodies):
        status, answer = told[number]
        assert status == 200, (body, answer)
        assert int(counts.tokens[number]) == answer["usage"]["prompt_tokens"], body
    assert counts.refused.tolist() == []


def test_what_is_too_long_is_what_the_engine_refuses(
    vllm_engine: VllmEngine, tmp_path: Path
) -> None:
    """Around the end of the context, and above it with what is to be answered."""
    lengths = (2000, 2047, 2048, 2049)
    prompts = ["a" + " a" * (length - 1) for length in lengths]
    counted = ModelTokenizer(DEMO_MODEL).count([Prompt([prompt]) for prompt in prompts])
    assert counted == list(lengths)
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": prompt, "max_tokens": 1}) for prompt in prompts
    ]
    bodies.append((COMPLETIONS, {"prompt": "a", "max_tokens": 2048}))
    bodies.append((COMPLETIONS, {"prompt": "a", "max_tokens": 2049}))
    _, path = indexed(tmp_path, bodies)
    folder = tmp_path / "dry"
    folder.mkdir()
    registry = ModelRegistry([ENTRY])
    outlook = Outlook(lambda: registry, BenchmarkFolder(tmp_path / "none"))

    (row,) = DryRuns(Settings(), lambda: registry, outlook).of(path, folder).models

    told = answers(vllm_engine, bodies)
    refused = [number + 1 for number in sorted(told) if told[number][0] != 200]
    assert list(row.lines) == refused


def indexed(folder: Path, bodies: list[tuple[str, dict[str, Any]]]) -> tuple[Index, Path]:
    path = folder / "input.jsonl"
    lines = [
        json.dumps({"custom_id": str(number), "url": url, "body": body})
        for number, (url, body) in enumerate(bodies)
    ]
    path.write_text("\n".join(lines))
    index_file(path, folder, IntakeRules(ModelRegistry([ENTRY]), model="demo"))
    return Index.load(folder), path


def answers(
    engine: VllmEngine, bodies: list[tuple[str, dict[str, Any]]]
) -> dict[int, tuple[int, dict[str, Any]]]:
    engine.submit(
        [EngineRequest(n, url, json.dumps(body).encode()) for n, (url, body) in enumerate(bodies)]
    )
    outcomes = collect_all(engine, range(len(bodies)))
    return {n: (one.status_code, json.loads(one.body)) for n, one in outcomes.items()}
