"""`vllm-batch watch`: a batch on a live screen."""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import suppress
from datetime import datetime

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_app.cli.figures import duration, ending, pause_text, seconds_left, share
from batch_app.cli.options import Json
from batch_app.cli.remote import (
    SECTION,
    ApiKey,
    BatchOfInterest,
    Server,
    connected,
    of_interest,
    same_place,
)
from batch_app.cli.terminal import say, show_json
from batch_app.cli.waiting import outcome, wait_for
from batch_app.client import Batch, BatchClient
from batch_app.core import utc_now
from batch_app.errors import BatchAppError

app = typer.Typer()

PACE_OVER_S = 15.0
NUM_LOG_LINES = 4
#: Of a line of the log; the time of day is enough where it is watched.
_DAY = re.compile(r"^\d{4}-\d\d-\d\d ")


@app.command(rich_help_panel=SECTION)
def watch(
    batch: BatchOfInterest = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Watch a batch: progress, speed, time left, cache hits, log. Off a terminal, in lines."""
    with connected(server, api_key) as client:
        batch_id = batch or of_interest(client)
        again = f"vllm-batch watch {batch_id}{same_place(server)}"
        console = Console(stderr=True)
        if console.is_terminal and not as_json:
            ended = _on_screen(client, batch_id, console, again)
        else:
            ended = wait_for(client, batch_id, timeout_s=None, quiet=False, again=again)
            if as_json:
                show_json(ended.raw)
    raise typer.Exit(outcome(ended))


def _on_screen(client: BatchClient, batch_id: str, console: Console, again: str) -> Batch:
    screen = Screen(client)
    try:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            ended = client.wait(
                batch_id, on_progress=lambda seen: live.update(screen.of(seen)), poll_s=1.0
            )
    except KeyboardInterrupt:
        say(f"The batch goes on without you. Come back with: {again}")
        raise typer.Exit(130) from None
    console.print(screen.of(ended))
    say(ending(ended))
    return ended


class Screen:
    """What is shown of a batch. Remembers the last looks, for the pace."""

    def __init__(self, client: BatchClient) -> None:
        self._client = client
        self._looks: deque[tuple[float, int, int]] = deque()

    def of(self, batch: Batch) -> Group:
        self._remember(batch)
        progress = batch.progress
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="bold", no_wrap=True)
        rows.add_column(overflow="fold")
        for name, value in self._rows(batch):
            cut = {"no_wrap": True, "overflow": "ellipsis"} if name == "log" else {}
            rows.add_row(name, Text(value, **cut))  # type: ignore[arg-type]
        head = Text.assemble((batch.id, "bold"), f"  {batch.model}  ", (batch.status, "cyan"))
        bar = Table.grid(expand=True)  # ends the bar's line, which the bar itself does not
        bar.add_row(ProgressBar(total=progress.total or 1, completed=progress.done))
        return Group(head, bar, rows)

    def _remember(self, batch: Batch) -> None:
        now = time.monotonic()
        tokens = batch.usage.total_tokens if batch.usage else 0
        self._looks.append((now, batch.progress.done, tokens))
        while len(self._looks) > 2 and now - self._looks[0][0] > PACE_OVER_S:
            self._looks.popleft()

    def _rows(self, batch: Batch) -> list[tuple[str, str]]:
        rows = [("progress", share(batch))]
        speed = self._speed(batch)
        if speed:
            rows.append(("speed", speed))
        left = _left(batch, utc_now())
        if left:
            rows.append(("time left", left))
        cache = _cache(batch)
        if cache:
            rows.append(("cache", cache))
        if batch.pause_reason:
            rows.append(("paused", pause_text(batch)))
        elif batch.status == "pending":
            rows.append(("waiting", self._place(batch)))
        if not batch.is_finished:
            with suppress(BatchAppError):  # a server that is away for a moment ends nothing
                log = self._client.logs(batch, tail=NUM_LOG_LINES)
                rows.append(("log", "\n".join(_DAY.sub("", line) for line in log)))
        return rows

    def _speed(self, batch: Batch) -> str:
        first, last = self._looks[0], self._looks[-1]
        parts = []
        passed_s = last[0] - first[0]
        if batch.status == "running" and passed_s > 1 and last[1] > first[1]:
            requests, tokens = last[1] - first[1], last[2] - first[2]
            parts.append(
                f"{tokens / passed_s:,.0f} tokens/s, {requests / passed_s:,.1f} requests/s"
            )
        end = batch.ended_at or utc_now()
        if batch.started_at and batch.usage:
            took_s = max((end - batch.started_at).total_seconds(), 0.001)
            parts.append(f"{batch.usage.total_tokens / took_s:,.0f} tokens/s on average")
        return "; ".join(parts)

    def _place(self, batch: Batch) -> str:
        running = sum(1 for _ in self._client.list("running", limit=100))
        before = sum(
            1
            for one in self._client.list("pending", limit=100)
            if one.created_at < batch.created_at
        )
        if not running and not before:
            return "next in the queue, for a worker (is one running?)"
        return f"{running} running and {before} waiting before it"


def _left(batch: Batch, now: datetime) -> str:
    left_s = seconds_left(batch, now)
    if left_s is None:
        return ""
    text = f"about {duration(left_s)}"
    estimate = batch.estimate
    if estimate and estimate.low_s is not None and estimate.high_s is not None:
        shift_s = left_s - estimate.duration_s
        low_s, high_s = estimate.low_s + shift_s, estimate.high_s + shift_s
        text += f" ({duration(low_s)} to {duration(high_s)})"
    return text


def _cache(batch: Batch) -> str:
    parts = []
    usage = batch.usage
    if usage and usage.prompt_tokens:
        part = 100 * usage.cached_tokens / usage.prompt_tokens
        parts.append(f"{part:.0f}% of the prompt tokens were computed before")
    if batch.deduplicated:
        parts.append(f"{batch.deduplicated:,} requests got the answer of an equal one")
    return "; ".join(parts)
