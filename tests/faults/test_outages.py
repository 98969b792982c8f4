"""What batches depend on is away for a while: all complete. `python -m faults.outages` takes 60 s
for each outage."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.outages import CannotMount, Outages

pytestmark = pytest.mark.long


def test_ten_batches_outlive_every_outage(tmp_path: Path) -> None:
    try:
        report = Outages(tmp_path, seconds=3.0).run()
    except CannotMount as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    assert {"hub", "remote_server"} <= report.num_pauses.keys()
    assert "registry: The model registry" in report.health["registry"]
    assert "remote_server" in report.health["remote server"]
    assert "hub" in report.health["hub"]
    assert "disk: " in report.health["full disk"]
