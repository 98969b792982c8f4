"""`vllm-batch list`, `status`, `wait`, `logs`, `cancel` and `retry`: batches that are there."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from batch_app.cli.figures import ago, duration, ending, plural, seconds_left
from batch_app.cli.options import Json
from batch_app.cli.remote import (
    SECTION,
    ApiKey,
    BatchesOfInterest,
    BatchId,
    BatchIds,
    BatchOfInterest,
    Server,
    connected,
    facts,
    of_interest,
    same_place,
)
from batch_app.cli.terminal import say, show, show_facts, show_json, show_table
from batch_app.cli.waiting import outcome, wait_for, what_it_says
from batch_app.client import Batch, BatchClient

app = typer.Typer()


class Status(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@app.command("list", rich_help_panel=SECTION)
def list_batches(
    status: Annotated[
        Status | None, typer.Option(help="Only those of this status.", show_default="all")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")
    ] = 20,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """List batches, newest first."""
    with connected(server, api_key) as client:
        found = client.list(status, None if everything else limit)
        batches = list(found)
    if as_json:
        show_json([batch.raw for batch in batches])
    elif batches:
        columns = ("batch", "status", "model", "done", "failed", "created", "left")
        show_table(columns, [_row(batch) for batch in batches])
    else:
        say("There are no batches. Make one: vllm-batch submit FILE --model MODEL")


def _row(batch: Batch) -> tuple[str, ...]:
    left_s = seconds_left(batch)
    return (
        batch.id,
        f"{batch.status}, paused ({batch.paused.kind})" if batch.paused else batch.status,
        batch.model or "-",
        f"{batch.progress.done:,}/{batch.progress.total:,}",
        f"{batch.progress.failed:,}",
        ago(batch.created_at),
        "" if left_s is None else duration(left_s),
    )


@app.command(rich_help_panel=SECTION)
def status(
    batches: BatchesOfInterest = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Show how far batches are."""
    with connected(server, api_key) as client:
        for number, batch_id in enumerate(batches or [of_interest(client)]):
            batch = client.get(batch_id)
            if as_json:
                show_json(batch.raw)
                continue
            if number:
                show("")
            show_facts([*facts(batch), *_at_work(client, batch)])


def _at_work(client: BatchClient, batch: Batch) -> list[tuple[str, str]]:
    """What it is at, by its log: loading, or answering so fast."""
    said = what_it_says(client, batch) if batch.status == "running" else ""
    return [("now", said)] if said else []


@app.command(rich_help_panel=SECTION)
def wait(
    batches: BatchesOfInterest = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds to wait at most.", min=0.0, show_default="as long as it takes"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Wait until batches have finished. The exit code says how they ended."""
    codes = []
    with connected(server, api_key) as client:
        for batch_id in batches or [of_interest(client)]:
            again = f"vllm-batch wait {batch_id}{same_place(server)}"
            ended = wait_for(client, batch_id, timeout_s=timeout, quiet=quiet, again=again)
            codes.append(outcome(ended))
            if as_json:
                show_json(ended.raw)
    raise typer.Exit(max(codes))


@app.command(rich_help_panel=SECTION)
def logs(
    batch: BatchOfInterest = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the batch has finished.")
    ] = False,
    tail: Annotated[
        int | None,
        typer.Option("--tail", "-n", min=0, help="Only so many last lines.", show_default="all"),
    ] = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Show a batch's log."""
    with connected(server, api_key) as client:
        for line in client.logs(batch or of_interest(client), tail=tail, follow=follow):
            show_json({"line": line}, compact=True) if as_json else show(line)


@app.command(rich_help_panel=SECTION)
def cancel(
    batches: BatchIds, as_json: Json = False, server: Server = None, api_key: ApiKey = None
) -> None:
    """End batches, also running ones. What is answered by then is kept."""
    with connected(server, api_key) as client:
        for batch_id in batches:
            client.cancel(batch_id)
            ended = client.wait(batch_id, poll_s=0.5, timeout_s=None)
            say(_end_of_cancelled(ended, same_place(server)))
            if as_json:
                show_json(ended.raw)


def _end_of_cancelled(batch: Batch, place: str) -> str:
    if batch.status != "cancelled":  # it was done before the wish came
        return ending(batch)
    kept = ""
    if batch.has_results:
        num = plural(batch.progress.completed, "answer")
        kept = f" {num} until then: vllm-batch results {batch.id}{place}"
    return f"✅ {batch.id} is cancelled.{kept}"


@app.command(rich_help_panel=SECTION)
def retry(
    batch: BatchId, as_json: Json = False, server: Server = None, api_key: ApiKey = None
) -> None:
    """Run what failed once more. The requests without an answer become a new batch."""
    with connected(server, api_key) as client:
        again = client.retry(batch)
    say(f"{again.progress.total:,} requests of {batch} run again.")
    if as_json:
        show_json(again.raw)
    else:
        show(again.id)
