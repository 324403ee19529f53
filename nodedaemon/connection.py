"""A connection to a container: one exchange at a time on it, kept for the next where that is safe.

Nothing is retried once a byte of a request has gone out: a container that closes a reused connection may have read what
we wrote into it. To keep that race rare a connection is reused only within IDLE_S and after a look at its socket.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from ngpu import wire

from nodedaemon.course import CUSTOMER, Course, NoAnswer
from nodedaemon.held import Hold, Taken
from nodedaemon.http1 import Malformed, ResponseParser

#: How long an unused connection is kept: less than servers commonly do, so that we are the one who closes.
IDLE_S: Final = 1.0
#: Body bytes that wait in a connection for their reader; past it the container waits.
BUFFER_BYTES: Final = wire.CHUNK_BYTES
#: They are kept in pieces, which are no smaller however little the container writes at a time: a byte alone takes 34.
PIECE_BYTES: Final = 4096

#: What any connection's socket has, until it is looked at, which is at once. Without it each look would make, and give
#: back, memory for the most that there could be, which costs as much as all else that is done with a small answer.
_RECEIVED: Final = memoryview(bytearray(256 * 1024))
#: (host, port).
Address = tuple[str, int]


class Connection(asyncio.BufferedProtocol):
    """One connection. `begin` an exchange, then `wait` and `take` until it is `over` and nothing is buffered."""

    def __init__(
        self, sock: socket.socket, address: Address, monotonic: Callable[[], float], hold: Hold | None = None
    ) -> None:
        self._sock = sock
        self._hold = hold
        # The kernel's counts, when all that was begun is over.
        self._sent_bytes = hold.begins_at if hold is not None else 0
        self._received_bytes = 0
        # Another daemon could wait for the answer.
        self._noted = False
        self._monotonic = monotonic
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._course: Course | None = None
        self._fault: NoAnswer | None = None
        self._pieces: list[bytes] = []
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._call: Callable[[], None] | None = None
        # The reader wakes once it has this many body bytes, or there will be no more.
        self._wanted = 0
        self._reading = True
        # The socket has not yet taken all that was written.
        self._unflushed = False
        self._written_all = False
        self._lost = False
        self._idle_since = 0.0
        self.address = address
        self.response = ResponseParser("GET")
        self.buffered_bytes = 0

    @property
    def answered(self) -> bool:
        """The answer is complete; nothing went wrong."""
        return self.response.complete and self._fault is None

    @property
    def over(self) -> bool:
        """The answer is complete, or there will be none."""
        return self.response.complete or self._fault is not None

    @property
    def reusable(self) -> bool:
        """Another exchange may follow on it."""
        sent = self._written_all and not self._unflushed
        return self.response.complete and self.response.reusable and sent and not self._lost

    def begin(
        self,
        method: str,
        data: bytes,
        course: Course,
        *,
        whole: bool,
        switches: bool = False,
        later_bytes: int = 0,
        errand: bytes | None = None,
    ) -> bool:
        """Send a request's beginning (all of it, if `whole`). False: the container is gone and no byte went out.

        `switches`: the answer may be a change of protocol; what comes after it is taken like a body. `later_bytes`: so
        many will follow. `errand`: noted, so that another daemon can wait for the answer.
        """
        if self._lost:
            return False
        self._sent_bytes += len(data) + later_bytes
        self._noted = False
        if self._hold is not None and errand is not None:
            self._noted = True
            self._hold.note(errand, sent=self._sent_bytes, received=self._received_bytes, now=self._monotonic())
        # By our own hand, not the transport's: so that we know whether a byte went out.
        try:
            written = self._sock.send(data)
        except BlockingIOError:
            written = 0
        except OSError:
            return False
        self.response = ResponseParser(method, switches=switches)
        self._course = course
        self._written_all = whole
        course.begun()
        if written < len(data):
            self._transport.write(data[written:])
        elif whole:
            course.sent()
        return True

    def go_on(self, method: str, course: Course, taken: Taken) -> None:
        """With an exchange that an earlier daemon began: all that is left of it is the answer."""
        self._sent_bytes, self._received_bytes = taken.sent, taken.received
        self._noted = True
        self.response = ResponseParser(method)
        self._course = course
        self._written_all = True

    def leave(self) -> bool:
        """Leave the exchange to the next daemon, if it only waits for the answer; then close this end of it."""
        course = self._course
        if course is None or not course.sent_at or course.first_byte_at or self.over or self._lost:
            return False
        if self._hold is None or not self._noted or not self._hold.leave():
            return False
        self.abort()
        return True

    async def write(self, data: bytes) -> None:
        """Send more of the request; returns when the socket has taken it, or the exchange is over."""
        self._transport.write(data)
        if self._unflushed and not self.over:
            self._writer = self._loop.create_future()
            await self._writer

    def written(self) -> None:
        """That was all of the request."""
        self._written_all = True
        if not self._unflushed and self._course is not None:
            self._course.sent()

    def shut(self) -> None:
        """Nothing more will be sent; what the container still sends is received."""
        if not self._lost:
            self._transport.write_eof()

    def call_when(self, wanted_bytes: int, call: Callable[[], None] | None) -> None:
        """As `wait`, for who cannot: call once, as soon as that much is there or the exchange is over. None: do not."""
        self._wanted = wanted_bytes
        self._call = call

    def fail(self, fault: NoAnswer) -> None:
        """End the exchange for that reason, unless its answer is complete."""
        if not self.over:
            self._fault = fault
        self.abort()
        self._wake()

    async def wait(self, wanted_bytes: int, limit_s: float | None = None) -> None:
        """Wait for the head of the answer and so many bytes of its body, or its end, or the limit. Raises NoAnswer."""
        self._wanted = wanted_bytes
        if not self._ready():
            self._reader = self._loop.create_future()
            timer = None if limit_s is None else self._loop.call_later(limit_s, self._wake_reader)
            try:
                await self._reader
            finally:
                if timer is not None:
                    timer.cancel()
        if self._fault is not None:
            raise self._fault

    def take(self) -> bytes:
        """The body bytes that have come since, a chunk at most."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if len(data) > wire.CHUNK_BYTES:
            pieces.append(data[wire.CHUNK_BYTES :])
            data = data[: wire.CHUNK_BYTES]
        self.buffered_bytes -= len(data)
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        return data

    def rest(self) -> None:
        """The exchange is over; keep the connection for another."""
        self._course = None
        self._idle_since = self._monotonic()

    def young(self) -> bool:
        """It has not been unused for too long, and is open as far as we have heard."""
        return not self._lost and self._monotonic() - self._idle_since <= IDLE_S

    def fresh(self) -> bool:
        """Another request may be sent on it, as far as can be seen by looking at its socket."""
        if not self.young():
            return False
        try:
            # Either its end, or words that nobody asked for.
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def discard(self) -> None:
        """Close it before it was made."""
        if self._hold is not None:
            self._hold.let_go()
        self._sock.close()

    def abort(self) -> None:
        """Close it now, whatever is under way."""
        self._lost = True
        if self._hold is not None:
            self._hold.let_go()
        self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # So that `pause_writing` and `resume_writing` say exactly when something is unsent.
        transport.set_write_buffer_limits(high=0)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the next bytes go."""
        return _RECEIVED

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the answer."""
        self._receive(bytes(_RECEIVED[:nbytes]))

    def _receive(self, data: bytes) -> None:
        self._received_bytes += len(data)
        course, response = self._course, self.response
        if course is None or self.over:
            # Nobody asked for it.
            self.abort()
            return
        try:
            body = response.feed(data)
        except Malformed as fault:
            course.heard(answered=False, ended=False)
            self.fail(NoAnswer("BAD_RESPONSE", CUSTOMER, f"The container's answer is not valid HTTP: {fault}."))
            return
        course.heard(answered=response.head_complete, ended=response.complete)
        if body:
            self._keep(body)
            self.buffered_bytes += len(body)
            course.received_bytes += len(body)
            if self.buffered_bytes >= BUFFER_BYTES and self._reading:
                self._reading = False
                self._transport.pause_reading()
        self._wake()

    def _keep(self, body: bytes) -> None:
        pieces = self._pieces
        if pieces and len(pieces[-1]) < PIECE_BYTES:
            pieces[-1] += body
        else:
            pieces.append(body)

    def eof_received(self) -> None:
        """The container closed its side."""
        self._close(proper=True)
        # What it has not read by now it never will.
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection, whoever brought it about."""
        if exc is not None:
            # A write failed, say. An answer given before the request was read (413) may still lie in the socket.
            self._read_rest()
        self._lost = True
        if self._hold is not None:
            self._hold.let_go()
        self._close(proper=False)

    def pause_writing(self) -> None:
        """The socket did not take all."""
        self._unflushed = True

    def resume_writing(self) -> None:
        """The socket has taken all."""
        self._unflushed = False
        if self._written_all and self._course is not None:
            self._course.sent()
        self._wake_writer()

    def _ready(self) -> bool:
        return self.over or (self.response.head_complete and self.buffered_bytes >= self._wanted)

    def _wake(self) -> None:
        over = self.over
        if over or self._ready():
            call, self._call = self._call, None
            if call is not None:
                call()
            self._wake_reader()
        if over:
            self._wake_writer()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _close(self, *, proper: bool) -> None:
        """There will be no more bytes. `proper`: because the container said so; a reset ends no answer."""
        course = self._course
        if course is None or self.over:
            return
        if proper and self.response.eof():
            course.heard(answered=True, ended=True)
        else:
            self._fault = NoAnswer("CONNECTION_CLOSED", CUSTOMER, self._closed_when(course))
        self._wake()

    def _closed_when(self, course: Course) -> str:
        if not course.first_byte_at:
            return "The container closed the connection without an answer."
        if not self.response.head_complete:
            return "The container closed the connection in the middle of its answer's head."
        of = "" if self.response.length is None else f" of {self.response.length}"
        return (
            f"The container closed the connection in the middle of its answer, after {course.received_bytes}{of} bytes."
        )

    def _read_rest(self) -> None:
        with contextlib.suppress(OSError):
            while not self.over and (data := self._sock.recv(BUFFER_BYTES)):
                self._receive(data)
