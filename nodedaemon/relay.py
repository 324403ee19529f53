"""One HTTP exchange with one container: the request as it came in a Start, the answer as it goes into a Result.

A small answer is collected and rides inline; a large or streamed one goes to a sink as it comes, with back-pressure,
so that memory does not grow with bodies. Redirects are not followed, nothing is decompressed, no cookie and no proxy
is known.
"""

import asyncio
import codecs
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
from ngpu import wire
from ngpu.v1 import http_pb2

from nodedaemon.connection import Address, Connection
from nodedaemon.connections import Connections
from nodedaemon.course import CUSTOMER, PLATFORM, Course, NoAnswer
from nodedaemon.held import Held, Taken
from nodedaemon.http1 import ResponseParser

log = structlog.get_logger()

#: The head of a streamed answer waits this long for the end of its body: most are over by then and need no stream.
TAIL_S: Final = 0.02
#: Nobody waits for the end of this one.
_EVENTS: Final = b"text/event-stream"
#: A container has this long to see that its caller has closed a connection that is no longer HTTP.
CLOSE_S: Final = 1.0


class Sink(Protocol):
    """Where a large or streamed body goes."""

    async def write(self, data: bytes) -> None:
        """Take it; back-pressure is to return late. Raises OSError."""

    def end(self) -> None:
        """That was all."""


class Tunnel(Protocol):
    """The caller's side of a connection that is no longer HTTP."""

    async def read(self) -> bytes:
        """The next bytes for the container; empty at the end. Raises NoAnswer: nobody takes the connection."""

    async def write(self, data: bytes) -> None:
        """Bytes of the container; back-pressure is to return late. Nothing happens once the caller has gone."""

    async def end(self) -> None:
        """The container has closed: returns when the caller has all that was written."""

    def close(self) -> None:
        """Let go of it, whatever is under way."""


@dataclass(slots=True)
class Exchange:
    """What is asked of a container.

    `payload`: the head, and what is inline of the body. `upload`: the rest of the body, if there is more. `begin` is
    called when connected, before the first byte goes out: whether the address is still the container's is to be asked
    there. `open_body` is called with the head of an answer whose body needs a sink. Both may raise NoAnswer.
    `open_tunnel`: it asks for another protocol, and this is for the bytes after the container's 101. `errand`: what
    another daemon needs to go on with it. `taken`: with this one an earlier daemon began, and `payload` has gone out.
    `connection` is set while there is one.
    """

    container_id: str
    address: Address
    method: str
    payload: bytes
    begin: Callable[[], None]
    open_body: Callable[[http_pb2.HttpResponse], Sink]
    upload: AsyncGenerator[bytes, None] | None = None
    upload_bytes: int = 0
    limit_bytes: int = 0
    streamed: bool = False
    open_tunnel: Callable[[http_pb2.HttpResponse], Awaitable[Tunnel]] | None = None
    errand: bytes | None = None
    taken: Taken | None = None
    connection: Connection | None = None


def rest_of(taken: Taken, open_body: Callable[[http_pb2.HttpResponse], Sink]) -> Exchange:
    """What is left of an exchange that an earlier daemon began."""
    errand = taken.errand
    return Exchange(
        container_id=errand.container_id,
        address=taken.address,
        method="HEAD" if errand.is_head else "",
        payload=b"",
        begin=nothing,
        open_body=open_body,
        limit_bytes=errand.start.response_body_limit_bytes,
        streamed=errand.start.streamed and errand.job is None,
        taken=taken,
    )


