"""What crashes leave in the data folder, and who removes it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_app.core import utc_now
from batch_app.files import IncomingFolder
from batch_app.orphans import remove_orphans
from support.site import Site, echo_line


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def make_old(path: Path, age_s: float = 7200.0) -> Path:
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_what_no_row_speaks_of_is_removed_and_nothing_else(site: Site) -> None:
    batch_id = site.submit([echo_line(0)], "sim")
    input_path = make_old(site.data.input_file(site.batch(batch_id).input_file_id))
    work_dir = make_old(site.data.work_dir(batch_id))
    gone = []
    for path in (
        site.data.input_file("file-" + "0" * 24),
        site.data.output_file("file-" + "1" * 24),
        site.data.batches / "output" / f"batch_{'2' * 24}.1.jsonl",
    ):
        path.write_bytes(b"x")
        gone.append(make_old(path))
    folder = site.data.work_dir("batch_" + "3" * 24)
    folder.mkdir()
    gone.append(make_old(folder))
    young = site.data.input_file("file-" + "4" * 24)
    young.write_bytes(b"x")

    assert remove_orphans(site.data, site.store) == len(gone)
    assert not any(path.exists() for path in gone)
    assert input_path.exists()
    assert work_dir.exists()
    assert young.exists()


def test_the_rest_of_an_ended_batch_is_removed(site: Site) -> None:
    batch_id = site.submit([echo_line(0)], "sim")
    work_dir = make_old(site.data.work_dir(batch_id))
    site.store.cancel_queued(batch_id, utc_now())
    assert remove_orphans(site.data, site.store) == 1
    assert not work_dir.exists()


def test_a_folder_in_use_is_not_swept_and_a_left_one_is(site: Site) -> None:
    with IncomingFolder(site.data) as in_use:
        left = site.data.incoming / "incoming_left"
        left.mkdir()
        (left / "input.jsonl").write_bytes(b"x")
        make_old(left)
        make_old(in_use)
        assert site.data.sweep_incoming() == 1
        assert in_use.exists()
        assert not left.exists()
    assert not in_use.exists()
