"""The server that a command talks to, and the options that say which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batch_app.client import Batch, BatchClient
from batch_app.errors import BatchAppError, NotFound

if TYPE_CHECKING:
    from batch_app.config import Settings

SECTION = "Batches on a server"

Server = Annotated[
    str | None,
    typer.Option(
        envvar="VLLM_BATCH_SERVER",
        help="The server's address, as http://HOST:PORT.",
        show_default="this machine's",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="VLLM_BATCH_API_KEY",
        help="Your API key. Others on the machine see what stands on a command line: rather set "
        "the variable.",
        show_default=False,
    ),
]


def completed_ids(incomplete: str) -> list[tuple[str, str]]:
    """The newest batches of the server, for the shell's completion."""
    try:
        with BatchClient(address(None), timeout_s=2.0) as client:
            found = list(client.list(limit=50))
    except BatchAppError:
        return []
    return [(one.id, f"{one.status} {one.model}") for one in found if one.id.startswith(incomplete)]


BatchId = Annotated[
    str,
    typer.Argument(metavar="BATCH", help="The batch's id.", autocompletion=completed_ids),
]
BatchOfInterest = Annotated[
    str | None,
    typer.Argument(
        metavar="[BATCH]",
        help="The batch's id.",
        show_default="the running one, else the newest",
        autocompletion=completed_ids,
    ),
]
BatchesOfInterest = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[BATCH]...",
        help="Ids of batches.",
        show_default="the running one, else the newest",
        autocompletion=completed_ids,
    ),
]
BatchIds = Annotated[
    list[str],
    typer.Argument(metavar="BATCH", help="Ids of batches.", autocompletion=completed_ids),
]


def address(server: str | None) -> str:
    """What was said, else where the settings have this machine's server listen."""
    if server:
        return server
    from batch_app.config import load_settings

    return address_of(load_settings())


def address_of(settings: Settings) -> str:
    """Where the server of these settings is reached from its own machine."""
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port or 8080}"


def connected(server: str | None, api_key: str | None) -> BatchClient:
    return BatchClient(address(server), api_key)


def of_interest(client: BatchClient) -> str:
    """The id of the batch that is meant where none is named. Raises NotFound."""
    for status in ("running", "pending", None):
        for found in client.list(status, limit=1):
            return found.id
    raise NotFound("There are no batches. Make one: vllm-batch submit FILE --model MODEL")


def same_place(server: str | None) -> str:
    """What to add to a command that is proposed, so that it asks the same server."""
    return f" --server {server}" if server else ""


def facts(batch: Batch) -> list[tuple[str, str]]:
    """What `status` shows of a batch, as names and values."""
    from batch_app.cli.figures import ago, duration, pause_text, seconds_left, share

    rows = [
        ("batch", batch.id),
        ("status", batch.status),
        ("model", batch.model or "(each line's own)"),
        ("progress", share(batch)),
    ]
    if batch.deduplicated:
        rows.append(("duplicates", f"{batch.deduplicated:,} got the answer of an equal request"))
    rows.append(("created", f"{batch.created_at:%Y-%m-%d %H:%M:%S} UTC, {ago(batch.created_at)}"))
    if batch.started_at:
        end = (
            f", for {duration((batch.ended_at - batch.started_at).total_seconds())}"
            if (batch.ended_at)
            else ""
        )
        rows.append(("started", f"{batch.started_at:%Y-%m-%d %H:%M:%S} UTC{end}"))
    left_s = seconds_left(batch)
    if left_s is not None:
        rows.append(("time left", f"about {duration(left_s)}"))
    if batch.throughput_tokens_per_s:
        rows.append(("speed", f"{batch.throughput_tokens_per_s:,.0f} tokens/s"))
    if batch.usage:
        usage = batch.usage
        cached = f", {usage.cached_tokens:,} of them cached" if usage.cached_tokens else ""
        rows.append(
            (
                "tokens",
                f"{usage.prompt_tokens:,} prompt{cached}; {usage.completion_tokens:,} answer",
            )
        )
    if batch.pause_reason:
        rows.append(("paused", pause_text(batch)))
    if batch.error_message:
        rows.append(("error", batch.error_message))
    return rows
