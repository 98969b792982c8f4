"""Prompt tokens: what is counted, what a sample says, and what bytes say without a tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_app.core import Endpoint
from batch_app.counting import count
from batch_app.counting.count import BytesPerToken, count_prompts
from batch_app.counting.prompts import prompt_of
from batch_app.counting.sample import choose, spread, stratify
from batch_app.counting.template import ChatTemplate
from batch_app.counting.tokenizer import ModelTokenizer, Unusable
from batch_app.index import Index
from batch_app.intake import IntakeRules, index_file
from batch_app.registry import ModelEntry, ModelRegistry

DEMO = Path(__file__).parents[2] / "models" / "demo"
DEMO_ENTRY = ModelEntry(name="demo", source=str(DEMO))
SIM_ENTRY = ModelEntry(name="sim", source="sim", engine="sim")
REGISTRY = ModelRegistry([DEMO_ENTRY, SIM_ENTRY])


def indexed(folder: Path, bodies: list[dict[str, Any]], model: str = "demo") -> tuple[Index, Path]:
    path = folder / "input.jsonl"
    lines = [json.dumps({"custom_id": str(number), **body}) for number, body in enumerate(bodies)]
    path.write_text("\n".join(lines))
    work = folder / "work"
    work.mkdir()
    index_file(path, work, IntakeRules(REGISTRY, model=model))
    return Index.load(work), path


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"body": {"messages": [{"role": "user", "content": text}], **more}}


def everything(index: Index) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(len(index))


# -- templates and prompts -------------------------------------------------------------------------


def test_a_template_has_what_model_authors_use() -> None:
    text = (
        "{{ bos_token }}{% for message in messages %}\n"
        "{%- if message.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ message.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}{% if flag is defined %}{{ flag }}{% endif %}"
    )
    template = ChatTemplate(text, {"bos_token": "<s>"})

    said = [{"role": "user", "content": "<é>"}, {"role": "skip", "content": "x"}]
    rendered = template.render(said, arguments={"flag": 7, "messages": "not this way"})

    assert rendered == '<s>"<é>"7'


def test_a_template_may_not_reach_out() -> None:
    template = ChatTemplate("{{ ''.__class__.__mro__ }}", {})
    with pytest.raises(Exception, match="unsafe"):
        template.render([])


def test_content_is_given_as_the_template_wants_it() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    plain = ChatTemplate("{{ messages[0].content }}", {})
    looping = ChatTemplate(
        "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
        "{% for message in messages %}{% for item in message.content %}{% endfor %}{% endfor %}",
        {},
    )

    assert prompt_of(Endpoint.CHAT_COMPLETIONS, body, plain).texts == ["a\nb"]
    assert prompt_of(Endpoint.CHAT_COMPLETIONS, body, looping).texts == ["[a][b]"]


@pytest.mark.parametrize(
    ("endpoint", "body", "texts", "num_ids"),
    [
        (Endpoint.COMPLETIONS, {"prompt": "a b"}, ["a b"], 0),
        (Endpoint.COMPLETIONS, {"prompt": [1, 2, 3]}, [], 3),
        (Endpoint.COMPLETIONS, {"prompt": [[1, 2], [3]]}, [], 3),
        (Endpoint.EMBEDDINGS, {"input": ["a", "b"]}, ["a", "b"], 0),
        (Endpoint.SCORE, {"text_1": "q", "text_2": ["x", "y"]}, ["q", "q", "x", "y"], 0),
        (Endpoint.RESPONSES, {"input": "a", "instructions": "b"}, ["b|a"], 0),
    ],
)
def test_prompts_of_each_endpoint(
    endpoint: Endpoint, body: dict[str, Any], texts: list[str], num_ids: int
) -> None:
    template = ChatTemplate("{{ messages | map(attribute='content') | join('|') }}", {})
    prompt = prompt_of(endpoint, body, template)
    assert (prompt.texts, prompt.num_ids) == (texts, num_ids)


def test_answers_of_a_fixed_length() -> None:
    def fixed(**body: Any) -> bool:
        return prompt_of(Endpoint.COMPLETIONS, {"prompt": "a", **body}, None).has_fixed_length

    assert fixed(max_tokens=8, ignore_eos=True)
    assert fixed(max_tokens=8, min_tokens=8)
    assert not fixed(max_tokens=8, min_tokens=4)
    assert not fixed(max_tokens=8)


def test_a_folder_without_a_tokenizer_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=r"no tokenizer\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Unusable, match="can't be read"):
        ModelTokenizer(tmp_path)


# -- whole files -----------------------------------------------------------------------------------


def test_every_request_of_a_small_file_is_counted(tmp_path: Path) -> None:
    bodies = [chat("What is 27 + 58?"), chat("Hello " * 50), chat("x", max_tokens=3, min_tokens=3)]
    index, path = indexed(tmp_path, bodies)
    tokenizer = ModelTokenizer(DEMO)
    template = tokenizer.template_for(False)
    prompts = [prompt_of(Endpoint.CHAT_COMPLETIONS, one["body"], template) for one in bodies]

    counts = count_prompts(index, everything(index), path, DEMO_ENTRY, budget_s=30)

    assert counts.basis == "counted"
    assert counts.relative_error == 0.0
    assert counts.tokens.tolist() == tokenizer.count(prompts)
    assert counts.tokens[1] > counts.tokens[0] > 5
    assert counts.fixed is not None
    assert counts.fixed.tolist() == [False, False, True]
    # Any order, any part.
    some = count_prompts(index, np.array([2, 0]), path, DEMO_ENTRY, budget_s=30)
    assert some.tokens.tolist() == counts.tokens[[2, 0]].tolist()


def test_the_simulated_engine_counts_words(tmp_path: Path) -> None:
    index, path = indexed(tmp_path, [chat("a b c"), chat("d")], "sim")
    counts = count_prompts(index, everything(index), path, SIM_ENTRY, budget_s=30)
    assert counts.tokens.tolist() == [3, 1]


def test_what_the_template_refuses_is_named(tmp_path: Path) -> None:
    entry = DEMO_ENTRY.model_copy(
        update={"engine_args": {"chat_template": "{{ raise_exception('no') }}\n"}}
    )
    index, path = indexed(tmp_path, [chat("a"), chat("b")])
    counts = count_prompts(index, everything(index), path, entry, budget_s=30)
    assert counts.refused.tolist() == [0, 1]


def test_without_a_tokenizer_bytes_are_divided(tmp_path: Path) -> None:
    index, path = indexed(tmp_path, [chat("a" * 300)])
    entry = ModelEntry(name="demo", source="nobody/has-this")
    length = int(index.records["length"][0])

    guess = count_prompts(index, everything(index), path, entry, budget_s=1)
    learned = count_prompts(
        index, everything(index), path, entry, budget_s=1, usual=BytesPerToken(5.0, learned=True)
    )

    assert guess.basis == "guess"
    assert "not on this machine" in guess.reason
    assert (learned.basis, learned.total) == ("bytes", round(length / 5))
    assert 0 < learned.relative_error < guess.relative_error


def test_a_child_that_breaks_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, path = indexed(tmp_path, [chat("a")])
    monkeypatch.setattr(count.sys, "executable", "/bin/false")
    assert count_prompts(index, everything(index), path, DEMO_ENTRY, budget_s=1).basis == "guess"
    monkeypatch.setattr(count.sys, "executable", "/no/such/thing")
    assert count_prompts(index, everything(index), path, DEMO_ENTRY, budget_s=1).basis == "guess"


def test_a_sample_of_a_large_file_is_near_and_knows_how_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(count, "MAX_COUNTED", 100)
    monkeypatch.setattr(count, "SAMPLE_REQUESTS", 200)
    dice = random.Random(3)
    words = ["about", "above", "12", "+", "unbelievably", "question,", "because", "of"]
    texts = [" ".join(dice.choices(words, k=dice.choice((5, 40, 300)))) for _ in range(2000)]
    index, path = indexed(tmp_path, [chat(text) for text in texts])
    tokenizer = ModelTokenizer(DEMO)
    template = tokenizer.template_for(False)
    truth = sum(
        tokenizer.count(
            [prompt_of(Endpoint.CHAT_COMPLETIONS, chat(text)["body"], template) for text in texts]
        )
    )

    counts = count_prompts(index, everything(index), path, DEMO_ENTRY, budget_s=30)

    assert counts.basis == "sampled"
    assert 200 <= counts.num_counted < 500
    assert 0 < counts.relative_error < 0.01
    assert abs(counts.total / truth - 1) < 4 * counts.relative_error


# -- samples ---------------------------------------------------------------------------------------


def test_a_sample_is_bounded_and_has_something_of_every_length() -> None:
    lengths = np.array([100] * 90_000 + [200_000] * 50, dtype=np.int64)
    strata = stratify(lengths)

    chosen = choose(lengths, strata, max_requests=3000, max_bytes=4 << 20)

    assert len(set(chosen.tolist())) == len(chosen)
    assert lengths[chosen].sum() < 2 * (4 << 20)
    assert (lengths[chosen] == 100).sum() >= 16
    assert (lengths[chosen] == 200_000).sum() >= 16


def test_the_error_of_a_sample_is_the_error() -> None:
    """Over many samples, the sums scatter as much as each one says."""
    dice = np.random.default_rng(5)
    lengths = dice.integers(100, 5000, 20_000).astype(np.int64)
    tokens = np.round(lengths / 4 * dice.normal(1, 0.3, len(lengths)))
    strata = stratify(lengths)
    errors, told = [], []
    for seed in range(60):
        chosen = choose(lengths, strata, max_requests=500, max_bytes=1 << 30, seed=seed)
        spread_out, error = spread(lengths, strata, chosen, tokens[chosen])
        errors.append(float(spread_out.sum()) / tokens.sum() - 1)
        told.append(error)
    assert np.std(errors) == pytest.approx(np.mean(told), rel=0.35)
    assert abs(np.mean(errors)) < 0.005
