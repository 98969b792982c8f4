"""An httpx transport that never gives a request the answer to another one.

An HTTP/1.1 answer has no sign of the request that it belongs to: the first that arrives counts.
A server (or proxy) that answers one request twice therefore shifts the answers of every later
request on that connection. This transport reuses a connection only if nothing follows the answer:

- Bytes behind an answer close the connection, wherever they wait: in the parser, in TLS, in the
  socket, or still on their way for `SILENCE_S`, for which a connection rests before it is reused.
- From then on each request to that server gets a connection of its own.
- An answer on a connection that was used before isn't believed if bytes follow it: it may be the
  late second answer to the request before.

Bytes that arrive later than that, after the next request was sent, can't be told from its answer.
`ServerClient` finds them where the server repeats the id of a request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import select
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import h11
import httpx

logger = logging.getLogger(__name__)

#: How long a connection has to be silent before it is reused. Costs a few more connections.
SILENCE_S = 0.1
#: Of an answer's status line and headers.
MAX_HEAD_BYTES = 100 * 1024
#: Received bytes that wait to be read before the connection is held up.
_MAX_WAITING_BYTES = 1 << 20
#: Seconds between the attempts at a host's addresses.
_NEXT_ADDRESS_S = 0.25
_CUT_OFF = "The server closed the connection without an answer."
_TWO_ANSWERS = "The server sent more than one answer to a request."

_Origin = tuple[str, str, int]


class TwoAnswers(httpx.RemoteProtocolError):
    """More followed an answer, so that it may be the answer to another request."""


class _Connection(asyncio.Protocol):
    """One connection and the parser of its answers. `num_requests`: sent on it so far."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.idle_since: float | None = None
        self.had_surplus = False
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._has_ended = False
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    # -- as asyncio calls them -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.num_requests or self.idle_since is not None:
            self.had_surplus = True  # nobody asked for it
            self.close()
            return
        self._received += data
        if len(self._received) > _MAX_WAITING_BYTES:
            self._transport.pause_reading()
        self._news.set()

    def eof_received(self) -> None:
        self._has_ended = True
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._has_ended, self._error = True, error
        self._news.set()

    # -- one request ---------------------------------------------------------------------------

    def send(self, request: httpx.Request, body: bytes) -> None:
        """Hand the request to the system. Doesn't wait: the answer may come before it is sent."""
        self.num_requests += 1
        self.idle_since = None
        target = request.url.raw_path
        head = h11.Request(method=request.method, target=target, headers=request.headers.raw)
        parts = [self._http.send(head)]
        if body:
            parts.append(self._http.send(h11.Data(data=body)))
        parts.append(self._http.send(h11.EndOfMessage()))
        self._transport.write(b"".join(part for part in parts if part))

    async def head(self) -> h11.Response:
        """The answer's status and headers; what a server says before (1xx) is passed over."""
        while not isinstance(event := await self._next(), h11.Response):
            pass
        return event

    async def body(self) -> AsyncIterator[bytes]:
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _next(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.ConnectionClosed):
                raise httpx.RemoteProtocolError(_CUT_OFF)
            if event is not h11.NEED_DATA:
                assert not isinstance(event, type), "nothing is read behind an answer"
                return event
            self._http.receive_data(await self._read())

    async def _read(self) -> bytes:
        """What has come since; empty at the end of the connection. Raises OSError."""
        while not self._received:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                if self._http.their_state is h11.SEND_RESPONSE:
                    raise httpx.RemoteProtocolError(_CUT_OFF)
                return b""
            self._news.clear()
            await self._news.wait()
        data = bytes(self._received)
        self._received.clear()
        if len(data) > _MAX_WAITING_BYTES:
            self._transport.resume_reading()
        return data

    # -- and the next --------------------------------------------------------------------------

    async def look_for_surplus(self) -> None:
        """Note whether more came behind the answer. What is in the socket is read before."""
        for _ in range(2):  # the first look at the socket comes after the first turn
            await asyncio.sleep(0)
        self.had_surplus = bool(self._received or self._http.trailing_data[0])

    def rest(self) -> bool:
        """Get ready for another request, if that is possible; from now on nothing may come."""
        states = (self._http.our_state, self._http.their_state)
        is_whole = states == (h11.DONE, h11.DONE) and not self._transport.get_write_buffer_size()
        if not is_whole or self._has_ended or self._transport.is_closing():
            return False
        self._http.start_next_cycle()
        self.idle_since = time.monotonic()
        return True

    def is_silent(self) -> bool:
        """Whether nothing has come since, not even the end of the connection."""
        if self._has_ended or self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._transport.abort()


