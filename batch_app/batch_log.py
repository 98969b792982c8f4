"""The log of one batch, for a person to read: what happened to it, and when.

One line an event, `2025-10-28 10:00:00Z  message`. Never a prompt or an answer. The API server and
the worker both append; each line is one `write` on a descriptor opened with O_APPEND, so lines of
two processes never mix.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from batch_app.core import utc_now

logger = logging.getLogger(__name__)

#: A custom_id may hold anything. Control characters could forge lines or drive a terminal, and
#: bidirectional marks could make a line read as another.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with every control character spelled out, `\x1b` or `\u202e`."""
    return _UNPRINTABLE.sub(_spell_out, text)


def _spell_out(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def pace_text(finished_per_s: float, written_per_s: float, prompt_tokens: int | None = None) -> str:
    """Tokens a second of the requests that were finished; where there were none, of the answers
    that the engine is writing: long ones are no standstill.

    `prompt_tokens`: read since the engine started, where it has written nothing since then; else
    None.
    """
    if not finished_per_s and written_per_s > 0:
        return f"none finished, {written_per_s:,.0f} tokens/s being written."
    if not finished_per_s and prompt_tokens is not None:
        return f"reading prompts ({prompt_tokens:,} prompt tokens so far)."
    return f"{finished_per_s:,.0f} tokens/s."


def truncated_text(num: int) -> str:
    """`12 cut off at max_tokens`: of answers whose finish reason is `length`."""
    return f"{num:,} cut off at max_tokens"


def failed_and_truncated(failed: int, truncated: int) -> str:
    """`, 2 failed, 12 cut off at max_tokens`: to follow what is done; empty where both are 0."""
    text = f", {failed:,} failed" if failed else ""
    return text + (f", {truncated_text(truncated)}" if truncated else "")


class BatchLog:
    """Appends to one batch's log. The file appears with the first line."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.path = path
        self._clock = clock

    def write(self, message: str) -> None:
        """Append one line. Never raises: a batch must not fail because its log can't be written."""
        stamp = self._clock().astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        line = f"{stamp}  {printable(message)}\n".encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("The log %s can't be written: %s", self.path.name, error.strerror)
