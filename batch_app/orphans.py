"""Orphans: bytes that no row of the store speaks of any more, or not yet.

A crash between putting a file into its place and telling the store, or between marking it as
deleted and removing it, leaves such. They are removed at the API server's start, once they are old
enough that nobody can still be on the way to the store with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from batch_app.errors import NotFound
from batch_app.files import DataDir, remove_tree
from batch_app.store import Store

OLD_ENOUGH_S = 3600.0


def remove_orphans(data: DataDir, store: Store, older_than_s: float = OLD_ENOUGH_S) -> int:
    """Remove what belongs to nothing. Returns how many. Raises StoreUnavailable, OSError."""
    orphans = [
        *_old(data.batches / "input", older_than_s, lambda path: _is_file(store, path.stem)),
        *_old(data.batches / "output", older_than_s, lambda path: _is_published(store, path)),
        *_old(data.batches / "active", older_than_s, lambda path: _is_active(store, path.name)),
    ]
    for path in orphans:
        remove_tree(path)
    return len(orphans)


def _old(folder: Path, older_than_s: float, is_known: Callable[[Path], bool]) -> Iterator[Path]:
    for path in folder.iterdir():
        try:
            if time.time() - path.stat().st_mtime >= older_than_s and not is_known(path):
                yield path
        except FileNotFoundError:
            continue


def _is_file(store: Store, file_id: str) -> bool:
    try:
        store.get_file(file_id)
    except NotFound:
        return False
    return True


def _is_published(store: Store, path: Path) -> bool:
    """`FILE.jsonl`, or `BATCH.EPOCH.jsonl` with all lines of a batch."""
    batch_id, _, epoch = path.stem.partition(".")
    if not epoch:
        # Of a batch that is being published at the moment there is no row yet; but that is young.
        return _is_file(store, batch_id)
    try:
        batch = store.get_batch(batch_id)
    except NotFound:
        return False
    return not batch.is_terminal or str(batch.epoch) == epoch


def _is_active(store: Store, batch_id: str) -> bool:
    try:
        return not store.get_batch(batch_id).is_terminal
    except NotFound:
        return False
