"""Checks blocks of a file's lines: `python -m batch_app.checker`, started by `batch_app.checkers`.

Reads an `Order` on standard input, then blocks (`BLOCK`: where each begins and ends in the file);
answers each with a `Checked`, behind its length. Ends with its input, so also with the process that
started it. Lines are read from the file and go nowhere else.
"""

from __future__ import annotations

import os
import struct
import sys

import msgspec
import numpy as np

from batch_app.core import LineError
from batch_app.line_check import PIECE_BYTES, Found, IntakeRules, LineCheck
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.shapes import BodyLimits

NICENESS = 5
#: First and last byte (that one excluded) of a block.
BLOCK = struct.Struct("<qq")
#: Bytes of what follows.
LENGTH = struct.Struct("<q")


class Known(msgspec.Struct):
    """What lines are asked about a model: a part of its entry in the registry."""

    name: str
    aliases: tuple[str, ...]
    chat_template_kwargs: tuple[str, ...]


class Order(msgspec.Struct):
    """The file and what its lines are held to: `IntakeRules` in parts that can be sent."""

    path: str
    registry: list[Known]
    model: str | None
    endpoint: str | None
    max_line_bytes: int
    max_errors: int
    limits: BodyLimits

    @classmethod
    def of(cls, path: str, rules: IntakeRules) -> Order:
        return cls(
            path,
            [
                Known(entry.name, entry.aliases, entry.chat_template_kwargs)
                for entry in rules.registry.entries
            ],
            rules.model,
            rules.endpoint,
            rules.max_line_bytes,
            rules.max_errors,
            rules.limits,
        )

    def rules(self) -> IntakeRules:
        entries = [
            ModelEntry(
                name=known.name,
                source=known.name,
                aliases=known.aliases,
                chat_template_kwargs=known.chat_template_kwargs,
            )
            for known in self.registry
        ]
        return IntakeRules(
            registry=ModelRegistry(entries),
            model=self.model,
            endpoint=self.endpoint,
            max_line_bytes=self.max_line_bytes,
            max_errors=self.max_errors,
            limits=self.limits,
        )


class Checked(msgspec.Struct):
    """What one block holds. Lines are counted from its begin.

    `records`, `marks`, `id_hashes`: those of `line_check.Found`, as bytes. `models` and `endpoints`
    say what the numbers in the records stand for. `errors`: the first `max_errors` and as many
    again, of `num_errors`.
    """

    num_lines: int
    records: bytes
    marks: bytes
    id_hashes: bytes
    models: list[str]
    endpoints: list[str]
    errors: list[LineError]
    num_errors: int
    is_other_text: bool


class Checker:
    """Checks the blocks of one file, one after the other."""

    def __init__(self, order: Order) -> None:
        self._descriptor = os.open(order.path, os.O_RDONLY | os.O_CLOEXEC)
        rules = order.rules()
        self._max_errors = 2 * rules.max_errors
        self._models: dict[str, int] = {}
        self._endpoints: dict[str, int] = {}
        self._found: list[Found] = []
        self._errors: list[LineError] = []
        self._num_errors = 0
        self._check = LineCheck(
            rules,
            model_number=lambda name: self._models.setdefault(name, len(self._models)),
            endpoint_number=lambda name: self._endpoints.setdefault(name, len(self._endpoints)),
            on_found=self._found.append,
            on_error=self._add_error,
        )

    def check(self, start: int, end: int) -> Checked:
        """The block of these bytes, which begins a line, and ends one or the file. Raises OSError.

        EOFError: the file is shorter than that.
        """
        self._found.clear()
        self._errors.clear()
        self._num_errors = 0
        self._check.begin_at(start)
        for place in range(start, end, PIECE_BYTES):
            wanted = min(PIECE_BYTES, end - place)
            piece = os.pread(self._descriptor, wanted, place)
            if len(piece) < wanted:
                raise EOFError
            self._check.feed(piece)
        self._check.end()
        found = self._found
        return Checked(
            num_lines=self._check.num_lines,
            records=b"".join(each.records.tobytes() for each in found),
            marks=b"".join(each.marks.astype("<u4", copy=False).tobytes() for each in found),
            id_hashes=b"".join(each.id_hashes.astype(np.int64).tobytes() for each in found),
            models=list(self._models),
            endpoints=list(self._endpoints),
            errors=list(self._errors),
            num_errors=self._num_errors,
            is_other_text=self._check.is_other_text,
        )

    def _add_error(self, error: LineError) -> None:
        self._num_errors += 1
        if len(self._errors) < self._max_errors:
            self._errors.append(error)


def main() -> int:
    os.nice(NICENESS)
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    checker = Checker(msgspec.json.decode(asked.readline(), type=Order))
    while block := asked.read(BLOCK.size):
        answer = msgspec.msgpack.encode(checker.check(*BLOCK.unpack(block)))
        answers.write(LENGTH.pack(len(answer)))
        answers.write(answer)
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