class Relay:
    """Does exchanges; keeps connections between them."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, held: Held | None = None) -> None:
        self._connections = Connections(monotonic, held)

    @property
    def holds(self) -> bool:
        """Connections may outlive the daemon, if errands are given."""
        return self._connections.held is not None

    async def run(self, exchange: Exchange, course: Course, response: http_pb2.HttpResponse) -> None:
        """Do it, and fill `response` in: body inline, or its size alone if it went to a sink. Raises NoAnswer.

        Cancelling it closes the container's connection. `course` is true at every moment.
        """
        if exchange.connection is not None:
            connection = exchange.connection
        elif exchange.taken is None:
            connection = await self._begin(exchange, course)
        else:
            connection = await self._connections.take_up(exchange.taken, exchange.address, exchange.method, course)
        exchange.connection = connection
        upload = exchange.upload
        sending = None if upload is None else asyncio.create_task(_send(connection, upload), name="upload")
        try:
            await _receive(connection, exchange, course, response)
        except BaseException:
            connection.abort()
            raise
        finally:
            # From now on it may be another's.
            exchange.connection = None
            if sending is not None:
                sending.cancel()
                await asyncio.wait([sending])
        self._connections.keep(exchange.container_id, connection)

    def begin_now(self, exchange: Exchange, course: Course, then: Callable[[], None]) -> bool:
        """Send it on a connection that is kept, if that is all it takes; False: `run` is to begin it. Raises NoAnswer.

        `then` is called once the answer is there, or something else that is to be seen to: see `end_now`.
        """
        if exchange.upload is not None or exchange.open_tunnel is not None:
            return False
        connection = self._connections.idle(exchange.container_id, exchange.address)
        if connection is None or not _send_first(connection, exchange, course):
            return False
        exchange.connection = connection
        connection.call_when(_wanted(exchange), then)
        return True

    def end_now(self, exchange: Exchange, course: Course, response: http_pb2.HttpResponse) -> bool:
        """Fill `response` in if all of the answer is there and small; False: `run` is to go on with the exchange."""
        connection = exchange.connection
        assert connection is not None
        size = course.received_bytes
        if not connection.answered or size > wire.INLINE_BYTES or 0 < exchange.limit_bytes < size:
            return False
        _fill_head(response, connection.response)
        _fill_body(response, connection.take())
        exchange.connection = None
        self._connections.keep(exchange.container_id, connection)
        return True

    def step_in(self, exchange: Exchange, *, abort: bool) -> None:
        """What `begin_now` began is the caller's of `run` from now on; or is over, if `abort`."""
        if exchange.connection is not None:
            exchange.connection.call_when(0, None)
            if abort:
                exchange.connection.abort()

    def close(self) -> None:
        """Close connections that are kept."""
        self._connections.close()

    async def _begin(self, exchange: Exchange, course: Course) -> Connection:
        """A connection on which the first bytes have gone out."""
        # A body that takes its time is not risked on a connection that may be about to close.
        if exchange.upload is None:
            connection = self._connections.idle(exchange.container_id, exchange.address)
            if connection is not None and _send_first(connection, exchange, course):
                return connection
        connection = await self._connections.new(exchange.address)
        if not _send_first(connection, exchange, course):
            raise NoAnswer("CONNECT_FAILED", PLATFORM, "The container closed the connection before a byte was sent.")
        return connection


def _send_first(connection: Connection, exchange: Exchange, course: Course) -> bool:
    """Send the first bytes. False: the connection was gone, and none went out. Raises NoAnswer."""
    try:
        exchange.begin()
        begun = connection.begin(
            exchange.method,
            exchange.payload,
            course,
            whole=exchange.upload is None,
            switches=exchange.open_tunnel is not None,
            later_bytes=exchange.upload_bytes,
            errand=exchange.errand,
        )
    except BaseException:
        connection.abort()
        raise
    if not begun:
        connection.abort()
        return False
    # An attempt may run for long: keep no more of it than is needed.
    exchange.payload, exchange.errand = b"", None
    return True


def _wanted(exchange: Exchange) -> int:
    """How much of an answer's body is to be there before anything is done with it."""
    return 0 if exchange.streamed else wire.INLINE_BYTES + 1


async def _send(connection: Connection, upload: AsyncGenerator[bytes, None]) -> None:
    """Send the rest of the request's body. Its failure is the exchange's."""
    try:
        async with contextlib.aclosing(upload):
            async for data in upload:
                if connection.over:
                    return
                await connection.write(data)
        connection.written()
    except NoAnswer as fault:
        connection.fail(fault)
    except Exception:
        log.exception("relay_upload_broken")
        connection.fail(NoAnswer("INTERNAL", PLATFORM, "The node failed while it sent the request; its log says why."))


