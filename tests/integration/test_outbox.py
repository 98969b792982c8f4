"""The outbox: from the end of a batch to a real receiver, through whatever goes wrong between."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, StoredFile
from batch_app.errors import ConfigError, LeaseLost, NotFound, TooMany
from batch_app.files import new_id
from batch_app.outbox import HOLD_MARGIN_S, Outbox, tls_context
from batch_app.store import Store
from batch_app.webhook_targets import requested_webhook
from batch_app.webhooks import DeliveryState, Webhook, WebhookDelivery
from support.certificates import make_certificate, server_context
from support.receiver import Receiver, receiving
from support.waiting import wait_for

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def seconds(self) -> float:
        return (self.now - NOW).total_seconds()


class Post:
    """A store with an outbox on it, whose clock is turned by hand."""

    def __init__(self, root: Path, **settings: Any) -> None:
        given: dict[str, Any] = {
            "data_dir": root,
            "webhook_allowed_hosts": ("127.0.0.1", "hook.intranet"),
            "webhook_backoff_s": 10.0,
            "webhook_timeout_s": 30.0,
            **settings,
        }
        self.settings = Settings(**given)
        self.clock = Clock()
        self.store = self.opened()
        self.outbox = self.server()
        self._batches = 0

    def opened(self) -> Store:
        store = Store(self.settings.resolved_database_url)
        store.migrate()
        store.delivery_watch.monotonic = self.clock.seconds
        return store

    def server(self, name: str = "server", store: Store | None = None, **options: Any) -> Outbox:
        return Outbox(self.settings, store or self.store, name, clock=self.clock, **options)

    def webhook(self, url: str, **options: Any) -> Webhook:
        options = {"owner": None} | options
        webhook = requested_webhook(self.settings, url, self.clock(), **options)
        self.store.add_webhook(webhook)
        return webhook

    def batch(self, owner: str | None = None, webhook_url: str | None = None) -> Batch:
        file_id = new_id("file")
        file = StoredFile(file_id, FilePurpose.BATCH, "a", 1, self.clock(), owner=owner)
        batch = Batch(
            id=new_id("batch"),
            dialect=Dialect.OPENAI,
            status=BatchStatus.QUEUED,
            endpoint="/v1/chat/completions",
            model="m",
            input_file_id=file_id,
            created_at=self.clock(),
            total=1,
            owner=owner,
        )
        webhook = None
        if webhook_url is not None:
            webhook = requested_webhook(
                self.settings, webhook_url, self.clock(), owner=owner, batch_id=batch.id
            )
        return self.store.add_batch(batch, file, webhook=webhook)

    def ended(self, how: str = "cancelled", **options: Any) -> Batch:
        batch, now = self.batch(**options), self.clock()
        steps = {
            "cancelled": (BatchStatus.CANCELLING, BatchStatus.CANCELLED),
            "expired": (BatchStatus.EXPIRED,),
            "failed": (BatchStatus.FAILED,),
            "completed": (BatchStatus.RUNNING, BatchStatus.FINALIZING, BatchStatus.COMPLETED),
        }[how]
        for to in steps:
            batch = self.store.transition(batch, to, now)
        return batch

    def send_all(self, outbox: Outbox | None = None) -> None:
        """All that is due now, and what each attempt leads to."""
        outbox = outbox or self.outbox
        while outbox.run_once():
            pass
        outbox.wait(120)

    def pass_time(self, seconds: float) -> None:
        self.clock.now += timedelta(seconds=seconds)

    def delivery(self, webhook: Webhook) -> WebhookDelivery:
        (found,), _ = self.store.list_deliveries(webhook.id, limit=9)
        return found


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    post = Post(tmp_path)
    yield post
    post.store.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.mark.parametrize("how", ["completed", "failed", "expired", "cancelled"])
def test_each_end_is_announced_once_and_unwrapped(post: Post, receiver: Receiver, how: str) -> None:
    webhook = post.webhook(receiver.url)
    batch = post.ended(how)
    post.send_all()
    post.pass_time(100_000)
    post.send_all()
    (call,) = receiver.calls
    assert call.path == "/hook?who=me"
    assert call.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert call.headers["content-type"] == "application/json"
    event = OpenAI(api_key="none").webhooks.unwrap(call.body, call.headers, secret=webhook.secret)
    assert event.type == f"batch.{how}"
    assert event.data.id == batch.id
    delivery = post.delivery(webhook)
    assert call.headers["webhook-id"] == delivery.id == event.id
    assert (delivery.state, delivery.attempts) == (DeliveryState.DELIVERED, 1)
    assert delivery.status_code == 200


def test_whom_an_end_is_told(post: Post, receiver: Receiver) -> None:
    anas = post.webhook(receiver.url, owner="ana")
    bobs = post.webhook(receiver.url, owner="bob")
    nobodys = post.webhook(receiver.url)
    picky = post.webhook(receiver.url, owner="ana", events=["batch.failed"])
    batch = post.ended("completed", owner="ana", webhook_url=receiver.url)
    post.ended("completed", owner="ana")
    own = post.store.webhook_of_batch(batch.id)
    assert own is not None
    numbers = {
        webhook.id: len(post.store.list_deliveries(webhook.id, limit=9)[0])
        for webhook in (anas, bobs, nobodys, picky, own)
    }
    assert numbers == {anas.id: 2, bobs.id: 0, nobodys.id: 0, picky.id: 0, own.id: 1}
    post.send_all()
    post.send_all()
    assert len(receiver.calls) == 3
    assert len({call.headers["webhook-id"] for call in receiver.calls}) == 3


def test_the_event_is_written_with_the_change_or_not_at_all(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = post.webhook(receiver.url)
    batch = post.batch()

    def dies(*_: Any) -> None:
        raise RuntimeError("no power")

    with monkeypatch.context() as patch:
        patch.setattr("batch_app.store.batches.announce", dies)
        with pytest.raises(RuntimeError):
            post.store.transition(batch, BatchStatus.FAILED, NOW)
    assert post.store.get_batch(batch.id).status is BatchStatus.QUEUED
    post.store.transition(batch, BatchStatus.FAILED, NOW)
    assert post.delivery(webhook).type == "batch.failed"


def test_a_refusal_is_tried_again_later_with_the_same_id_and_body(
    post: Post, receiver: Receiver
) -> None:
    receiver.answers = [500, 404, 200]
    webhook = post.webhook(receiver.url)
    post.ended()
    post.send_all()
    assert post.delivery(webhook).status_code == 500
    post.send_all()
    assert len(receiver.calls) == 1, "not before its pause is over"
    post.pass_time(13)
    post.send_all()
    assert post.delivery(webhook).error == "Answered 404."
    post.pass_time(13)
    post.send_all()
    assert len(receiver.calls) == 2, "the second pause is longer"
    post.pass_time(30)
    post.send_all()
    delivery = post.delivery(webhook)
    assert (delivery.state, delivery.attempts) == (DeliveryState.DELIVERED, 3)
    assert len({(call.headers["webhook-id"], call.body) for call in receiver.calls}) == 1


def test_it_is_given_up_in_the_end_and_can_be_replayed(tmp_path: Path, receiver: Receiver) -> None:
    post = Post(tmp_path, webhook_attempts=3)
    receiver.answers = [500] * 3
    webhook = post.webhook(receiver.url)
    post.ended()
    for _ in range(6):
        post.send_all()
        post.pass_time(10_000)
    delivery = post.delivery(webhook)
    assert (delivery.state, delivery.attempts) == (DeliveryState.FAILED, 3)
    assert len(receiver.calls) == 3
    again = post.store.replay_delivery(webhook.id, delivery.id, post.clock())
    assert (again.state, again.attempts) == (DeliveryState.PENDING, 0)
    post.send_all()
    assert post.delivery(webhook).state is DeliveryState.DELIVERED
    assert receiver.calls[-1].headers["webhook-id"] == delivery.id
    # What has arrived can be sent again too.
    post.store.replay_delivery(webhook.id, delivery.id, post.clock())
    post.send_all()
    assert len(receiver.calls) == 5
    post.store.close()


def test_redirects_are_failures_and_not_followed(post: Post, receiver: Receiver) -> None:
    receiver.answers = [302, 307, 308]
    receiver.headers = {"location": receiver.url + "&followed=1"}
    webhook = post.webhook(receiver.url)
    post.ended()
    for number in (1, 2, 3):
        post.send_all()
        assert len(receiver.calls) == number
        assert "redirects are not followed" in (post.delivery(webhook).error or "")
        post.pass_time(1000)
    assert not any("followed" in call.path for call in receiver.calls)


def test_410_disables_until_a_replay(post: Post, receiver: Receiver) -> None:
    receiver.answers = [410]
    webhook = post.webhook(receiver.url)
    first = post.ended()
    post.ended()
    while not receiver.calls:
        post.send_all()
    found = post.store.get_webhook(webhook.id)
    assert found.disabled_at is not None
    assert "410" in (found.disabled_reason or "")
    post.ended()
    post.pass_time(100_000)
    post.send_all()
    assert len(receiver.calls) == 1
    deliveries, _ = post.store.list_deliveries(webhook.id, limit=9)
    assert [delivery.state for delivery in deliveries] == [DeliveryState.FAILED] * 2
    assert deliveries[-1].batch_id == first.id
    post.store.replay_delivery(webhook.id, deliveries[-1].id, post.clock())
    post.send_all()
    assert len(receiver.calls) == 2
    assert post.store.get_webhook(webhook.id).disabled_at is None


def test_a_test_is_sent_once_and_takes_the_place_of_the_last(
    post: Post, receiver: Receiver
) -> None:
    receiver.answers = [410, 500, 200]
    webhook = post.webhook(receiver.url, events=["batch.failed"])
    for number, state in enumerate(("failed", "failed", "delivered"), 1):
        event = post.store.test_webhook(webhook.id, post.clock())
        assert (event.state, event.type) == (DeliveryState.PENDING, "batch.failed")
        assert post.store.get_webhook(webhook.id).disabled_at is None
        for _ in range(3):
            post.send_all()
            post.pass_time(100_000)
        assert len(receiver.calls) == number
        assert post.delivery(webhook).id == event.id, "one at most is there"
        assert post.delivery(webhook).state == state
        call = receiver.calls[-1]
        body = json.loads(call.body)
        assert (body["test"], body["type"]) == (True, "batch.failed")
        unwrap = OpenAI(api_key="none").webhooks.unwrap
        assert unwrap(call.body, call.headers, secret=webhook.secret).id == event.id


def test_a_test_leaves_the_other_events_alone(post: Post, receiver: Receiver) -> None:
    webhook, other = post.webhook(receiver.url), post.webhook(receiver.url)
    batch = post.ended()
    post.store.test_webhook(other.id, post.clock())
    post.store.test_webhook(webhook.id, post.clock())
    deliveries, _ = post.store.list_deliveries(webhook.id, limit=9)
    assert [delivery.is_test for delivery in deliveries] == [True, False]
    assert deliveries[1].batch_id == batch.id
    (_, of_test) = post.store.list_deliveries(other.id, limit=9)[0][::-1]
    assert of_test.is_test


def test_a_busy_host_says_when_to_come_back(post: Post, receiver: Receiver) -> None:
    receiver.answers = [503, 429, 200]
    receiver.headers = {"retry-after": "500"}
    webhook = post.webhook(receiver.url)
    post.ended()
    post.send_all()
    post.pass_time(400)
    post.send_all()
    assert len(receiver.calls) == 1
    post.pass_time(101)
    post.send_all()
    receiver.headers = {"retry-after": "999999999999"}
    post.pass_time(12 * 3600 + 1)
    post.send_all()
    assert post.delivery(webhook).state is DeliveryState.DELIVERED


def drips(handler: Any) -> None:
    """An answer that never ends, a byte now and then, so that no single read takes long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    while True:  # until the other end has gone
        handler.wfile.write(b"x")
        handler.wfile.flush()
        threading.Event().wait(0.05)


