"""Batches for the loaded model go first, within a bound: a load costs minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.site import Site, echo_line
from support.waiting import wait_for


@pytest.fixture
def start_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def start(**settings: float) -> Site:
        sites.append(Site(tmp_path, poll_interval_s=0.2, commit_interval_s=0.05, **settings))
        return sites[-1]

    yield start
    for site in sites:
        site.close()


@pytest.mark.parametrize(
    ("bound_s", "order", "loads"),
    [(600.0, [0, 2, 1, 3], 2), (0.0, [0, 1, 2, 3], 4)],
    ids=["within the bound", "without one"],
)
def test_alternating_models_cost_two_loads(
    start_site: Callable[..., Site], bound_s: float, order: list[int], loads: int
) -> None:
    site = start_site(max_passed_over_s=bound_s)
    models = ["sim", "tiny-context", "sim", "tiny-context"]
    ids = [site.submit([echo_line(0)], model) for model in models]
    site.start_worker()
    started = [site.wait_until_done(batch_id).started_at for batch_id in ids]
    assert sorted(range(4), key=lambda number: started[number] or 0) == order
    assert sum(site.log(batch_id).count("Loading") for batch_id in ids) == loads


def test_the_next_models_weights_are_read_while_this_one_runs(
    start_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = start_site()
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(bytes(1000))
    with site.settings.models.open("a") as registry:
        registry.write(f'[[model]]\nname = "next"\nsource = "{weights}"\nengine = "sim"\n')
    site.hold.touch()
    first = site.submit((echo_line(n) for n in range(800)), "held")
    second = site.submit([echo_line(0)], "next")
    site.start_worker()
    wait_for(lambda: "Reading the weights" in site.log(first), what="they are read ahead")
    site.hold.unlink()
    for batch_id in (first, second):
        site.wait_until_done(batch_id)
    assert site.log(first).count("Reading the weights of next ahead") == 1
    assert "Reading" not in site.log(second)
