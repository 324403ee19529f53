"""A caller's connection: plain requests are answered here; at the first other one aiohttp takes it over for good.

What aiohttp's server does around each request (two tasks, three futures, a stream, a URL, a writer) costs more than all
that the bridge does for a small call. Here a request is one coroutine, driven by the connection: by what the caller
sends until it waits for the control plane's answer, and by that answer to its end, in the same round of the loop. A
handler that waits for anything else goes on as a task. Until then it is in none of its own, so nothing that is bound to
the task that runs (`asyncio.timeout`, `TaskGroup`) may come before.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, Self, cast

import structlog
from aiohttp import web

from httpbridge.batch import Waiting
from httpbridge.plain import Head, Opened, PlainRequest, parse
from httpbridge.reply import Reply

log = structlog.get_logger(__name__)

#: How long the rest of a body is waited for here, and then with aiohttp's limits.
HOLD_S: Final = 0.2
#: What may come ahead while a call is being answered; past it nothing more is read.
AHEAD_BYTES: Final = 64 * 1024

#: What any connection's socket has, until it is looked at, which is at once. Without it each look would make, and give
#: back, memory for the most that there could be, which costs more than all that is done with a small request.
_RECEIVED: Final = memoryview(bytearray(256 * 1024))

Handle = Callable[[PlainRequest], Coroutine[Any, Any, Reply]]


class Connection(asyncio.BufferedProtocol):
    """One connection, until it ends or is handed over."""

    transport: asyncio.Transport | None = None
    #: The other end's address.
    remote: str | None = None
    #: The caller is slow to read what was written.
    writing_paused = False

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._loop = server.loop
        self._head: Head | None = None
        # The call being answered, and what it waits for: an answer of the control plane, or as a task.
        self._request: PlainRequest | None = None
        self._call: Coroutine[Any, Any, Reply] | None = None
        self._waiting: Waiting | None = None
        self._task: asyncio.Task[None] | None = None
        # What has come and is not begun: a body that is not complete, or what comes ahead.
        self._held = b""
        self._opened: Opened | None = None
        self._hold: asyncio.TimerHandle | None = None
        self._is_closing = False
        self._ended: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._idle_since = 0.0
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self.transport = cast("asyncio.Transport", transport)
        if (connected := transport.get_extra_info("socket")) is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        address = transport.get_extra_info("peername")
        self.remote = str(address[0]) if isinstance(address, tuple) else address
        self._idle_since = self._loop.time()
        self._idle = self._loop.call_at(self._idle_since + self._server.idle_s, self._look)
        self._server.made(self, self.transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Called by the loop."""
        return _RECEIVED

    def buffer_updated(self, nbytes: int) -> None:
        """Called by the loop."""
        self.data_received(bytes(_RECEIVED[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """The next bytes of the caller's."""
        if self._is_closing:
            return
        if self._call is not None:
            # A caller who does not wait for answers.
            self._held += data
            if len(self._held) > AHEAD_BYTES and self.transport is not None:
                self.transport.pause_reading()
            return
        opened = self._opened
        if opened is None:
            opened = parse(data, self._head, self._server.line_bytes)
            if opened is None:
                self._hand_over(data)
                return
        else:
            data = self._held + data
        head, body_at, size = opened
        if len(data) == body_at + size:
            if self._hold is not None:
                self._release()
            self._head = head
            request = self._request = PlainRequest(head, data[body_at:], self)
            self._call = self._server.handle(request)
            self._step()
        elif len(data) > body_at + size:
            self._hand_over(data)
        else:
            self._held, self._opened = data, opened
            if self._hold is None:
                self._hold = self._loop.call_later(self._server.hold_s, self._let_go)

    def _release(self) -> None:
        """Nothing is held any more."""
        self._held, self._opened = b"", None
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None

    def _let_go(self) -> None:
        self._hand_over(self._held)

    def _hand_over(self, data: bytes) -> None:
        """From now on the connection is aiohttp's; `data` is what it begins with."""
        transport = self.transport
        assert transport is not None
        self._release()
        if self._idle is not None:
            self._idle.cancel()
        self._server.lost(self)
        handler = self._server.aiohttp()
        handler.connection_made(transport)
        if self.writing_paused:
            handler.pause_writing()
        transport.set_protocol(handler)
        transport.resume_reading()
        handler.data_received(data)

    def _step(self) -> None:
        """Drive the call to where it waits, or to its answer."""
        call = self._call
        assert call is not None
        try:
            try:
                waiting = call.send(None)
            except StopIteration as ended:
                self._reply(ended.value)
                return
        except (asyncio.CancelledError, ConnectionError):
            self._break_off()
        except Exception:
            # Whoever drives this call has others to drive.
            log.exception("fault")
            self._break_off()
        else:
            if type(waiting) is Waiting:
                self._waiting = waiting
                waiting.resume = self._step
            else:
                self._waiting = None
                self._go_on(self._rest(call, waiting))

    def _reply(self, reply: Reply) -> None:
        """Write what is small at once. What comes in pieces has time limits, which are for tasks."""
        assert self._request is not None
        reply.begin(self._request)
        transport, data = self.transport, reply.in_one()
        if data is None or transport is None or transport.is_closing():
            self._go_on(self._written(reply))
            return
        transport.write(data)
        if not reply.keep_alive:
            self._is_closing = True
        if self.writing_paused:
            self._go_on(reply.drained())
        else:
            self._end()

    async def _rest(self, call: Coroutine[Any, Any, Reply], waiting: object) -> None:
        reply = await _Begun(call, waiting)
        assert self._request is not None
        reply.begin(self._request)
        await self._written(reply)

    async def _written(self, reply: Reply) -> None:
        await reply.write_eof()
        if not reply.keep_alive:
            self._is_closing = True

    def _go_on(self, rest: Coroutine[Any, Any, None]) -> None:
        self._task = self._loop.create_task(rest, name="call")
        self._task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            self._end()
            return
        if error is not None and not isinstance(error, ConnectionError):
            log.error("fault", exc_info=error)
        self._break_off()

    def _break_off(self) -> None:
        self._is_closing = True
        self._end()

    def _end(self) -> None:
        """The call is over."""
        self._call = self._request = self._waiting = None
        if self._ended is not None:
            self._ended.set_result(None)
        if self.transport is None:
            return
        if self._is_closing:
            self.transport.close()
        elif self._held:
            # aiohttp takes requests that come ahead one after the other.
            self._let_go()
        else:
            self._idle_since = self._loop.time()

    def cancel(self) -> None:
        """End the call, if there is one: nobody waits for it any more."""
        if self._task is not None:
            # Not before it has begun: what a call has to clean up, it does where it is cancelled.
            self._loop.call_soon(self._task.cancel)
        elif self._waiting is not None:
            self._waiting.cancel()
            self._step()

    def close(self) -> None:
        """Close it, behind the answer to the call that there is."""
        self._is_closing = True
        if self._call is None and self.transport is not None:
            self.transport.close()

    def ended(self) -> "asyncio.Future[None]":
        """For the end of the call that there is. To be asked once, when the connection is closing."""
        self._ended = self._loop.create_future()
        if self._call is None:
            self._ended.set_result(None)
        return self._ended

    def _look(self) -> None:
        """Has it been idle for too long?"""
        now = self._loop.time()
        end = (now if self._call is not None else self._idle_since) + self._server.idle_s
        if now < end:
            self._idle = self._loop.call_at(end, self._look)
        elif self.transport is not None:
            self.transport.close()

    def pause_writing(self) -> None:
        """Called by the loop."""
        self.writing_paused = True

    def resume_writing(self) -> None:
        """Called by the loop."""
        self.writing_paused = False
        self._wake()

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def drain(self) -> None:
        """Wait until more may be written. Raises ConnectionResetError if the caller has gone."""
        if self.writing_paused and self.transport is not None:
            self._drained = self._loop.create_future()
            await self._drained
        if self.transport is None:
            raise ConnectionResetError("the caller has gone")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Called by the loop."""
        self.transport = None
        self._release()
        if self._idle is not None:
            self._idle.cancel()
        self._server.lost(self)
        self._wake()
        self.cancel()


class _Begun:
    """For a task to go on with a coroutine that waits for something already."""

    __slots__ = ("_call", "_first")

    def __init__(self, call: Coroutine[Any, Any, Reply], first: object) -> None:
        self._call = call
        self._first = [first]

    def __await__(self) -> Generator[Any, None, Reply]:
        return cast("Generator[Any, None, Reply]", self)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._first.pop() if self._first else self._call.send(None)

    def throw(self, error: BaseException) -> Any:
        """What the task is told where it waits is for the coroutine."""
        return self._call.throw(error)


class Server:
    """A factory of connections for `loop.create_server`, at most `most` of them at a time. Made inside the loop.

    `aiohttp` makes those that take over; `full` is what one too many is told.
    """

    def __init__(
        self,
        handle: Handle,
        aiohttp: web.Server,
        *,
        most: int,
        idle_s: float,
        line_bytes: int,
        full: bytes,
        hold_s: float = HOLD_S,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.handle = handle
        self.aiohttp = aiohttp
        self.idle_s = idle_s
        self.line_bytes = line_bytes
        self.hold_s = hold_s
        self._most = most
        self._full = full
        self._plain: set[Connection] = set()

    def __call__(self) -> Connection:
        """Called by the loop for each."""
        return Connection(self)

    @property
    def connections(self) -> list[object]:
        """All that there are."""
        return [*self._plain, *self.aiohttp.connections]

    def made(self, connection: Connection, transport: asyncio.Transport) -> None:
        """There is one more."""
        self._plain.add(connection)
        if len(self._plain) + len(self.aiohttp.connections) > self._most:
            transport.write(self._full)
            connection.close()

    def lost(self, connection: Connection) -> None:
        """It has ended, or is aiohttp's."""
        self._plain.discard(connection)

    def pre_shutdown(self) -> None:
        """Close what is idle, and the rest when it has answered."""
        for connection in [*self._plain]:
            connection.close()
        self.aiohttp.pre_shutdown()

    async def shutdown(self, timeout: float) -> None:  # noqa: ASYNC109
        """The same; what takes longer than `timeout` is broken off."""
        for connection in [*self._plain]:
            connection.close()
        await asyncio.gather(self.aiohttp.shutdown(timeout), self._last_calls(timeout))

    async def _last_calls(self, limit_s: float) -> None:
        calls = {connection.ended(): connection for connection in self._plain}
        if not calls:
            return
        _, late = await asyncio.wait(calls, timeout=limit_s)
        for ended in late:
            calls[ended].cancel()
        if late:
            await asyncio.wait(late, timeout=limit_s)
