"""Checks the lines of a large file in several processes, while it is still on its way.

The interpreter runs one thread at a time: in the server's own process the check would take its turn
with receiving the file, and with every other call. So a file that has grown past `FROM_BYTES` is
cut into blocks of whole lines, and child processes (`batch_app.checker`) read these from the disk.
What they find is taken in the order of the file.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import msgspec
import numpy as np

from batch_app.checker import BLOCK, LENGTH, Checked, Order
from batch_app.core import LineError
from batch_app.index import DTYPE
from batch_app.line_check import Found, IntakeRules

logger = logging.getLogger(__name__)

#: Smaller files are checked sooner than processes have started.
FROM_BYTES = 8 << 20
BLOCK_BYTES = 4 << 20
#: So many blocks may wait for a process; with more of them, the file has to wait.
MAX_WAITING = 16
#: Children of one file, on a machine with cores enough: receiving it is no faster.
MAX_CHILDREN = 4
_SEARCH_BYTES = 64 << 10


class CheckersLost(Exception):
    """A checking process ended before its time. The whole file has to be checked again."""


class CheckerPlaces:
    """How many checking processes there may be at a time, for all files together."""

    def __init__(self, number: int) -> None:
        self._lock = threading.Lock()
        self._free = number

    def take(self) -> int:
        """As many as one file should have, of those that are free; 0: none, since one alone would
        gain little."""
        with self._lock:
            taken = min(self._free, MAX_CHILDREN)
            if taken < 2:
                return 0
            self._free -= taken
            return taken

    def give_back(self, number: int) -> None:
        with self._lock:
            self._free += number


class Block(NamedTuple):
    number: int
    start: int
    end: int


class Checkers:
    """The check of one file by `num_children` processes. Everything but the children's answers is
    in the caller's thread.

    `model_number`, `endpoint_number`, `on_found` and `on_error` as for `line_check.LineCheck`.
    """

    def __init__(
        self,
        path: Path,
        rules: IntakeRules,
        num_children: int,
        *,
        model_number: Callable[[str], int],
        endpoint_number: Callable[[str], int],
        on_found: Callable[[Found], None],
        on_error: Callable[[LineError], None],
        on_more_errors: Callable[[int], None],
    ) -> None:
        """Raises OSError. `on_more_errors`: how many there are besides those that were told."""
        self._model_number = model_number
        self._endpoint_number = endpoint_number
        self._on_found = on_found
        self._on_error = on_error
        self._on_more_errors = on_more_errors
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._begun = 0  # where the next block begins
        self._searched = 0  # from where its end is to be looked for
        self._next = 0  # number of the next block
        self._taken = 0  # number of the next block to be taken in
        self._lines = 0  # in the blocks that were taken in
        self._is_other_text = False
        self._blocks: SimpleQueue[Block | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._ready: dict[int, Checked] = {}
        self._is_lost = False
        order = msgspec.json.encode(Order.of(str(path), rules)) + b"\n"
        # Records hold hashes, which Python keys anew in each process; those of one file must agree.
        seed = str(secrets.randbelow(2**32))
        self._children: list[_Child] = []
        try:
            for _ in range(num_children):
                child = _Child(order, seed, self._blocks, self._answered)
                self._children.append(child)
        except OSError:
            self.close()
            raise

    def grown(self, size_bytes: int) -> None:
        """The file has so many bytes by now. Waits where the processes are far behind.

        Raises CheckersLost, OSError and what the callbacks raise.
        """
        while self._begun + BLOCK_BYTES < size_bytes:
            end = self._line_end(self._begun + BLOCK_BYTES, size_bytes)
            if end is None:
                break
            self._ask(end)
        self._take_in(MAX_WAITING)

    def end(self, size_bytes: int) -> None:
        """The file is complete. Returns when all of it is checked. Raises as `grown`."""
        self.grown(size_bytes)
        if self._begun < size_bytes:
            self._ask(size_bytes)
        self._take_in(0)

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.kill()
            self._blocks.put(None)
        for child in self._children:
            child.join()
        self._children.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _line_end(self, start: int, size_bytes: int) -> int | None:
        """Behind the first line end at `start` or later; None: it isn't here yet."""
        place = max(start, self._searched)
        while place < size_bytes:
            piece = os.pread(self._descriptor, min(_SEARCH_BYTES, size_bytes - place), place)
            found = piece.find(b"\n")
            if found >= 0:
                return place + found + 1
            if not piece:
                break
            place += len(piece)
        self._searched = place
        return None

    def _ask(self, end: int) -> None:
        self._blocks.put(Block(self._next, self._begun, end))
        self._next += 1
        self._begun = end

    def _answered(self, block: Block, answer: Checked | None) -> None:
        """Called in a child's thread. None: the child is gone."""
        with self._changed:
            if answer is None:
                self._is_lost = True
            else:
                self._ready[block.number] = answer
            self._changed.notify_all()

    def _take_in(self, most_waiting: int) -> None:
        """What is ready, in its order, and more until at most so many blocks wait."""
        while True:
            with self._changed:
                while (
                    self._next - self._taken > most_waiting
                    and self._taken not in self._ready
                    and not self._is_lost
                ):
                    self._changed.wait()
                if self._is_lost:
                    raise CheckersLost
                answer = self._ready.pop(self._taken, None)
            if answer is None:
                return
            self._taken += 1
            self._hand_on(answer)

    def _hand_on(self, answer: Checked) -> None:
        if self._is_other_text:
            return
        self._is_other_text = answer.is_other_text
        for error in answer.errors:
            self._on_error(replace(error, line=self._lines + (error.line or 0)))
        if answer.num_errors > len(answer.errors):
            self._on_more_errors(answer.num_errors - len(answer.errors))
        if answer.records:
            records = np.frombuffer(answer.records, DTYPE).copy()
            records["line"] += self._lines
            models = np.array([self._model_number(name) for name in answer.models])
            records["model"] = models[records["model"]]
            endpoints = np.array([self._endpoint_number(name) for name in answer.endpoints])
            records["endpoint"] = endpoints[records["endpoint"]]
            marks = np.frombuffer(answer.marks, "<u4")
            self._on_found(Found(records, marks, np.frombuffer(answer.id_hashes, np.int64)))
        self._lines += answer.num_lines


