"""The data folder as a cache of the object storage: what was used longest ago goes first."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from batch_app.files import DataDir

#: What was used since may be about to be opened.
IN_USE_S = 600.0


def evict(data: DataDir, limit_bytes: int, *, in_use_s: float = IN_USE_S) -> int:
    """Remove copies until the inputs and published files here have no more bytes than this (0: as
    many as they like). Returns how many files went.

    Only what the store has, of the same length, is removed: the rest is all there is. Who has a
    file open keeps it. Raises ObjectsUnavailable.
    """
    if data.objects is None or not limit_bytes:
        return 0
    copies: dict[tuple[int, int], list[Path]] = defaultdict(list)  # of one file under two names
    known: dict[tuple[int, int], os.stat_result] = {}
    for folder in ("input", "output"):
        for path in (data.batches / folder).iterdir():
            with suppress(FileNotFoundError):
                found = path.stat()
                if not path.name.startswith("."):
                    copies[found.st_dev, found.st_ino].append(path)
                    known[found.st_dev, found.st_ino] = found
    total = sum(found.st_size for found in known.values())
    num_removed = 0
    for key in sorted(known, key=lambda key: known[key].st_mtime):
        if total <= limit_bytes or time.time() - known[key].st_mtime < in_use_s:
            break
        if any(_is_stored(data, path, known[key].st_size) for path in copies[key]):
            for path in copies[key]:
                path.unlink(missing_ok=True)
                num_removed += 1
            total -= known[key].st_size
    return num_removed


def _is_stored(data: DataDir, path: Path, size_bytes: int) -> bool:
    assert data.objects is not None
    with suppress(FileNotFoundError):
        return data.objects.size(f"{path.parent.name}/{path.name}") == size_bytes
    return False