async def _receive(connection: Connection, exchange: Exchange, course: Course, response: http_pb2.HttpResponse) -> None:
    await connection.wait(_wanted(exchange))
    answer = connection.response
    if exchange.open_tunnel is not None and answer.status == 101:
        _fill_head(response, answer)
        await _tunnel(connection, await exchange.open_tunnel(response))
        return
    if exchange.streamed and not connection.over and not _is_events(answer):
        await connection.wait(wire.INLINE_BYTES + 1, TAIL_S)
    _fill_head(response, answer)
    _check_limit(max(answer.length or 0, course.received_bytes), exchange.limit_bytes)
    if connection.over and connection.buffered_bytes <= wire.INLINE_BYTES:
        _fill_body(response, connection.take())
        return
    response.body.size = answer.length or 0
    sink = exchange.open_body(response)
    # Nobody reads the beginning of an answer that is not streamed, and a message costs what a third of a chunk does.
    wanted = 1 if exchange.streamed else wire.CHUNK_BYTES
    utf8 = _Utf8()
    size = 0
    while True:
        data = connection.take()
        size += len(data)
        _check_limit(size, exchange.limit_bytes)
        if data:
            utf8.feed(data)
            try:
                await sink.write(data)
            except OSError as fault:
                raise NoAnswer(
                    "INTERNAL", PLATFORM, f"The node could not store the container's answer: {fault.strerror}."
                ) from None
        elif connection.over:
            break
        await connection.wait(wanted)
    response.body.size = size
    response.body.is_utf8 = utf8.end()
    sink.end()


def _fill_head(response: http_pb2.HttpResponse, answer: ResponseParser) -> None:
    response.status = answer.status
    response.headers.extend(answer.headers)


def _fill_body(response: http_pb2.HttpResponse, data: bytes) -> None:
    body = response.body
    body.inline = data
    body.size = len(data)
    body.is_utf8 = is_utf8(data)


def _is_events(answer: ResponseParser) -> bool:
    return any(
        field.name.lower() == "content-type" and field.value.lower().startswith(_EVENTS) for field in answer.headers
    )


async def _tunnel(connection: Connection, tunnel: Tunnel) -> None:
    """Bytes both ways until either side closes. Raises NoAnswer if nobody takes the connection."""
    upward = asyncio.create_task(_upward(connection, tunnel), name="tunnel up")
    downward = asyncio.create_task(_downward(connection, tunnel), name="tunnel down")
    try:
        await asyncio.wait({upward, downward}, return_when=asyncio.FIRST_COMPLETED)
        if downward.done():
            downward.result()
            connection.shut()
            await asyncio.wait({upward}, timeout=CLOSE_S)
        else:
            upward.result()
    finally:
        tunnel.close()
        upward.cancel()
        downward.cancel()
        await asyncio.wait({upward, downward})


async def _upward(connection: Connection, tunnel: Tunnel) -> None:
    """From the container. That it breaks the connection off is an end like any other."""
    with contextlib.suppress(NoAnswer):
        while (data := connection.take()) or not connection.over:
            for at in range(0, len(data), wire.CHUNK_BYTES):
                await tunnel.write(data[at : at + wire.CHUNK_BYTES])
            await connection.wait(1)
    await tunnel.end()


async def _downward(connection: Connection, tunnel: Tunnel) -> None:
    """To the container."""
    while data := await tunnel.read():
        await connection.write(data)


def _check_limit(size: int, limit: int) -> None:
    if limit and size > limit:
        raise NoAnswer(
            "RESPONSE_TOO_LARGE",
            CUSTOMER,
            f"The container's answer is larger than the workspace's limit of {limit} bytes.",
        )


def is_utf8(data: bytes) -> bool:
    """Is the whole of it valid UTF-8?"""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def nothing() -> None:
    """Do nothing."""


class _Utf8:
    """Is a body, taken piece by piece, valid UTF-8?"""

    def __init__(self) -> None:
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()

    def feed(self, data: bytes, *, final: bool = False) -> None:
        """The next piece."""
        if self._decoder is not None:
            try:
                self._decoder.decode(data, final)
            except UnicodeDecodeError:
                self._decoder = None

    def end(self) -> bool:
        """The answer, after the last piece."""
        self.feed(b"", final=True)
        return self._decoder is not None
