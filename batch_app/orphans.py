"""Orphans: bytes that no row of the store speaks of any more, or not yet.

A crash between putting a file into its place and telling the store, or between marking it as
deleted and removing it, leaves such. What the store calls deleted or ended goes at once; what it
has never heard of goes once it is so old that nobody can still be on the way to the store with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path

from batch_app.core import Batch
from batch_app.files import DataDir, remove_tree
from batch_app.store import Store

OLD_ENOUGH_S = 3600.0
#: Names asked for in one query.
AT_ONCE = 500

#: Of each path that the store knows: whether it has to stay.
Verdicts = Mapping[Path, bool]


def remove_orphans(
    data: DataDir,
    store: Store,
    *,
    older_than_s: float = OLD_ENOUGH_S,
    logs_ended_before: datetime | None = None,
) -> int:
    """Remove what belongs to nothing. Returns how many. Raises StoreUnavailable, OSError.

    `logs_ended_before`: also the logs of batches that ended before then.
    """
    if store.is_empty():
        return 0  # a new store beside old files: rather lost than meant to be
    num_removed = 0
    for folder, judge in judges(store, logs_ended_before).items():
        entries = (data.batches / folder).iterdir()
        while paths := list(islice(entries, AT_ONCE)):
            verdicts = judge(paths)
            for path in paths:
                stays = verdicts.get(path)
                if stays is False or (stays is None and _is_old(path, older_than_s)):
                    remove_tree(path)
                    num_removed += 1
    return num_removed


def judges(
    store: Store, logs_ended_before: datetime | None
) -> dict[str, Callable[[Sequence[Path]], Verdicts]]:
    """By folder under `batches/`: who says which of its files have to stay. Only their names are
    looked at."""
    return {
        "input": lambda paths: _inputs(store, paths),
        "output": lambda paths: _outputs(store, paths),
        "active": lambda paths: _work_dirs(store, paths),
        "uploads": lambda paths: _parts(store, paths),
        "logs": lambda paths: _logs(store, paths, logs_ended_before),
    }


def _is_old(path: Path, older_than_s: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= older_than_s
    except FileNotFoundError:
        return False


def _inputs(store: Store, paths: Sequence[Path]) -> Verdicts:
    live = store.which_files_live([path.stem for path in paths])
    return {path: live[path.stem] for path in paths if path.stem in live}


def _outputs(store: Store, paths: Sequence[Path]) -> Verdicts:
    """`FILE.jsonl`, or `BATCH.EPOCH.jsonl` with all lines of a batch."""
    known = store.known_batches(sorted({_batch_id(path) for path in paths}))
    file_ids = [path.stem for path in paths]
    for batch in known.values():
        file_ids += _published(batch)
    live = store.which_files_live(file_ids)
    # Of a batch that is being published at the moment there are no files yet; but those are young.
    verdicts = {path: live[path.stem] for path in paths if path.stem in live}
    for path in paths:
        batch_of_path = known.get(_batch_id(path))
        if batch_of_path is not None:
            verdicts[path] = not batch_of_path.is_terminal or (
                path.stem == f"{batch_of_path.id}.{batch_of_path.epoch}"
                and all(live.get(file_id, True) for file_id in _published(batch_of_path))
            )
    return verdicts


def _batch_id(path: Path) -> str:
    return path.stem.partition(".")[0]


def _published(batch: Batch) -> Iterator[str]:
    return filter(None, (batch.output_file_id, batch.error_file_id))


def _work_dirs(store: Store, paths: Sequence[Path]) -> Verdicts:
    known = store.known_batches([path.name for path in paths])
    return {path: not known[path.name].is_terminal for path in paths if path.name in known}


def _parts(store: Store, paths: Sequence[Path]) -> Verdicts:
    live = store.which_uploads_live([path.name for path in paths])
    return {path: live[path.name] for path in paths if path.name in live}


def _logs(store: Store, paths: Sequence[Path], ended_before: datetime | None) -> Verdicts:
    known = store.known_batches([path.stem for path in paths])

    def stays(batch: Batch) -> bool:
        ended_at = batch.ended_at
        return ended_before is None or ended_at is None or ended_at >= ended_before

    return {path: stays(known[path.stem]) for path in paths if path.stem in known}