def hangs_up(handler: Any) -> None:
    handler.connection.close()


def talks_nonsense(handler: Any) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n" * 10)


def talks_for_ever(handler: Any) -> None:
    """The head at once, then a body without end; whoever read it would never be done."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n")
    for _ in range(20_000):
        handler.wfile.write(b"x" * 65536)


def sends_a_huge_head(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(20_000):
        handler.wfile.write(b"x-%d: %b\r\n" % (number, b"y" * 1000))


@pytest.mark.parametrize(
    ("answer", "patience_s", "state", "words"),
    [
        (drips, 1.0, "pending", "No answer within 1 s."),
        (hangs_up, 50.0, "pending", "The connection broke"),
        (talks_nonsense, 50.0, "pending", "no HTTP"),
        (sends_a_huge_head, 50.0, "pending", "no HTTP"),
        (talks_for_ever, 50.0, "delivered", ""),
    ],
)
def test_hosts_that_misbehave(
    tmp_path: Path,
    receiver: Receiver,
    answer: Callable[[Any], None],
    patience_s: float,
    state: str,
    words: str,
) -> None:
    post = Post(tmp_path, webhook_timeout_s=patience_s)
    receiver.answers = [answer]
    webhook = post.webhook(receiver.url)
    post.ended()
    post.send_all()
    delivery = post.delivery(webhook)
    assert delivery.state == state
    assert words in (delivery.error or "")
    post.store.close()


def test_nobody_there(post: Post) -> None:
    with receiving() as gone:
        url = gone.url
    webhook = post.webhook(url)
    post.ended()
    post.send_all()
    assert post.delivery(webhook).error == "Can't connect."


def test_a_target_that_is_not_allowed_is_never_asked(tmp_path: Path, receiver: Receiver) -> None:
    post = Post(tmp_path, webhook_allowed_hosts=())
    outbox = post.server(resolve=lambda host, port: ["93.184.215.14", "127.0.0.1"])
    rebound = post.webhook(f"https://hook.example:{receiver.port}/")
    post.ended()
    post.send_all(outbox)
    assert "not a public address" in (post.delivery(rebound).error or "")
    assert receiver.calls == []
    post.store.close()


def test_proxies_of_the_environment_are_not_used(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        post.webhook(receiver.url)
        post.ended()
        post.send_all()
        assert proxy.calls == []
    assert len(receiver.calls) == 1


def test_the_next_address_is_tried_where_one_does_not_answer(
    tmp_path: Path, receiver: Receiver
) -> None:
    post = Post(tmp_path, webhook_allowed_hosts=("hook.intranet",))
    outbox = post.server(resolve=lambda host, port: ["127.77.0.1", "::1", "127.0.0.1"])
    webhook = post.webhook(f"http://hook.intranet:{receiver.port}/x")
    post.ended()
    post.send_all(outbox)
    assert post.delivery(webhook).state is DeliveryState.DELIVERED
    assert receiver.calls[0].headers["host"] == f"hook.intranet:{receiver.port}"
    post.store.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A self-signed certificate and key for each of two names."""
    folder = tmp_path_factory.mktemp("tls")
    return {name: make_certificate(folder, name) for name in ("hook.intranet", "other.intranet")}