class _Child:
    """One checking process, and the thread that waits for it."""

    def __init__(
        self,
        order: bytes,
        seed: str,
        blocks: SimpleQueue[Block | None],
        answered: Callable[[Block, Checked | None], None],
    ) -> None:
        """Raises OSError."""
        self._order = order
        self._blocks = blocks
        self._answered = answered
        self._process = subprocess.Popen(
            [sys.executable, "-m", "batch_app.checker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a traceback could quote a prompt
            env=_environment(seed),
            bufsize=0,
        )
        self._thread = threading.Thread(target=self._work, name="checker", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        self._thread.join()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _work(self) -> None:
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        is_first = True
        while (block := self._blocks.get()) is not None:
            try:
                if is_first:
                    asked.write(self._order)
                    is_first = False
                asked.write(BLOCK.pack(block.start, block.end))
                (length,) = LENGTH.unpack(_exactly(answers.fileno(), LENGTH.size))
                answer = msgspec.msgpack.decode(_exactly(answers.fileno(), length), type=Checked)
            except (OSError, EOFError, msgspec.MsgspecError) as error:
                logger.warning("A checking process ended early: %s", type(error).__name__)
                self._answered(block, None)
                return
            self._answered(block, answer)


def _exactly(descriptor: int, length: int) -> bytearray:
    """Raises EOFError."""
    buffer = bytearray(length)
    rest = memoryview(buffer)
    while rest:
        got = os.readv(descriptor, [rest])
        if not got:
            raise EOFError
        rest = rest[got:]
    return buffer


def _environment(seed: str) -> dict[str, str]:
    """Nothing that could be a secret."""
    kept = {"PATH", "HOME", "LANG", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
    given = {name: value for name, value in os.environ.items() if name in kept}
    return given | {"PYTHONHASHSEED": seed}
