"""The benchmark's workloads: the properties that their figures rest on."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from batch_app.lines import parse_line
from benchmarks.peer.infinite_cache import infinite_hit_share
from benchmarks.peer.text import WORDS, words
from benchmarks.peer.workloads import (
    TRACE_BLOCK_WORDS,
    WORKLOADS,
    DataMissing,
    duplicates,
    gemma,
    long_tail,
    mooncake,
    prompt_of,
    shared_prefix,
    sorted_by_prompt,
    unique,
)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with both traces, in small."""
    rows = [f"2023-11-16 18:15:46.6805900,{context},{context // 2}" for context in range(100, 200)]
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    (tmp_path / "azure_llm_2023_conv.csv").write_text("\n".join([header, *rows, ""]))
    trace = [
        {"timestamp": 0, "input_length": 1100, "output_length": 160, "hash_ids": [0, 1, 2]},
        {"timestamp": 1, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 7]},
        {"timestamp": 2, "input_length": 500, "output_length": 64, "hash_ids": [9]},
    ]
    path = tmp_path / "mooncake_synthetic_trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in trace))
    return tmp_path


def num_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_is_a_good_batch_and_the_same_for_the_same_seed(
    name: str, traces: Path
) -> None:
    generate = WORKLOADS[name].generate
    requests = generate(40, 1, traces)
    assert requests == generate(40, 1, traces)
    assert requests != generate(40, 2, traces)
    assert len({request["custom_id"] for request in requests}) == len(requests)
    for request in requests:
        parsed = parse_line(json.dumps(request).encode())
        assert parsed.verdict.max_tokens >= 1
        limits = WORKLOADS[name].limits(40)
        # Words and the template's tokens, with some room for words of two tokens.
        assert (
            num_words(prompt_of(request)) * 1.05 + 16 + parsed.verdict.max_tokens
            <= limits.max_model_len
        )


def test_unique_prompts_have_nothing_in_common() -> None:
    starts = Counter(" ".join(prompt_of(request).split()[:5]) for request in unique(3000, 1))
    assert max(starts.values()) == 1


def test_lengths_are_those_that_are_told() -> None:
    for requests, prompt_tokens, output_tokens in (
        (unique(2000, 1), 90, 32),
        (shared_prefix(2000, 1), 530, 4),
        (gemma(2000, 1), 788, 308),
    ):
        lengths = [num_words(prompt_of(request)) + 8 for request in requests]
        assert sum(lengths) / len(lengths) == pytest.approx(prompt_tokens, rel=0.02)
        outputs = [request["body"]["max_tokens"] for request in requests]
        assert sum(outputs) / len(outputs) == pytest.approx(output_tokens, rel=0.02)


def test_documents_are_shuffled_and_exceed_the_cache_as_told() -> None:
    requests = shared_prefix(1200, 1)
    documents = [" ".join(prompt_of(request).split()[:512]) for request in requests]
    assert Counter(Counter(documents).values()) == {8: 150}
    neighbours = sum(one == other for one, other in itertools.pairwise(documents))
    assert neighbours < 30  # 7 of 8 when they are sorted
    together = [prompt_of(request) for request in sorted_by_prompt(requests)]
    prefixes = [" ".join(prompt.split()[:512]) for prompt in together]
    assert sum(one == other for one, other in itertools.pairwise(prefixes)) == 1050
    all_tokens = 150 * 512
    bounded = WORKLOADS["shared-prefix"].limits(1200).kv_cache_tokens
    fitting = WORKLOADS["prefixes-fit"].limits(1200).kv_cache_tokens
    assert bounded is not None
    assert fitting is not None
    assert 2 <= all_tokens / bounded <= 4
    assert fitting > all_tokens + 1200 * 30


@pytest.mark.parametrize("num_requests", [100, 101])
def test_half_of_the_duplicates_are_duplicates(num_requests: int) -> None:
    requests = duplicates(num_requests, 1)
    assert len(requests) == num_requests
    assert len({json.dumps(request["body"]) for request in requests}) == (num_requests + 1) // 2


def test_long_tail_takes_its_lengths_from_the_trace(traces: Path) -> None:
    requests = long_tail(200, 1, traces)
    assert {request["body"]["max_tokens"] for request in requests} <= set(range(50, 100))
    assert WORKLOADS["long-tail"].limits(200).max_num_seqs == 50
    with pytest.raises(DataMissing, match="--data"):
        long_tail(10, 1, None)


def test_equal_blocks_of_the_trace_are_equal_text(traces: Path) -> None:
    first, second, third = mooncake(10, 1, traces)
    shared = " ".join(prompt_of(first).split()[: 2 * TRACE_BLOCK_WORDS])
    assert prompt_of(second).startswith(shared)
    assert not prompt_of(second).endswith(prompt_of(first)[-50:])
    assert num_words(prompt_of(third)) == TRACE_BLOCK_WORDS
    assert [r["body"]["max_tokens"] for r in (first, second, third)] == [10, 1, 4]


def test_without_the_trace_there_is_a_stand_in_that_shares_prefixes() -> None:
    requests = mooncake(300, 1, None)
    assert len(requests) == 300
    prompts = [[hash(word) for word in prompt_of(request).split()] for request in requests]
    assert 0.2 < infinite_hit_share(prompts, TRACE_BLOCK_WORDS) < 0.9


def test_words_are_distinct_and_plain() -> None:
    assert len(set(WORDS)) == len(WORDS) > 600
    assert all(word.isascii() and word.islower() for word in WORDS)
    assert num_words(words(random.Random(1), 77)) == 77


def test_infinite_cache_counts_as_vllm_does() -> None:
    prompt = list(range(10))
    assert infinite_hit_share([prompt], 4) == 0
    # 8 of the second's 10 tokens stand in whole blocks.
    assert infinite_hit_share([prompt, prompt], 4) == 8 / 20
    # The last token is always computed: of two whole blocks only the first can be a hit.
    assert infinite_hit_share([prompt[:8], prompt[:8]], 4) == 4 / 16
    # A block counts only with all before it.
    assert infinite_hit_share([prompt, [99, *prompt[1:]]], 4) == 0
