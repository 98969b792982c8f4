"""The sweep of the object storage: objects that no row of the database speaks of any more, or not
yet. The same as `batch_app.orphans` does on the disk, by listing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path, PurePosixPath

from batch_app.files import DataDir
from batch_app.objects import Objects
from batch_app.orphans import AT_ONCE, OLD_ENOUGH_S, Verdicts, judges
from batch_app.store import Store

logger = logging.getLogger(__name__)

#: The object that says whose the others are: the id of the first file that its database ever knew.
SITE = "site"


def remove_orphan_objects(
    data: DataDir,
    store: Store,
    *,
    older_than_s: float = OLD_ENOUGH_S,
    logs_ended_before: datetime | None = None,
) -> int:
    """Remove what belongs to nothing. Returns how many.

    Nothing is removed where the objects may be another database's: under a URL that two sites
    share, or with a new database beside old objects. `logs_ended_before`: also the logs of batches
    that ended before then. Raises StoreUnavailable, ObjectsUnavailable, StorageFull.
    """
    before = datetime.now(UTC) - timedelta(seconds=older_than_s)
    if data.objects is None or not _are_ours(data.objects, store, before):
        return 0
    judge = judges(store, logs_ended_before)
    areas = {
        "input": judge["input"],
        "output": judge["output"],
        "index": judge["active"],
        "results": judge["active"],
        "logs": judge["logs"],
        "uploads": judge["uploads"],
    }
    return sum(_sweep(data.objects, area, judge, before) for area, judge in areas.items())


def _are_ours(objects: Objects, store: Store, before: datetime) -> bool:
    first = store.first_file()
    if first is None or first.created_at > before:
        return False  # which one is the first may not be settled yet
    try:
        owner = objects.get(SITE).decode(errors="replace")
    except FileNotFoundError:
        objects.put(SITE, first.id.encode())
        return False  # another site may do so just now: the next sweep sees who it was
    if owner != first.id:
        logger.error(
            "The objects in %s belong to another database: give each site a prefix of its own. "
            "Nothing is swept.",
            objects.shown_url,
        )
    return owner == first.id


def _sweep(
    objects: Objects,
    area: str,
    judge: Callable[[Sequence[Path]], Verdicts],
    before: datetime,
) -> int:
    num_removed = 0
    found = objects.list(area)
    while some := list(islice(found, AT_ONCE)):
        places = {one.name: _as_on_disk(area, one.name) for one in some}
        verdicts = judge(list(set(places.values())))
        names = [
            one.name
            for one in some
            if (stays := verdicts.get(places[one.name])) is False
            or (stays is None and one.modified_at < before)
        ]
        objects.delete(names)
        num_removed += len(names)
    return num_removed


def _as_on_disk(area: str, name: str) -> Path:
    """What a file of the same would be called under the data folder."""
    first = PurePosixPath(name).parts[1]
    if area == "index":
        first = first.removesuffix(".tar")
    return Path(f"{first}.log" if area == "logs" else first)
