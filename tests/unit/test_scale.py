"""The model of many replicas: it meets what was measured at one, loses no request, and follows its
costs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.scale import markdown
from benchmarks.scale.__main__ import REPORT, build
from benchmarks.scale.model import GUIDE, Site, day

DATABASE = "PostgreSQL, processor"


def test_one_replica_does_what_was_measured_of_it() -> None:
    measured = json.loads(GUIDE.read_text())["results"]["throughput_requests_per_s"]
    assert Site().throughput(1) == pytest.approx(measured)


def test_more_replicas_never_do_less_and_stop_at_the_first_limit() -> None:
    site = Site()
    rates = [site.throughput(replicas) for replicas in (1, 10, 100, 1000, 10_000)]
    assert rates == sorted(rates)
    first = min(site.limits().values())
    assert rates[-1] == pytest.approx(first * site.throughput(1))
    assert max(site.loads(first).values()) == pytest.approx(1.0)


def test_a_slower_database_breaks_earlier() -> None:
    site = Site()
    slower = replace(site, slower_database=3.0)
    assert slower.limits()[DATABASE] < 0.6 * site.limits()[DATABASE]
    others = [name for name in site.limits() if name != DATABASE]
    assert all(slower.limits()[name] == site.limits()[name] for name in others)


def test_progress_told_less_often_moves_the_limit_up() -> None:
    assert replace(Site(), tell_every_s=5.0).limits()[DATABASE] > 2 * Site().limits()[DATABASE]


@pytest.mark.parametrize("load", [0.5, 2.0])
def test_a_day_loses_no_request_and_is_the_same_again(load: float) -> None:
    site = Site(requests_per_batch=5000)
    one = day(site, 100, load, seed=3)
    assert one.arrived == one.finished + one.running + one.waiting > 0
    assert one.finished <= site.throughput(100) * 86_400
    assert (one.waiting > 0.3 * one.arrived) == (load > 1)
    assert day(site, 100, load, seed=3) == one


def test_the_report_and_the_page_are_what_the_model_says() -> None:
    report = json.loads(REPORT.read_text())
    site = Site(**report["site"])
    made = json.loads(json.dumps(build(site, report["prices"])).replace("Infinity", "null"))
    assert made == report, "run python -m benchmarks.scale"
    page = markdown.PAGE.read_text(encoding="utf-8")
    assert markdown.page_with(markdown.render(), page) == page, "run …scale.markdown"
