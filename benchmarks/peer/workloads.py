"""The workloads: what is asked, under which limits, and which figures it is there to compare.

A generator is a plain function of the number of requests and a seed; the same arguments give the
same file. Lengths in tokens are words (`text.py`) plus the chat template's few.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer.text import words

#: What requests call the model, whatever it is.
MODEL = "bench"
Line = dict[str, Any]

DOCUMENT_WORDS = 512
QUESTIONS = 8
TRACE_BLOCK_WORDS = 32
TRACE_OUTPUT_SCALE = 16
#: Of a conversation's context, how many tokens stand for one: output lengths are what it is about.
CONTEXT_SCALE = 8


class DataMissing(Exception):
    """A workload's data is not on this machine; the message says how to name it."""


@dataclass(frozen=True)
class Limits:
    """What every contender's engine is held to. None: the engine's own default.

    `kv_cache_tokens` is rounded to whole blocks; `block_size` is in tokens.
    """

    max_model_len: int = 1024
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_tokens: int | None = None
    block_size: int | None = None


@dataclass(frozen=True)
class Target:
    """`ours` over `against` in `metric`, as a ratio of which more is better."""

    metric: str
    ours: str
    against: str
    at_least: float


@dataclass(frozen=True)
class Workload:
    name: str
    about: str
    num_requests: int
    contenders: tuple[str, ...]
    targets: tuple[Target, ...]
    generate: Callable[[int, int, Path | None], list[Line]]
    limits: Callable[[int], Limits] = lambda _: Limits()
    model: str = "tiny"


def line(number: int, prompt: str, output_tokens: int) -> Line:
    """A request whose answer has exactly so many tokens, always the same."""
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        },
    }


def prompt_of(request: Line) -> str:
    content: str = request["body"]["messages"][-1]["content"]
    return content


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def sorted_by_prompt(lines: Iterable[Line]) -> list[Line]:
    """The best order that is known offline where prompts share prefixes."""
    return sorted(lines, key=prompt_of)


# -- generators ------------------------------------------------------------------------------------


def unique(num_requests: int, seed: int, data: Path | None = None) -> list[Line]:
    """About 90 prompt tokens, 32 output tokens, nothing in common."""
    rng = random.Random(seed)
    return [line(number, words(rng, rng.randint(70, 94)), 32) for number in range(num_requests)]


def shared_prefix(num_requests: int, seed: int, data: Path | None = None) -> list[Line]:
    """Documents of about 512 tokens with eight questions each, shuffled. 4 output tokens."""
    rng = random.Random(seed)
    documents = [words(rng, DOCUMENT_WORDS) for _ in range(_num_documents(num_requests))]
    prompts = [
        f"{documents[number // QUESTIONS]} {words(rng, 10)}" for number in range(num_requests)
    ]
    rng.shuffle(prompts)
    return [line(number, prompt, 4) for number, prompt in enumerate(prompts)]


