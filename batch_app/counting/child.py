"""Counts the prompts of some lines: `python -m batch_app.counting.child`, started by `count.py`.

A process of its own, so that a tokenizer's memory is gone when it has counted, and so that nothing
it does holds up the API. Reads an `Order` on standard input, then the places of the lines; writes a
`Report`, then one count a line, then of each whether its answer has a fixed length. Prompts are
read from the input file and go nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec
from jinja2 import TemplateError

from batch_app.counting.prompts import Prompt, prompt_of
from batch_app.counting.tokenizer import ModelTokenizer, Tokenizer, Unusable, WordTokenizer

#: Instead of a count: the line was not reached; the engine will refuse it.
NOT_REACHED, REFUSED = -1, -2
CHUNK_BYTES = 1 << 20
NICENESS = 5
_PR_SET_PDEATHSIG = 1


class Order(msgspec.Struct):
    """`source`: a folder or a hub id, which only the local cache is asked about. `budget_s`:
    after so many seconds no further line is begun. `endpoints`: what the places refer to."""

    engine: str
    source: str
    revision: str | None
    chat_template: str | None
    input_path: str
    endpoints: list[str]
    num_lines: int
    budget_s: float


class Report(msgspec.Struct):
    """`reason`: why nothing could be counted; empty where it could. `num_inexact` of the counts
    are only nearly right."""

    reason: str = ""
    num_inexact: int = 0


class _Line(msgspec.Struct):
    body: dict[str, object]


_decode = msgspec.json.Decoder(_Line).decode


def tokenizer_of(order: Order) -> Tokenizer:
    """Raises Unusable."""
    if order.engine == "sim":
        return WordTokenizer()
    return ModelTokenizer(_folder(order.source, order.revision), order.chat_template)


def _folder(source: str, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            source, revision=revision, allow_patterns=["*.json"], local_files_only=True
        )
        return Path(found)
    except ImportError:
        raise Unusable("its files are not on this machine") from None
    except (OSError, ValueError) as error:  # what the hub's own errors derive from
        raise Unusable("its files are not in the model hub's cache on this machine") from error


def count_lines(
    order: Order, tokenizer: Tokenizer, places: Sequence[tuple[int, int, int]]
) -> tuple[array[int], bytearray, int]:
    """Counts in the order of the places, which have a fixed length, how many are inexact."""
    counts = array("i", [NOT_REACHED]) * len(places)
    fixed = bytearray(len(places))
    num_inexact = 0
    deadline = time.monotonic() + order.budget_s
    descriptor = os.open(order.input_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        begun = 0
        while begun < len(places) and time.monotonic() < deadline:
            size, owners, prompts = 0, [], []
            while begun < len(places) and size < CHUNK_BYTES:
                offset, length, endpoint = places[begun]
                raw = os.pread(descriptor, length, offset)
                prompt = _prompt(raw, order.endpoints[endpoint], tokenizer)
                if prompt is None:
                    counts[begun] = REFUSED
                else:
                    owners.append(begun)
                    prompts.append(prompt)
                    num_inexact += not prompt.is_exact
                    fixed[begun] = prompt.has_fixed_length
                size += length
                begun += 1
            for owner, count in zip(owners, tokenizer.count(prompts), strict=True):
                counts[owner] = count
    finally:
        os.close(descriptor)
    return counts, fixed, num_inexact


def _prompt(raw: bytes, endpoint: str, tokenizer: Tokenizer) -> Prompt | None:
    """None where the engine will refuse it."""
    try:
        body = _decode(raw).body
        return prompt_of(endpoint, body, tokenizer.template_for(bool(body.get("tools"))))
    except (
        TemplateError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        StopIteration,
        RecursionError,
    ):
        return None


def main() -> int:
    os.nice(NICENESS)
    if sys.platform == "linux":  # nobody waits for the counts of a server that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    flat = array("q", sys.stdin.buffer.read())
    places = list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
    report, counts, fixed = Report(), array("i"), bytearray()
    try:
        counts, fixed, report.num_inexact = count_lines(order, tokenizer_of(order), places)
    except Unusable as error:
        report.reason = str(error)
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n" + counts.tobytes() + fixed)
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
