"""Waiting for a batch in the terminal: a bar where there is one, lines where there isn't."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from batch_app.cli.exit_codes import ExitCode
from batch_app.cli.figures import duration, ending, seconds_left, share
from batch_app.cli.terminal import say
from batch_app.client import Batch, BatchClient
from batch_app.client.client import WaitTimedOut
from batch_app.errors import BatchAppError

LINE_EVERY_S = 5.0
#: How a line of a batch's log begins.
_TIME = re.compile(r"^\S+ \S+Z\s+")


def wait_for(
    client: BatchClient,
    batch: Batch | str,
    *,
    timeout_s: float | None,
    quiet: bool,
    again: str,
) -> Batch:
    """Wait until the batch has finished, and tell how it ended.

    `again`: the command that goes on waiting. Ends the program when time runs out, or on Ctrl-C.
    """
    batch_id = batch if isinstance(batch, str) else batch.id
    try:
        with progress_shown(client, quiet) as show:
            ended = client.wait(batch, on_progress=show, timeout_s=timeout_s, poll_s=1.0)
    except WaitTimedOut as late:
        say(
            f"{batch_id} is {late.batch.status}: {share(late.batch)}. It goes on; "
            f"wait again with: {again}"
        )
        raise typer.Exit(ExitCode.TIMED_OUT) from None
    except KeyboardInterrupt:
        say(f"\nThe batch goes on without you. Come back with: {again}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    say(ending(ended))
    return ended


def outcome(batch: Batch) -> ExitCode:
    """What a command that waited for this batch ends with."""
    if batch.status != "completed":
        return ExitCode.NOT_COMPLETED
    return ExitCode.SOME_FAILED if batch.progress.failed else ExitCode.OK


def what_it_says(client: BatchClient, batch: Batch | str) -> str:
    """The last line of its log, without the time; empty where there is none."""
    with suppress(BatchAppError):  # it only adds to what is known
        for line in client.logs(batch, tail=1):
            return _TIME.sub("", line).strip()
    return ""


@contextmanager
def progress_shown(client: BatchClient, quiet: bool) -> Iterator[Callable[[Batch], None] | None]:
    """What to call with each state of the batch."""
    console = Console(stderr=True)
    if quiet:
        yield None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("waiting", total=None, left="")
            yield partial(_update, bar, task)
    else:
        yield _Lines(client)


def _update(bar: Progress, task: object, batch: Batch) -> None:
    left_s = seconds_left(batch)
    bar.update(
        task,  # type: ignore[arg-type]
        description=batch.status,
        completed=batch.progress.done,
        total=batch.progress.total or None,
        left="" if left_s is None else f"{duration(left_s)} left",
    )


class _Lines:
    """A line when something changed, and no more than one in a few seconds. Before the first answer
    it says what the batch's log says: that the model is loaded, or how fast it writes."""

    def __init__(self, client: BatchClient) -> None:
        self._client = client
        self._next = 0.0
        self._said = ""

    def __call__(self, batch: Batch) -> None:
        now = time.monotonic()
        if batch.is_finished or now < self._next:
            return
        line = f"{batch.id} {batch.status}: {share(batch)}"
        if batch.status == "running" and not batch.progress.done:
            line = f"{batch.id} {batch.status}: {what_it_says(self._client, batch) or share(batch)}"
        if line == self._said:
            return
        self._next, self._said = now + LINE_EVERY_S, line
        left_s = seconds_left(batch)
        say(line if left_s is None else f"{line}, about {duration(left_s)} left")