@pytest.mark.parametrize(
    ("shown", "trusted", "arrives"),
    [
        ("hook.intranet", "hook.intranet", True),
        ("other.intranet", "other.intranet", False),  # trusted, but of another name
        ("hook.intranet", None, False),
    ],
)
def test_tls_is_for_the_name_though_the_address_is_connected_to(
    tmp_path: Path,
    certificates: dict[str, Path],
    shown: str,
    trusted: str | None,
    arrives: bool,
) -> None:
    context = server_context(certificates[shown])
    asked_for: list[str | None] = []
    context.sni_callback = lambda sock, name, ctx: asked_for.append(name)
    post = Post(tmp_path, webhook_ca_file=certificates[trusted] if trusted else None)
    with receiving(context) as receiver:
        outbox = post.server(resolve=lambda host, port: ["127.0.0.1"])
        webhook = post.webhook(f"https://hook.intranet:{receiver.port}/x")
        post.ended()
        post.send_all(outbox)
    assert asked_for == ["hook.intranet"]
    delivery = post.delivery(webhook)
    assert len(receiver.calls) == int(arrives)
    assert (delivery.state is DeliveryState.DELIVERED) is arrives
    if not arrives:
        assert delivery.error == "Its TLS certificate can't be trusted."
    post.store.close()


