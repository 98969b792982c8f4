"""The stream of a page: one look for all pages, nobody else's batches, an end with the server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from batch_app.config import Settings
from batch_app.dashboard.events import stream
from batch_app.dashboard.feed import Feed, Look
from batch_app.errors import StoreUnavailable
from batch_app.keys import EVERYBODY, Caller
from batch_app.routes.services import Services
from support.site import Site, echo_line
from support.waiting import PATIENCE_S

ANA, BOB = Caller("ana", sees_all=False), Caller("bob", sees_all=False)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


@pytest.fixture
def own(site: Site) -> Iterator[Services]:
    own = Services.open(Settings(**site.settings.model_dump()))
    yield own
    own.store.close()


async def until(source: AsyncIterator[bytes], name: str) -> dict[str, list[Any]]:
    """The events up to the first of this name, by name."""
    found: dict[str, list[Any]] = {}
    async for piece in source:
        for text in piece.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in text.splitlines())
            if "event" in lines:
                found.setdefault(lines["event"], []).append(json.loads(lines["data"]))
        if name in found:
            return found
    raise AssertionError(f"The stream ended; there was {found}.")


def test_each_is_told_of_their_own(site: Site, own: Services) -> None:
    mine = site.submit([echo_line(0)], "sim")
    site.set_row("batches", mine, owner="ana")
    site.submit([echo_line(0)], "sim")

    async def tell(caller: Caller, **options: Any) -> list[str]:
        source = stream(Feed(own, 0.02), caller, lambda: False, **options)
        async with aclosing(source):
            found = await until(source, "ready")
        return [view["id"] for view in found.get("batch", [])]

    assert asyncio.run(tell(ANA)) == [mine]
    assert asyncio.run(tell(BOB)) == []
    assert len(asyncio.run(tell(EVERYBODY))) == 2
    assert asyncio.run(tell(EVERYBODY, batch_id=mine)) == [mine]


def test_a_batch_is_told_of_again_only_when_something_changed(site: Site, own: Services) -> None:
    batch_id = site.submit([echo_line(0)], "sim")

    async def watch() -> None:
        source = stream(Feed(own, 0.02), EVERYBODY, lambda: False)
        async with aclosing(source):
            await until(source, "ready")
            for _ in range(3):
                assert "batch" not in await until(source, "beat")
            own.store.cancel_queued(batch_id, own.clock())
            found = await until(source, "batch")
            assert [view["state"] for view in found["batch"]] == ["cancelled"]

    asyncio.run(watch())


def test_a_hundred_pages_cost_one_look(own: Services) -> None:
    class Counting(Feed):
        num_looks = 0

        def look(self, before: Look) -> Look:
            self.num_looks += 1
            return super().look(before)

    async def watch() -> None:
        feed = Counting(own, 3600)
        sources = [stream(feed, EVERYBODY, lambda: False) for _ in range(100)]
        await asyncio.gather(*(until(source, "ready") for source in sources))
        assert feed.num_looks == 1
        looking = asyncio.all_tasks() - {asyncio.current_task()}
        assert looking
        for source in sources:
            await source.aclose()
        _, at_work = await asyncio.wait(looking, timeout=PATIENCE_S)
        assert not at_work, "nobody watches any more"

    asyncio.run(watch())


def test_a_store_that_is_away_is_said_and_got_over(own: Services) -> None:
    class Away(Feed):
        is_away = True

        def look(self, before: Look) -> Look:
            if self.is_away:
                raise StoreUnavailable("It is away.")
            return super().look(before)

    async def watch() -> None:
        feed = Away(own, 0.02)
        source = stream(feed, EVERYBODY, lambda: False)
        async with aclosing(source):
            found = await until(source, "trouble")
            assert found["trouble"] == [{"text": "It is away."}]
            assert "ready" not in found
            feed.is_away = False
            assert (await until(source, "ready"))["trouble"] == [{"text": ""}]

    asyncio.run(watch())


def test_the_stream_ends_with_the_server(own: Services) -> None:
    stopping = threading.Event()

    async def watch() -> None:
        source = stream(Feed(own, 0.02), EVERYBODY, stopping.is_set)
        await until(source, "ready")
        stopping.set()
        await until(source, "end")
        assert [piece async for piece in source] == []

    asyncio.run(watch())
