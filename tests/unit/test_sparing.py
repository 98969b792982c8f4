"""What the prefix cache spares, told from fingerprints."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from batch_app.index import Index
from batch_app.intake import IntakeRules, index_file
from batch_app.planner import plan
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.sparing import spared_shares

NUM_DOCUMENTS, NUM_QUESTIONS = 30, 8


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Questions about documents of some 3,600 bytes, in no order."""
    folder = tmp_path_factory.mktemp("sparing")
    dice = random.Random(1)
    documents = [" ".join(dice.choices(("abc", "defg", "hi"), k=900)) for _ in range(NUM_DOCUMENTS)]
    prompts = [f"{text} question {n}?" for text in documents for n in range(NUM_QUESTIONS)]
    dice.shuffle(prompts)
    path = folder / "input.jsonl"
    with path.open("w") as file:
        for number, prompt in enumerate(prompts):
            body = {"messages": [{"role": "user", "content": prompt}]}
            file.write(json.dumps({"custom_id": str(number), "body": body}) + "\n")
    registry = ModelRegistry([ModelEntry(name="sim", source="sim", engine="sim")])
    index_file(path, folder, IntakeRules(registry, model="sim"))
    return Index.load(folder)


def shares(index: Index, *, by_prefix: bool, capacity: int | None = None) -> float:
    order = next(plan(index, np.arange(len(index)), by_prefix=by_prefix)).numbers
    tokens = np.full(len(order), 1000, np.float32)
    found = spared_shares(
        index, order, tokens, by_prefix=by_prefix, kv_cache_tokens=capacity, block_tokens=16
    )
    assert found.min() >= 0
    assert found.max() < 1
    return float(found.mean())


def test_in_the_planned_order_a_document_is_computed_once(shuffled: Index) -> None:
    expected = (NUM_QUESTIONS - 1) / NUM_QUESTIONS
    found = shares(shuffled, by_prefix=True)
    assert expected * 0.85 < found <= expected
    assert shares(shuffled, by_prefix=True, capacity=2000) == found


def test_in_the_order_of_the_file_a_small_cache_forgets(shuffled: Index) -> None:
    in_order = shares(shuffled, by_prefix=True)
    assert shares(shuffled, by_prefix=False) == pytest.approx(in_order, abs=0.01)
    some = shares(shuffled, by_prefix=False, capacity=30_000)
    few = shares(shuffled, by_prefix=False, capacity=5_000)
    assert few < some < 0.8 * in_order
    assert few < 0.2


def test_nothing_is_shared_with_nobody(shuffled: Index) -> None:
    one = np.array([3])
    assert spared_shares(shuffled, one, np.ones(1, np.float32), by_prefix=True).tolist() == [0]