class SingleAnswerTransport(httpx.AsyncBaseTransport):
    """Speaks HTTP/1.1, for one event loop. Of the timeouts it keeps `connect`.

    `is_reusing`: whether a connection may have more than one request. Becomes false, for good,
    with the first bytes that nobody asked for.
    """

    def __init__(
        self, tls: ssl.SSLContext, *, max_idle: int, keepalive_s: float, reuse: bool = True
    ) -> None:
        """`max_idle`: connections that are kept. `keepalive_s`: how long, at most."""
        self.is_reusing = reuse
        self._tls = tls
        self._max_idle = max_idle
        self._keepalive_s = keepalive_s
        self._idle: dict[_Origin, deque[_Connection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        origin = (url.scheme, url.raw_host.decode("ascii").strip("[]"), port)
        body = await request.aread()
        connection = self._take(origin)
        if connection is None:
            connection = await self._connect(origin, request)
        if not self.is_reusing:
            request.headers["connection"] = "close"
        try:
            with _httpx_errors():
                connection.send(request, body)
                head = await connection.head()
        except BaseException:
            connection.close()
            raise
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_Body(self, origin, connection),
        )

    def stop_reusing(self) -> None:
        """A connection of its own for each request, from now on."""
        if self.is_reusing:
            logger.warning(
                "The server sent something that no request asked for. Connections to it are not "
                "reused from now on. It, or a proxy before it, has a defect: answers may have "
                "gone to the wrong request if it happened before without being noticed."
            )
        self.is_reusing = False
        self._close_idle()

    async def aclose(self) -> None:
        self._close_idle()
        await asyncio.sleep(0)  # closed in the loop's next turn

    # -- inside --------------------------------------------------------------------------------

    def _take(self, origin: _Origin) -> _Connection | None:
        """The one that has been silent longest, if that is long enough."""
        idle = self._idle.get(origin, deque())
        if any(connection.had_surplus for connection in idle):
            self.stop_reusing()
        now = time.monotonic()
        while idle:
            assert idle[0].idle_since is not None
            silent_s = now - idle[0].idle_since
            if silent_s < SILENCE_S:
                return None
            connection = idle.popleft()
            if silent_s < self._keepalive_s and connection.is_silent():
                return connection
            connection.close()
        return None

    async def _connect(self, origin: _Origin, request: httpx.Request) -> _Connection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        timeout_s = request.extensions.get("timeout", {}).get("connect")
        tls = self._tls if scheme == "https" else None
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    _Connection, host, port, ssl=tls, happy_eyeballs_delay=_next_address_s(host)
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout("No connection in time.", request=request) from error
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError("No connection.", request=request) from error
        return connection

    async def put_back(self, origin: _Origin, connection: _Connection) -> None:
        """The answer was read to its end. Raises TwoAnswers where it may be another's."""
        await connection.look_for_surplus()
        if connection.had_surplus:
            connection.close()
            self.stop_reusing()
            if connection.num_requests > 1:
                raise TwoAnswers(_TWO_ANSWERS)
            return
        idle = self._idle.setdefault(origin, deque())
        if not self.is_reusing or len(idle) >= self._max_idle or not connection.rest():
            connection.close()
            return
        idle.append(connection)

    def _close_idle(self) -> None:
        for idle in self._idle.values():
            while idle:
                idle.popleft().close()


class _Body(httpx.AsyncByteStream):
    """An answer's body; closes its connection, unless it was read to its end."""

    def __init__(
        self, transport: SingleAnswerTransport, origin: _Origin, connection: _Connection
    ) -> None:
        self._transport = transport
        self._origin = origin
        self._connection: _Connection | None = connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        if connection is None:
            return
        with _httpx_errors():
            async for chunk in connection.body():
                yield chunk
            await self._transport.put_back(self._origin, connection)
            self._connection = None

    async def aclose(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _next_address_s(host: str) -> float | None:
    """None for an address, which is the only one: asyncio may leave a socket open when an attempt
    at one of several is cancelled (Python 3.11)."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return _NEXT_ADDRESS_S
    return None


@contextmanager
def _httpx_errors() -> Iterator[None]:
    try:
        yield
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    except h11.LocalProtocolError as error:
        raise httpx.LocalProtocolError(str(error)) from error
    except OSError as error:
        raise httpx.ReadError("The connection broke.") from error