def test_a_file_of_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(ConfigError, match="webhook_ca_file"):
            tls_context(Settings(webhook_ca_file=tmp_path / name))


# -- several servers, crashes, clocks --------------------------------------------------------------


def test_two_servers_send_nothing_twice(tmp_path: Path, receiver: Receiver) -> None:
    post = Post(tmp_path)
    for _ in range(6):
        post.webhook(receiver.url)
    for _ in range(5):
        post.ended()
    with ExitStack() as stack:
        servers = []
        for number in range(3):
            store = post.opened()
            stack.callback(store.close)
            servers.append(post.server(f"server_{number}", store))

        def work(server: Outbox) -> None:
            while post.store.count_deliveries()[DeliveryState.PENDING]:
                post.send_all(server)

        threads = [threading.Thread(target=work, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    ids = [call.headers["webhook-id"] for call in receiver.calls]
    assert len(ids) == len(set(ids)) == 30
    assert post.store.count_deliveries()[DeliveryState.DELIVERED] == 30
    post.store.close()


def test_what_a_dead_server_held_is_sent_by_the_next_when_the_hold_is_over(
    post: Post, receiver: Receiver
) -> None:
    webhook = post.webhook(receiver.url)
    post.ended()
    claimed = post.store.claim_delivery("dead", 30, post.clock())
    assert claimed is not None
    store = post.opened()
    other = post.server("other", store)
    post.send_all(other)
    post.pass_time(29)
    post.send_all(other)
    assert receiver.calls == []
    post.pass_time(2)
    post.send_all(other)
    assert len(receiver.calls) == 1
    # The dead one was only asleep: what it has to say counts no more.
    with pytest.raises(LeaseLost):
        post.store.delivery_failed(claimed[1], post.clock(), error="x")
    assert post.delivery(webhook).state is DeliveryState.DELIVERED
    store.close()


def test_a_clock_that_jumps(post: Post, receiver: Receiver) -> None:
    receiver.answers = [500]
    webhook = post.webhook(receiver.url)
    post.ended()
    post.send_all()
    seconds = post.clock.seconds()
    # A year back: the pause ends all the same, after as many seconds as it has.
    post.clock.now -= timedelta(days=365)
    passed = [0.0]
    post.store.delivery_watch.monotonic = lambda: seconds + passed[0]
    post.send_all()
    passed[0] = 5.0
    post.send_all()
    assert len(receiver.calls) == 1
    passed[0] = 13.0
    post.send_all()
    assert len(receiver.calls) == 2
    assert post.delivery(webhook).state is DeliveryState.DELIVERED


def test_the_signature_has_the_time_of_day(tmp_path: Path, receiver: Receiver) -> None:
    """The clock for what is due may lag after a jump; a receiver compares with its own."""
    post = Post(tmp_path)
    before = time.time()
    webhook = post.webhook(receiver.url)
    post.ended()
    post.send_all()
    stamp = int(receiver.calls[0].headers["webhook-timestamp"])
    assert int(before) <= stamp <= time.time()
    assert webhook.created_at == NOW
    post.store.close()


def test_a_slow_host_keeps_nobody_else_waiting(tmp_path: Path, receiver: Receiver) -> None:
    post = Post(tmp_path)
    release = threading.Event()

    def waits(handler: Any) -> None:
        release.wait(120)
        handler.send_response(200)
        handler.end_headers()

    with receiving() as slow:
        slow.answers = [waits] * 50
        for _ in range(10):
            post.webhook(slow.url, owner="ana")
        fast = post.webhook(receiver.url, owner="bob")
        post.ended(owner="ana")
        post.ended(owner="ana")
        post.ended(owner="bob")
        while post.outbox.run_once():
            pass
        receiver.wait_for_calls(1, timeout_s=120)
        wait_for(lambda: post.delivery(fast).state is DeliveryState.DELIVERED, what="bob's arrives")
        assert slow.most_at_once <= 4
        release.set()
        post.outbox.wait(120)
    post.store.close()


def test_one_webhook_is_asked_one_at_a_time(post: Post, receiver: Receiver) -> None:
    post.webhook(receiver.url)
    for _ in range(5):
        post.ended()
    wait_for(lambda: post.send_all() or len(receiver.calls) == 5, what="five calls")  # type: ignore[func-returns-value]
    assert receiver.most_at_once == 1


def test_a_webhook_that_is_deleted_gets_nothing_more(post: Post, receiver: Receiver) -> None:
    webhook = post.webhook(receiver.url)
    post.ended()
    claimed = post.store.claim_delivery("server", 30, post.clock())
    assert claimed is not None
    post.store.delete_webhook(webhook.id)
    with pytest.raises(LeaseLost):
        post.store.delivery_succeeded(claimed[1], post.clock(), 200)
    with pytest.raises(NotFound):
        post.store.list_deliveries(webhook.id, limit=1)
    post.ended()
    post.pass_time(1000)
    post.send_all()
    assert receiver.calls == []


def test_old_deliveries_are_forgotten_and_pending_ones_never(
    post: Post, receiver: Receiver
) -> None:
    receiver.answers = [200, 500]
    webhook = post.webhook(receiver.url)
    done = post.ended(webhook_url=receiver.url)
    own = post.store.webhook_of_batch(done.id)
    assert own is not None
    post.send_all()
    states = post.store.count_deliveries()
    assert (states[DeliveryState.DELIVERED], states[DeliveryState.PENDING]) == (1, 1)
    assert post.store.forget_deliveries(NOW) == 0
    assert post.store.forget_deliveries(NOW + timedelta(days=1)) == 1
    post.pass_time(13)
    post.send_all()
    assert post.store.forget_deliveries(NOW + timedelta(days=1)) == 1
    assert post.store.get_webhook(webhook.id)
    with pytest.raises(NotFound):
        post.store.get_webhook(own.id)


def test_an_owner_has_so_many_webhooks_at_most(post: Post, receiver: Receiver) -> None:
    post.ended(owner="ana", webhook_url=receiver.url)  # doesn't count
    for number in range(3):
        webhook = requested_webhook(post.settings, receiver.url, NOW, owner="ana")
        if number < 2:
            post.store.add_webhook(webhook, max_webhooks=2)
            continue
        with pytest.raises(TooMany):
            post.store.add_webhook(webhook, max_webhooks=2)
    bobs = requested_webhook(post.settings, receiver.url, NOW, owner="bob")
    post.store.add_webhook(bobs, max_webhooks=2)


def test_the_hold_outlasts_an_attempt(post: Post) -> None:
    assert post.settings.webhook_timeout_s < HOLD_MARGIN_S


def test_the_log_names_the_host_and_nothing_else_of_the_url(
    post: Post, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="batch_app")
    receiver.answers = [500]
    webhook = post.webhook(f"http://127.0.0.1:{receiver.port}/T0K3N?key=hidden")
    batch = post.ended()
    post.send_all()
    text = "\n".join(record.getMessage() for record in caplog.records if "batch_app" in record.name)
    assert batch.id in text
    for secret in ("T0K3N", "hidden", webhook.secret):
        assert secret not in text
    assert json.loads(receiver.calls[0].body)["data"] == {"id": batch.id}
