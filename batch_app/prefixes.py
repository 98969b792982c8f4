"""Fingerprints of prompt prefixes: what the planner needs to put like beside like.

Two prompts that begin alike have equal fingerprints at every mark up to where they part. Marks lie
128 bytes apart at the start and further apart with depth, so that a prompt of any length has few,
and what is shared is known to within an eighth of its length. Nobody needs the prompts again.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from itertools import pairwise
from zlib import crc32

STRIDE_BYTES = 128
EVEN_MARKS = 16  # as far as the marks lie one stride apart
MAX_MARKS = 64
#: Of one fingerprint, an unsigned little-endian integer.
FINGERPRINT_BYTES = 4


def _marks() -> tuple[int, ...]:
    marks = [STRIDE_BYTES * number for number in range(1, EVEN_MARKS + 1)]
    while len(marks) < MAX_MARKS:
        marks.append(marks[-1] + marks[-1] // 8)
    return tuple(marks)


#: Depths in bytes at which a prompt is fingerprinted: 128, 256, … 2048, 2304, … 613,000.
MARKS = _marks()
#: By number of marks: the stretches between them, and what puts their fingerprints into bytes.
_STRETCHES = [tuple(pairwise((0, *MARKS[:number]))) for number in range(MAX_MARKS + 1)]
_PACK = [struct.Struct(f"<{number}I").pack for number in range(MAX_MARKS + 1)]


def fingerprints(head: bytes, stream: bytes) -> bytes:
    """`FINGERPRINT_BYTES` for each mark that `stream` reaches.

    `stream` is the prompt as the request's line spells it, `head` whatever is rendered in front of
    it (tools, template arguments). A fingerprint is the CRC-32 of head and stream up to its mark:
    two prefixes that differ have the same one by chance once in 4 billion, which costs a little
    order.
    """
    number = bisect_right(MARKS, len(stream))
    crc = crc32(head) if head else 0
    return _PACK[number](
        *[crc := crc32(stream[start:end], crc) for start, end in _STRETCHES[number]]
    )
