"""The outbox: sends what the store says is to be announced to webhooks, until it has arrived.

One in each API server. Each attempt runs in a thread of its own, a few at once, so that a slow
host keeps nobody else waiting. An attempt that is cut off leaves its row held; when the hold has
run out, this server or another tries again. So an event may arrive twice, under the same
`webhook-id`, and is never lost.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx

from batch_app import __version__
from batch_app.clock import DueClock
from batch_app.config import Settings
from batch_app.core import utc_now
from batch_app.errors import BatchAppError, ConfigError, LeaseLost
from batch_app.store import Store
from batch_app.webhook_targets import Resolve, Target, TargetRefused, WebhookTargets, resolve
from batch_app.webhooks import (
    MAX_BACKOFF_S,
    Webhook,
    WebhookDelivery,
    backoff_s,
    event_body,
    signed_headers,
)

logger = logging.getLogger(__name__)

#: Attempts under way at once: of this server, and of one owner.
MAX_SENDING = 8
MAX_SENDING_OF_OWNER = 4
#: On top of an attempt's own time, for whatever holds its thread up.
HOLD_MARGIN_S = 60.0
#: Answers that say when to come back.
_BUSY = frozenset({httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE})


class Outbox:
    """`run_once` begins attempts and doesn't wait for them; `on_end` is called after each.

    Raises ConfigError where `webhook_ca_file` can't be read.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        holder: str,
        *,
        clock: Callable[[], datetime] | None = None,
        time_of_day: Callable[[], datetime] = utc_now,
        resolve: Resolve = resolve,
    ) -> None:
        self._settings = settings
        self._store = store
        self._holder = holder
        self._clock = clock or DueClock()
        self._time_of_day = time_of_day
        self._targets = WebhookTargets(settings.webhook_allowed_hosts, resolve)
        self._tls = tls_context(settings)
        self._lock = threading.Lock()
        self._sending: dict[str, str | None] = {}  # webhook to owner
        self._threads: set[threading.Thread] = set()
        self.on_end: Callable[[], None] = lambda: None

    def run_once(self) -> bool:
        """Begin to send one event that is due. Returns whether there may be another.

        Raises StoreUnavailable, StorageFull.
        """
        with self._lock:
            if len(self._sending) >= MAX_SENDING:
                return False
            webhooks = set(self._sending)
            of_owners = Counter(self._sending.values())
        claimed = self._store.claim_delivery(
            self._holder,
            self._settings.webhook_timeout_s + HOLD_MARGIN_S,
            self._clock(),
            busy_webhooks=webhooks,
            busy_owners={owner for owner, num in of_owners.items() if num >= MAX_SENDING_OF_OWNER},
        )
        if claimed is None:
            return False
        webhook, delivery = claimed
        # A daemon: at the end of the process nothing waits for a slow host.
        thread = threading.Thread(
            target=self._send, args=(webhook, delivery), name="webhook", daemon=True
        )
        with self._lock:
            self._sending[webhook.id] = webhook.owner
            self._threads.add(thread)
        thread.start()
        return True

    def wait(self, timeout_s: float) -> None:
        """For the attempts under way, so long at most each."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout_s)

    def _send(self, webhook: Webhook, delivery: WebhookDelivery) -> None:
        try:
            self._attempt(webhook, delivery)
        except LeaseLost:
            pass  # deleted, or taken for dead; whoever has it now goes on
        except BatchAppError as error:
            logger.warning("The attempt at %s isn't noted: %s", delivery.id, error.message)
        except Exception:
            logger.exception("The attempt at %s failed on an internal error.", delivery.id)
        finally:
            with self._lock:
                del self._sending[webhook.id]
                self._threads.discard(threading.current_thread())
            self.on_end()

    def _attempt(self, webhook: Webhook, delivery: WebhookDelivery) -> None:
        answer: httpx.Response | None = None
        try:
            answer = asyncio.run(self._post(webhook, delivery))
            error = _refusal(answer.status_code)
        except TargetRefused as refused:
            error = str(refused)
        except (TimeoutError, httpx.TimeoutException):
            error = f"No answer within {self._settings.webhook_timeout_s:g} s."
        except (OSError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as failure:
            error = _in_words(failure)
        now = self._clock()
        host = httpx.URL(webhook.url).host  # the rest of a URL may be a secret
        if error is None:
            assert answer is not None
            self._store.delivery_succeeded(delivery, now, answer.status_code)
            logger.info("Told %s of %s (%s).", host, delivery.batch_id, delivery.type)
            return
        status_code = None if answer is None else answer.status_code
        disables = status_code == httpx.codes.GONE
        again_in_s = None
        attempts = 1 if delivery.is_test else self._settings.webhook_attempts
        if not disables and delivery.attempts < attempts:
            again_in_s = backoff_s(delivery.attempts, self._settings.webhook_backoff_s)
            if answer is not None and status_code in _BUSY:
                again_in_s = max(again_in_s, self._retry_after_s(answer))
        self._store.delivery_failed(
            delivery,
            now,
            error=error,
            status_code=status_code,
            again_in_s=again_in_s,
            disables=disables,
        )
        logger.warning(
            "%s was not told of %s (%s), attempt %d: %s %s",
            host,
            delivery.batch_id,
            delivery.type,
            delivery.attempts,
            error,
            "Given up." if again_in_s is None else f"Again in {again_in_s:.0f} s.",
        )

    async def _post(self, webhook: Webhook, delivery: WebhookDelivery) -> httpx.Response:
        """The head of the answer; its body is of no use, and not read."""
        body = event_body(delivery)
        async with asyncio.timeout(self._settings.webhook_timeout_s):
            target = await asyncio.to_thread(self._targets.target, webhook.url)
            headers = signed_headers(webhook.secret, delivery.id, body, self._time_of_day())
            async with httpx.AsyncClient(
                verify=self._tls,
                trust_env=False,  # no proxy, no .netrc
                follow_redirects=False,
                timeout=self._settings.webhook_timeout_s,
            ) as client:
                failure: httpx.ConnectError | None = None
                for address in target.addresses:
                    request = _request(client, target, address, headers, body)
                    try:
                        answer = await client.send(request, stream=True)
                    except httpx.ConnectError as error:
                        failure = error
                        continue
                    await answer.aclose()
                    return answer
                assert failure is not None
                raise failure

    def _retry_after_s(self, answer: httpx.Response) -> float:
        """What the host asks for, within bounds; 0 where it asks for nothing."""
        asked = answer.headers.get("retry-after", "").strip()
        if asked.isascii() and asked.isdecimal():
            return min(float(asked[:9]), MAX_BACKOFF_S)
        with suppress(ValueError, TypeError):
            pause = parsedate_to_datetime(asked) - self._time_of_day()
            return min(max(pause.total_seconds(), 0.0), MAX_BACKOFF_S)
        return 0.0


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Raises ConfigError."""
    context = httpx.create_ssl_context(trust_env=False)
    if settings.webhook_ca_file is not None:
        try:
            context.load_verify_locations(settings.webhook_ca_file)
        except OSError as error:
            raise ConfigError(f"webhook_ca_file can't be used: {error}") from error
    return context


