"""Fingerprints of prompt prefixes: what the planner needs to put like beside like.

Two prompts that begin alike have equal fingerprints at every mark up to where they part. Marks lie
128 bytes apart at the start and further apart with depth, so that a prompt of any length has few,
and what is shared is known to within an eighth of its length. Nobody needs the prompts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

STRIDE_BYTES = 128
EVEN_MARKS = 16  # as far as the marks lie one stride apart
MAX_MARKS = 65


def _marks() -> tuple[int, ...]:
    strides = list(range(1, EVEN_MARKS + 1))
    while len(strides) < MAX_MARKS:
        strides.append(strides[-1] + strides[-1] // 8)
    return tuple(STRIDE_BYTES * number for number in strides)


#: Depths in bytes at which a prompt is fingerprinted: 128, 256, … 2048, 2304, … 548,096.
MARKS = _marks()

_MAX_STRIDES = MARKS[-1] // STRIDE_BYTES
_is_mark = np.isin(np.arange(1, _MAX_STRIDES + 1) * STRIDE_BYTES, MARKS)
_num_marks = np.concatenate(([0], np.cumsum(_is_mark)))
#: What each word of a stride, each stride and the head are multiplied with: any random numbers, but
#: the same ones in every process.
_WORDS = STRIDE_BYTES // 4
_keys = np.frombuffer(
    hashlib.shake_256(b"fingerprints").digest(8 * (_WORDS + _MAX_STRIDES + 1)), "<u8"
)
_word_keys, _stride_keys = _keys[:_WORDS], _keys[_WORDS:-1]
_head_key = int(_keys[-1])
_HALF = np.uint64(32)


def head_of(head: bytes) -> int:
    """What stands for the head in `fingerprints_of`."""
    return crc32(head) * _head_key & 0xFFFFFFFFFFFFFFFF if head else 0


def fingerprints_of(
    heads: Sequence[int], streams: Sequence[bytes]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """How many marks each stream reaches, and the fingerprints at these, one stream's after the
    other's.

    A stream is a prompt as its request's line spells it, its head (`head_of`) whatever is rendered
    in front of it (tools, template arguments). A fingerprint is a sum of the words up to its mark,
    each times a random number of its own: two prefixes that differ have the same one by chance once
    in 2 billion, which costs a little order. For all at once: a call for each takes as long as the
    rest of the check of its line.
    """
    lengths = np.fromiter(map(len, streams), np.int64, len(streams))
    num_strides = np.minimum(lengths // STRIDE_BYTES, _MAX_STRIDES)
    num_marks: npt.NDArray[np.int64] = _num_marks[num_strides]
    reaching = np.flatnonzero(num_strides)
    if not len(reaching):
        return num_marks, np.empty(0, np.uint32)
    text = b"".join(streams)
    begins = (np.cumsum(lengths) - lengths)[reaching]
    num_strides = num_strides[reaching]
    firsts = np.cumsum(num_strides) - num_strides
    depth = np.arange(num_strides.sum()) - np.repeat(firsts, num_strides)
    # Each place of the text as a stride that begins there: a view.
    everywhere = np.ndarray(len(text) - STRIDE_BYTES + 1, f"V{STRIDE_BYTES}", text, strides=(1,))
    strides: npt.NDArray[Any] = everywhere[np.repeat(begins, num_strides) + depth * STRIDE_BYTES]
    words = strides.view("<u4").reshape(-1, _WORDS).astype(np.uint64)
    sums = np.cumsum(((words @ _word_keys) >> _HALF) * _stride_keys[depth])
    before = np.zeros(len(firsts), np.uint64)
    before[1:] = sums[firsts[1:] - 1]
    before -= np.asarray(heads, np.uint64)[reaching]
    marks = (sums - np.repeat(before, num_strides)) >> _HALF
    return num_marks, marks[_is_mark[depth]].astype(np.uint32)


def fingerprints(head: bytes, stream: bytes) -> npt.NDArray[np.uint32]:
    """Those of one prompt."""
    return fingerprints_of([head_of(head)], [stream])[1]