def _num_documents(num_requests: int) -> int:
    return -(-num_requests // QUESTIONS)


def duplicates(num_requests: int, seed: int, data: Path | None = None) -> list[Line]:
    """As `unique`, but every prompt comes twice (one of them once where the number is odd)."""
    rng = random.Random(seed)
    prompts = [words(rng, rng.randint(70, 94)) for _ in range(-(-num_requests // 2))]
    prompts = (prompts * 2)[:num_requests]
    rng.shuffle(prompts)
    return [line(number, prompt, 32) for number, prompt in enumerate(prompts)]


def long_tail(num_requests: int, seed: int, data: Path | None = None) -> list[Line]:
    """Output lengths of the Azure conversation trace, whose mean is 211 and whose tail is long."""
    lengths = _azure_lengths(data)
    rng = random.Random(seed)
    return [
        line(number, words(rng, max(1, context // CONTEXT_SCALE)), generated)
        for number, (context, generated) in enumerate(
            rng.choice(lengths) for _ in range(num_requests)
        )
    ]


def _azure_lengths(data: Path | None) -> list[tuple[int, int]]:
    path = _data_file(data, "azure_llm_2023_conv.csv")
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [
            (min(int(row["ContextTokens"]), 16_000), min(int(row["GeneratedTokens"]), 1_900))
            for row in rows
            if int(row["GeneratedTokens"]) > 0
        ]


def mooncake(num_requests: int, seed: int, data: Path | None = None) -> list[Line]:
    """The Mooncake trace: each of its 512-token blocks is one of 32, each 16 output tokens are one.

    Where the trace isn't there, a smaller stand-in of the same kind is made: a few long prefixes
    that many requests share to different depths, and many that nobody shares.
    """
    try:
        trace = _mooncake_trace(_data_file(data, "mooncake_synthetic_trace.jsonl"))
    except DataMissing:
        trace = _stand_in_trace(num_requests, seed)
    blocks: dict[int, str] = {}

    def block(block_id: int) -> str:
        if block_id not in blocks:
            blocks[block_id] = words(random.Random(f"{seed}/{block_id}"), TRACE_BLOCK_WORDS)
        return blocks[block_id]

    lines = []
    for number, (block_ids, output_length) in enumerate(trace):
        if number == num_requests:
            break
        prompt = " ".join(block(block_id) for block_id in block_ids)
        lines.append(line(number, prompt, max(1, output_length // TRACE_OUTPUT_SCALE)))
    return lines


def _mooncake_trace(path: Path) -> Iterator[tuple[list[int], int]]:
    with path.open() as file:
        for row in file:
            request = json.loads(row)
            yield request["hash_ids"], request["output_length"]


def _stand_in_trace(num_requests: int, seed: int) -> Iterator[tuple[list[int], int]]:
    rng = random.Random(seed)
    fresh = 1_000_000
    for _ in range(num_requests):
        shared: list[int] = []
        if rng.random() < 0.7:
            first = 1000 * int(rng.paretovariate(1.0))
            shared = list(range(first, first + rng.randint(4, 40)))
        own = rng.randint(1, 20)
        yield [*shared, *range(fresh, fresh + own)], rng.randint(16, 400)
        fresh += own


def gemma(num_requests: int, seed: int, data: Path | None = None) -> list[Line]:
    """The usage guide's shape: 788 prompt and 308 output tokens, nothing in common."""
    rng = random.Random(seed)
    return [
        line(number, words(rng, rng.randint(700, 856)), rng.randint(248, 368))
        for number in range(num_requests)
    ]


def _data_file(data: Path | None, name: str) -> Path:
    if data is not None and (data / name).is_file():
        return data / name
    raise DataMissing(
        f"{name} is not in {data or '../shared/data'}. Name its folder with --data, or "
        "VLLM_BATCH_BENCH_DATA."
    )


# -- limits ----------------------------------------------------------------------------------------


def _shared_prefix_limits(num_requests: int) -> Limits:
    # A third of all the documents fit.
    tokens = _num_documents(num_requests) * DOCUMENT_WORDS // 3
    return Limits(kv_cache_tokens=max(tokens, 4096))


def _prefixes_fit_limits(num_requests: int) -> Limits:
    tokens = 2 * (_num_documents(num_requests) * DOCUMENT_WORDS + num_requests * 64)
    return Limits(kv_cache_tokens=max(tokens, 4096))


def _long_tail_limits(num_requests: int) -> Limits:
    # Four times as many requests as slots.
    return Limits(max_model_len=4096, max_num_seqs=max(1, num_requests // 4))


OURS, ARRIVAL, SORTED = "ours", "ours-arrival", "ours-sorted"
ALL_COMPUTED, NOT_AHEAD = "ours-no-duplicates", "ours-not-ahead"
RUN_BATCH, RUN_BATCH_SAME = "run_batch", "run_batch-same-limits"
CHAT, CHAT_PROCESS = "llm_chat", "llm_chat-process"

STEADY, WALL = "requests_per_s", "wall_s"
HIT_OF_INFINITE = "hit_share_of_infinite"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "unique",
            "nothing in common; ~90 prompt, 32 output tokens",
            3000,
            (OURS, RUN_BATCH, RUN_BATCH_SAME, CHAT),
            (
                Target(STEADY, OURS, RUN_BATCH, 1.45),
                Target(WALL, OURS, RUN_BATCH, 2.0),
                Target(STEADY, OURS, CHAT, 0.95),
            ),
            unique,
        ),
        Workload(
            "shared-prefix",
            "documents × 8 questions, shuffled; a third of the documents fit the KV cache; "
            "~530 prompt, 4 output tokens",
            1200,
            (OURS, ARRIVAL, SORTED, RUN_BATCH, RUN_BATCH_SAME, CHAT),
            (
                Target(STEADY, OURS, RUN_BATCH, 3.0),
                Target(STEADY, OURS, SORTED, 0.95),
            ),
            shared_prefix,
            _shared_prefix_limits,
        ),
        Workload(
            "prefixes-fit",
            "the same, but all documents fit the KV cache",
            1200,
            (OURS, ARRIVAL),
            (Target(STEADY, OURS, ARRIVAL, 0.98),),
            shared_prefix,
            _prefixes_fit_limits,
        ),
        Workload(
            "mooncake",
            "the Mooncake trace at 1/16 of its lengths",
            3993,
            (OURS, ALL_COMPUTED, RUN_BATCH),
            # One request in twenty is another's duplicate: computed all, as the cache's share is.
            (Target(HIT_OF_INFINITE, ALL_COMPUTED, "", 0.95),),
            mooncake,
            lambda _: Limits(max_model_len=13_000, kv_cache_tokens=65_536, block_size=32),
        ),
        Workload(
            "long-tail",
            "output lengths of the Azure conversation trace; four times as many requests as slots",
            256,
            (OURS, ARRIVAL, RUN_BATCH_SAME),
            (Target(STEADY, OURS, ARRIVAL, 1.05),),
            long_tail,
            _long_tail_limits,
        ),
        Workload(
            "long-tail-16",
            "the same with 16 slots: what a step costs whatever is in it weighs more, as on a GPU",
            64,
            (OURS, ARRIVAL, RUN_BATCH_SAME),
            (Target(STEADY, OURS, ARRIVAL, 1.05),),
            long_tail,
            _long_tail_limits,
        ),
        Workload(
            "duplicates",
            "as unique, every request twice",
            3000,
            (OURS, ALL_COMPUTED, RUN_BATCH),
            (Target(STEADY, OURS, ALL_COMPUTED, 1.9),),
            duplicates,
        ),
        Workload(
            "gemma",
            "for a GPU: 788 prompt and 308 output tokens; Gemma-3-4B's shape with dummy weights",
            1000,
            (OURS, RUN_BATCH, RUN_BATCH_SAME, CHAT_PROCESS),
            (Target(STEADY, OURS, RUN_BATCH, 1.0), Target(STEADY, OURS, CHAT_PROCESS, 0.95)),
            gemma,
            lambda _: Limits(max_model_len=4096),
            model="gemma",
        ),
    )
}