def _request(
    client: httpx.AsyncClient, target: Target, address: str, headers: dict[str, str], body: bytes
) -> httpx.Request:
    """To this very address, under the name of the URL: in `Host`, and for TLS."""
    return client.build_request(
        "POST",
        target.url.copy_with(host=address),
        content=body,
        headers={
            **headers,
            "host": target.url.netloc.decode("ascii"),
            "content-type": "application/json",
            "user-agent": f"vllm-batch-server/{__version__}",
        },
        extensions={"sni_hostname": target.url.raw_host.decode("ascii").strip("[]")},
    )


def _refusal(status_code: int) -> str | None:
    if 200 <= status_code < 300:
        return None
    if 300 <= status_code < 400:
        return f"Answered {status_code}: redirects are not followed."
    if status_code == httpx.codes.GONE:
        return "Answered 410 Gone: the webhook is disabled."
    return f"Answered {status_code}."


def _in_words(failure: Exception) -> str:
    """What went wrong, of a fixed kind: an exception's own text may name what is secret."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "Its TLS certificate can't be trusted."
        if isinstance(cause, ssl.SSLError):
            return "TLS failed."
        cause = cause.__cause__ or cause.__context__
    if isinstance(failure, httpx.ConnectError):
        return "Can't connect."
    if isinstance(failure, httpx.HTTPError):
        return "The connection broke, or what came is no HTTP."
    return "Its name can't be resolved."
