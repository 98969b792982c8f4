"""Charts as SVG, made by pygal. Each is a resource of its own that a page shows by <img>, so that
the style within needs no hole in the page's policy. Every chart also says itself in words."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import pygal
from pygal.etree import etree
from pygal.style import Style

from batch_app.benchmarks import BenchmarkRecord
from batch_app.core import Batch, Sample
from batch_app.dashboard.formats import count, duration, plural, span
from batch_app.estimates import run_time_s

MAX_POINTS = 60
MAX_RUNS = 200
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Theme(StrEnum):
    LIGHT = "light"
    DARK = "dark"


class Width(StrEnum):
    """A picture shrinks with its page, and its letters with it: on a phone it is another one."""

    WIDE = "wide"
    NARROW = "narrow"


@dataclass(frozen=True, slots=True)
class Look:
    theme: Theme = Theme.LIGHT
    width: Width = Width.WIDE


@dataclass(frozen=True, slots=True)
class Pace:
    """Tokens a second over time. `points`: seconds since the start, and the speed since the point
    before."""

    points: tuple[tuple[float, float], ...]

    @property
    def text(self) -> str:
        """The chart in words."""
        if not self.points:
            return "No throughput yet."
        speeds = [speed for _, speed in self.points]
        over = duration(self.points[-1][0])
        return (
            f"Throughput over {over}: {count(min(speeds))} to {count(max(speeds))} tokens per "
            f"second, {count(speeds[-1])} at last."
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: what was predicted for it, and what it took. Seconds."""

    predicted_s: float
    actual_s: float
    at: datetime
    num_requests: int
    was_recorded: bool

    @property
    def error(self) -> float:
        """+0.1: it took 10% longer than predicted."""
        return self.actual_s / self.predicted_s - 1


def pace_of(batch: Batch, samples: Sequence[Sample]) -> Pace:
    """From a batch's series, in at most `MAX_POINTS` pieces of equal length."""
    if batch.started_at is None:
        return Pace(())
    marks = [(batch.started_at, 0)] + [(one.at, one.total_tokens) for one in samples]
    ended_at = batch.finalizing_at or batch.ended_at  # writing the files is no throughput
    if ended_at is not None and samples:
        marks = [mark for mark in marks if mark[0] < ended_at]
        marks.append((ended_at, batch.progress.tokens.total_tokens))
    times = [(at - batch.started_at).total_seconds() for at, _ in marks]
    tokens = [one for _, one in marks]
    whole_s = times[-1]
    if len(marks) < 3 or whole_s <= 0 or not any(tokens):
        return Pace(())
    num = min(MAX_POINTS, len(marks) - 1)
    points, before, at = [], 0.0, 0
    for number in range(1, num + 1):
        end_s = whole_s * number / num
        while at + 1 < len(times) - 1 and times[at + 1] < end_s:
            at += 1
        span = times[at + 1] - times[at]
        share = 1.0 if span <= 0 else min(max((end_s - times[at]) / span, 0.0), 1.0)
        now = tokens[at] + share * (tokens[at + 1] - tokens[at])
        points.append((end_s, max((now - before) / (whole_s / num), 0.0)))
        before = now
    return Pace(tuple(points))


def runs_of(records: Sequence[BenchmarkRecord]) -> list[Run]:
    """Finished runs of one model with what was predicted for each, oldest first.

    Where a record doesn't hold the prediction, it is what the newest representative record of then
    would have said.
    """
    runs: list[Run] = []
    basis: BenchmarkRecord | None = None
    for record in reversed(records):
        results = record.results
        actual_s = results.total_time_s
        predicted_s = 0.0
        recorded = record.prediction
        if recorded is not None:
            predicted_s = recorded.predicted_s
        elif basis is not None:
            loads = results.model_load_time_s > 0
            predicted_s = run_time_s(results.num_requests, basis, loads_model=loads)
        if predicted_s > 0 and actual_s > 0 and results.success_count:
            runs.append(
                Run(
                    predicted_s,
                    actual_s,
                    record.timestamp,
                    results.num_requests,
                    recorded is not None,
                )
            )
        if record.is_representative and results.throughput_requests_per_s > 0:
            basis = record
    return runs[-MAX_RUNS:]


def accuracy_text(runs: Sequence[Run]) -> str:
    """The plot of predictions in words."""
    if not runs:
        return "No run to compare with a prediction yet."
    errors = sorted(abs(run.error) for run in runs)
    if len(runs) == 1:
        return f"One run so far: its prediction was off by {100 * errors[0]:.0f}%."
    middle = errors[len(errors) // 2]
    return (
        f"Predicted against actual time of {plural(len(runs), 'run')}: half of them were within "
        f"{100 * middle:.0f}% of the prediction, the worst was off by {100 * errors[-1]:.0f}%."
    )


# -- drawing ---------------------------------------------------------------------------------------

# pygal hooks itself into every later import of the process, for plugins that aren't used here, in a
# way that Python 3.12 no longer knows and 3.11 warns of.
sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != pygal.__name__]

