"""What share of the prompt tokens a prefix cache without a limit would have had already."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.peer.workloads import Line


def infinite_hit_share(prompts: Iterable[Sequence[int]], block_size: int) -> float:
    """Hits over queries, in tokens, one request after the other, at vLLM's granularity.

    Only whole blocks count, a block only with all before it, and the last token of a prompt is
    always computed.
    """
    seen: set[bytes] = set()
    hits = total = 0
    for tokens in prompts:
        total += len(tokens)
        digest = b""
        is_hit = True
        for start in range(0, len(tokens) - block_size + 1, block_size):
            block = array("q", tokens[start : start + block_size]).tobytes()
            digest = hashlib.blake2b(digest + block, digest_size=16).digest()
            is_hit = is_hit and digest in seen and start + block_size < len(tokens)
            hits += block_size if is_hit else 0
            seen.add(digest)
    return hits / total if total else 0.0


def tokenized(requests: Sequence[Line], model: Path) -> list[list[int]]:
    """The prompts as the engine gets them, through the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [
        tokenizer.apply_chat_template(
            request["body"]["messages"], tokenize=False, add_generation_prompt=True
        )
        for request in requests
    ]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids
