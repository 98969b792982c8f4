"""A batch server, seen from a program: submit, wait, results, and what else there is to do."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from batch_app.client.connection import DEFAULT_SERVER, Connection
from batch_app.client.form import Form
from batch_app.client.results import Result, content, joined, lines_of, result_of
from batch_app.client.source import Requests, Source
from batch_app.client.states import Batch, Model, batch_of, model_of
from batch_app.client.webhooks import Webhooks
from batch_app.core import LineError
from batch_app.errors import BadLines, Conflict, ServerUnreachable, StoreUnavailable

#: Looks at a batch come closer together at its beginning: small batches end soon.
FIRST_LOOK_S = 0.2
CHAT = "/v1/chat/completions"


class WaitTimedOut(Exception):
    """The time given to `wait` ran out. `batch`: as it was last seen."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"Batch {batch.id} is {batch.status} after the time given.")
        self.batch = batch


class BatchClient:
    """One server. Use as a context manager, or call `close`. For one thread at a time.

    Calls raise the errors of `batch_app.errors`. Broken connections, 429 and 503 are tried again
    for about 15 seconds; a server that never answered is said to be unreachable at once.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        api_key: str | None = None,
        *,
        timeout_s: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_s`: longest silence of the server within one call."""
        self._connection = Connection(server, api_key, timeout_s=timeout_s, sleep=sleep)
        self._sleep = sleep

    @property
    def url(self) -> str:
        return self._connection.url

    def __enter__(self) -> BatchClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def webhooks(self) -> Webhooks:
        """Who is told of the end of batches."""
        return Webhooks(self._connection)

    # -- making --------------------------------------------------------------------------------

    def submit(
        self,
        requests: Requests | Source,
        model: str | None = None,
        *,
        deduplicate: bool = True,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Batch:
        """Send requests; returns the batch, once all its lines are checked.

        `requests`: a path (JSON lines, plain, `.gz` or `.zst`; `-` is standard input), bytes, or
        an iterable of requests. `model` runs them all; without it each line names its own in
        `body.model`, and `options` may have `priority`, `completion_window` and `metadata`.
        Always they may have `webhook_url`, which is told of the end (its secret is in the batch's
        `raw["webhook"]`, this once), and `webhook_secret`, one of your own.
        A program that is started anew with the same `idempotency_key` gets the same batch.

        Raises:
            BadLines: lines can't run; nothing was queued.
            BadRequest, ModelNotFound, Forbidden, TooMany, StorageFull: the server refuses it.
            ServerUnreachable: there is no server, or the upload broke again and again.
        """
        key = {"idempotency-key": idempotency_key or uuid.uuid4().hex}
        source = Source.of(requests)
        owned = source if source is not requests else contextlib.nullcontext()
        with owned:
            if model is None:
                return self._submit_by_file(source, deduplicate, key, options)
            fields = {"model": model, "deduplicate": "true" if deduplicate else "false"}
            form = Form(fields | {name: str(value) for name, value in options.items()}, source)
            return batch_of(
                self._connection.upload("/v1/batches", form.blocks, form.content_type, key)
            )

    def _submit_by_file(
        self,
        source: Source,
        deduplicate: bool,
        key: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> Batch:
        form = Form({"purpose": "batch"}, source)
        file = self._connection.upload("/v1/files", form.blocks, form.content_type, {})
        wish = {
            "input_file_id": file["id"],
            "endpoint": _endpoint(source),
            "deduplicate": deduplicate,
            **options,
        }
        made = self._connection.json("POST", "/v1/batches", body=wish, headers=key)
        webhook = made.get("webhook")  # with its secret, which no later answer has
        looks = _pauses(1.0)
        while made["status"] == "validating":
            self._sleep(next(looks))
            made = self._view(made["id"], "openai")
        if made["status"] == "failed" and made["errors"]:
            bad = made["errors"]["data"]
            lines = [LineError(e["code"], e["message"], e["line"], e["param"]) for e in bad]
            raise BadLines(f"The file {source.name} can't run.", lines, len(lines))
        batch = self.get(made["id"])
        return replace(batch, raw={**batch.raw, "webhook": webhook}) if webhook else batch

    def retry(self, batch: Batch | str) -> Batch:
        """A new batch of those requests of a finished one that did not succeed.

        Raises:
            Conflict: it has not finished, or there is nothing to retry.
        """
        path = f"/v1/batches/{_id(batch)}/retry"
        key = {"idempotency-key": uuid.uuid4().hex}
        return batch_of(
            self._connection.json("POST", path, params={"format": "native"}, headers=key)
        )

    def cancel(self, batch: Batch | str) -> Batch:
        """End a batch, also one that runs; what is answered by then is kept.

        Raises:
            Conflict: it has finished.
        """
        path = f"/v1/batches/{_id(batch)}/cancel"
        return batch_of(self._connection.json("POST", path, params={"format": "native"}))

    # -- looking -------------------------------------------------------------------------------

    def get(self, batch: Batch | str) -> Batch:
        """The batch as it is now.

        Raises:
            NotFound: there is none of this id, or it belongs to another key.
        """
        return batch_of(self._view(_id(batch), "native"))

    def _view(self, batch_id: str, dialect: str) -> dict[str, Any]:
        return self._connection.json("GET", f"/v1/batches/{batch_id}", params={"format": dialect})

    def list(self, status: str | None = None, limit: int | None = None) -> Iterator[Batch]:
        """Batches, newest first; those of one status, if given."""
        params: dict[str, Any] = {"limit": 100 if limit is None else min(limit, 100)}
        if status is not None:
            params["status"] = status
        num_left = limit
        while True:
            page = self._connection.json("GET", "/v1/batches", params=params)
            for body in page["batches"]:
                if num_left == 0:
                    return
                yield batch_of(body)
                num_left = None if num_left is None else num_left - 1
            if not page["has_more"] or num_left == 0:
                return
            params["after"] = page["last_id"]

    def models(self) -> Sequence[Model]:
        """The models that may run, with what was last measured of each."""
        found = self._connection.json("GET", "/v1/models")["models"]
        return tuple(model_of(body) for body in found)

    def ready(self) -> dict[str, Any]:
        """What the server says of its parts.

        Raises:
            StoreUnavailable, ServerFailed: it can't do its work at the moment.
        """
        return self._connection.json("GET", "/readyz", repeat=False)

    def estimate(self, requests: Requests | Source, model: str | None = None) -> dict[str, Any]:
        """What would become of these requests, without submitting them, as `POST /v1/estimate`
        answers: `errors` by line, and in `models` the time on `model`, or on each.

        Raises:
            ModelNotFound, BadRequest, Forbidden, ServerUnreachable: as `submit`.
        """
        source = Source.of(requests)
        owned = source if source is not requests else contextlib.nullcontext()
        with owned:
            form = Form({} if model is None else {"model": model}, source)
            return self._connection.upload("/v1/estimate", form.blocks, form.content_type, {})

    def logs(
        self, batch: Batch | str, *, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """The lines of the batch's log; with `follow`, until the batch has finished."""
        params: dict[str, Any] = {"follow": "true" if follow else "false"}
        if tail is not None:
            params["tail"] = tail
        path = f"/v1/batches/{_id(batch)}/logs"
        blocks = content(self._connection, path, params, may_go_on=tail is None)
        for line in lines_of(blocks):
            yield line.decode(errors="replace")

    # -- waiting -------------------------------------------------------------------------------

    def wait(
        self,
        batch: Batch | str,
        *,
        on_progress: Callable[[Batch], None] | None = None,
        timeout_s: float | None = None,
        poll_s: float = 2.0,
        outage_s: float = 600.0,
    ) -> Batch:
        """Wait until the batch has finished; returns it as it ended, however it ended.

        `on_progress` is called with the batch at each look, every `poll_s` at most. A server that
        goes away meanwhile is waited for up to `outage_s`.

        Raises:
            WaitTimedOut: `timeout_s` ran out; the batch goes on.
            NotFound, ServerUnreachable: as `get`.
        """
        began = last_seen = time.monotonic()
        seen: Batch | None = None
        looks = _pauses(poll_s)
        while True:
            try:
                seen = self.get(batch)
                last_seen = time.monotonic()
            except (ServerUnreachable, StoreUnavailable):
                if seen is None or time.monotonic() - last_seen > outage_s:
                    raise
            else:
                if on_progress is not None:
                    on_progress(seen)
                if seen.is_finished:
                    return seen
            pause_s = next(looks)
            if timeout_s is not None:
                left_s = began + timeout_s - time.monotonic()
                if left_s <= 0:
                    raise WaitTimedOut(seen)
                pause_s = min(pause_s, left_s)
            self._sleep(pause_s)

    # -- results -------------------------------------------------------------------------------

    def results(
        self,
        batch: Batch | str,
        *,
        status: str | None = None,
        with_requests: bool = False,
        requests: Requests | Source | None = None,
    ) -> Iterator[Result]:
        """The results, in input order once the batch has finished; memory stays flat.

        `status`: only those that `completed` or `failed`. `with_requests` gives each result the
        request it answers: from the server's copy of the input, or from `requests`, if given.

        Raises:
            Conflict: nothing has run yet, or requests are asked for and the batch has not finished.
            NotFound: there is no such batch, or it ended without results.
        """
        lines = self.result_lines(batch, status=status)
        if requests is None and not with_requests:
            yield from map(result_of, lines)
            return
        seen = self.get(batch)
        if not seen.is_finished:
            raise Conflict(
                f"Batch {seen.id} is {seen.status}: results can be put beside their requests once "
                "it has finished.",
                code="batch_not_finished",
            )
        if requests is not None:
            with Source.of(requests) as source:
                yield from joined(lines, source.lines())
        else:
            path = f"/v1/files/{seen.input_file_id}/content"
            yield from joined(lines, lines_of(content(self._connection, path, {})))

    def result_lines(self, batch: Batch | str, *, status: str | None = None) -> Iterator[bytes]:
        """The lines of the results as they lie on the server, without their line feeds."""
        return lines_of(self.result_blocks(batch, status=status))

    def result_blocks(self, batch: Batch | str, *, status: str | None = None) -> Iterator[bytes]:
        """The results' bytes, in pieces."""
        params = {} if status is None else {"status": status}
        return content(self._connection, f"/v1/batches/{_id(batch)}/results", params)

    def download(self, batch: Batch | str, target: Path, *, status: str | None = None) -> int:
        """Write the results to a file, which appears whole or not at all. Returns its bytes."""
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        num_bytes = 0
        try:
            with part.open("wb") as file:
                for block in self.result_blocks(batch, status=status):
                    num_bytes += file.write(block)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return num_bytes


def _id(batch: Batch | str) -> str:
    return batch if isinstance(batch, str) else batch.id


def _pauses(longest_s: float) -> Iterator[float]:
    pause_s = min(FIRST_LOOK_S, longest_s)
    while True:
        yield pause_s
        pause_s = min(1.3 * pause_s, longest_s)


def _endpoint(source: Source) -> str:
    """What the first line's `url` says; the server checks the others against it."""
    with contextlib.suppress(orjson.JSONDecodeError, StopIteration):
        first = orjson.loads(next(source.lines()))
        if isinstance(first, dict) and isinstance(first.get("url"), str):
            return str(first["url"])
    return CHAT