_COLOURS = {
    Theme.LIGHT: {"text": "#4b5563", "line": "#d7dbe2", "accent": "#2557d6"},
    Theme.DARK: {"text": "#a9b2c0", "line": "#343b47", "accent": "#7ea6ff"},
}


def _style(look: Look, colours: Sequence[str]) -> Style:
    of = _COLOURS[look.theme]
    letters = 13
    return Style(
        background="transparent",
        plot_background="transparent",
        foreground=of["text"],
        foreground_strong=of["text"],  # of every second mark on an axis
        foreground_subtle=of["line"],
        guide_stroke_color=of["line"],
        major_guide_stroke_color=of["line"],
        guide_stroke_dasharray="",
        major_guide_stroke_dasharray="",
        opacity=".14",
        opacity_hover=".14",
        stroke_opacity="1",
        stroke_width="2",
        transition="0s",
        colors=tuple(colours),
        font_family=FONT,
        label_font_size=letters,
        major_label_font_size=letters,
        title_font_size=letters,
        legend_font_size=letters,
        no_data_font_size=letters + 2,
    )


def _options(look: Look) -> dict[str, Any]:
    wide = look.width is Width.WIDE
    return {
        "js": (),  # it would be loaded from another site
        "disable_xml_declaration": True,
        "width": 900 if wide else 380,
        "height": 240 if wide else 230,
        "margin": 6,
        "margin_right": 22,
        "show_legend": False,
        "include_x_axis": True,
        "x_title": None,
        "no_data_text": "",
        "pretty_print": False,
    }


def _ticks(largest: float, num: int) -> list[float]:
    """Round numbers from 0 to beyond the largest, about so many."""
    if largest <= 0:
        return [0.0, 1.0]
    raw = largest / num
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [step * number for number in range(math.ceil(largest / step) + 1)]


_SPANS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
_LONG_SPANS = (7200, 10800, 21600, 43200, 86400)


def _time_ticks(whole_s: float, num: int) -> list[float]:
    step = next((one for one in (*_SPANS, *_LONG_SPANS) if whole_s / one <= num), None)
    if step is None:
        step = 86400 * math.ceil(whole_s / 86400 / num)
    return [float(step * number) for number in range(int(whole_s // step) + 1)]


def _svg(chart: Any) -> bytes:
    """The chart without the script that pygal leaves in it for its tooltips."""
    root = chart.render_tree()
    for parent in root.iter():
        for child in list(parent):
            if str(child.tag).rpartition("}")[2] == "script":
                parent.remove(child)
    rendered: bytes = etree.tostring(root)
    return rendered


def draw_pace(pace: Pace, look: Look) -> bytes:
    """Tokens a second over time."""
    wide = look.width is Width.WIDE
    chart = pygal.XY(
        style=_style(look, [_COLOURS[look.theme]["accent"]] * 2),
        css=(*pygal.Config.css.value, "inline:.serie-0 path { stroke: none !important }"),
        show_dots=False,
        show_x_guides=False,
        x_value_formatter=span,
        value_formatter=count,
        **_options(look),
    )
    if pace.points:
        whole_s = pace.points[-1][0]
        ticks = _ticks(max(speed for _, speed in pace.points), 4)
        chart.y_labels = ticks
        chart.range = (0, ticks[-1])
        chart.xrange = (0, whole_s)
        chart.x_labels = _time_ticks(whole_s, 8 if wide else 4)
        first_s, first = pace.points[0]
        points = [(0.0, first), *pace.points] if first_s else list(pace.points)
        # An area without an outline: its sides would look as if the speed fell to nothing.
        chart.add("area", points, fill=True)
        chart.add("tokens/s", points)
    return _svg(chart)


def draw_accuracy(runs: Sequence[Run], look: Look) -> bytes:
    """Predicted against actual; on the line they are equal."""
    of = _COLOURS[look.theme]
    wide = look.width is Width.WIDE
    chart = pygal.XY(
        style=_style(look, [of["text"], of["accent"]]),
        stroke=False,
        dots_size=4,
        show_x_guides=True,
        x_value_formatter=span,
        value_formatter=span,
        **(_options(look) | {"height": 320 if wide else 300, "width": 640 if wide else 380}),
    )
    if runs:
        largest = max(max(run.predicted_s, run.actual_s) for run in runs)
        ticks = _ticks(largest, 4)
        chart.x_labels = ticks
        chart.y_labels = ticks
        chart.range = chart.xrange = (0, ticks[-1])
        chart.x_title = "predicted"
        chart.y_title = "actual"
        chart.add(
            "equal", [(0, 0), (ticks[-1], ticks[-1])], stroke=True, show_dots=False, fill=False
        )
        chart.add("runs", [(run.predicted_s, run.actual_s) for run in runs])
    return _svg(chart)
