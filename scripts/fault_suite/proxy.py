"""A TCP proxy that does to its connections what networks do: delay, swallow, reset, cut after so many bytes.

Runs in a thread with an event loop of its own, so that blocking callers can steer it.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, Literal, Self

#: What one connection may have ahead of its reader.
CHUNK_BYTES: Final = 64 * 1024
STOP_LIMIT_S: Final = 10.0

Way = Literal["both", "up", "down"]


class _Pipe:
    """One accepted connection and the one made for it."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far

    def reset(self) -> None:
        """RST to both ends."""
        for writer in (self.near, self.far):
            sock: socket.socket | None = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                if sock is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class FaultProxy:
    """Listens on `host` and passes on to `target` (HOST:PORT; may change): `address` is where.

    `up` is the way from who dials to the target. Bytes that are swallowed are held, as by TCP, and go on when the
    network is back, unless a connection has been given up by then.
    """

    def __init__(self, target: str, *, host: str = "127.0.0.1") -> None:
        self.target = target
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy to {target}", daemon=True)
        self._pipes: set[_Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: dict[str, asyncio.Event] = {}
        self._delay_s = 0.0
        #: Bytes that may still pass downwards on each connection; None: all.
        self._cut_after: int | None = None
        self.address = ""
        self.passed_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_LIMIT_S)
        self._loop.close()

    # What may go wrong.

    @contextlib.contextmanager
    def swallowing(self, way: Way = "both") -> Iterator[None]:
        """Nothing gets through that way, and nobody is told; new connections are accepted and just as dead."""
        ways = ("up", "down") if way == "both" else (way,)
        self._run(self._swallow(ways, begin=True))
        try:
            yield
        finally:
            self._run(self._swallow(ways, begin=False))

    @contextlib.contextmanager
    def delaying(self, seconds: float) -> Iterator[None]:
        """Every piece that passes comes so much later."""
        self._delay_s = seconds
        try:
            yield
        finally:
            self._delay_s = 0.0

    @contextlib.contextmanager
    def cutting(self, after_bytes: int) -> Iterator[None]:
        """Each connection is reset once so many more bytes have come down it."""
        self._cut_after = after_bytes
        try:
            yield
        finally:
            self._cut_after = None

    def reset(self) -> None:
        """RST on every connection there is."""
        self._run(self._reset())

    # The loop's side.

    async def _listen(self) -> None:
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        for way in self._open.values():
            way.set()
        self._server = await asyncio.start_server(self._accept, self._host, 0, limit=CHUNK_BYTES)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="proxy connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far = await asyncio.open_connection(host, int(port), limit=CHUNK_BYTES)
        except OSError:
            writer.transport.abort()
            return
        pipe = _Pipe(writer, far)
        self._pipes.add(pipe)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass("up", reader, far, pipe), name="up")
                group.create_task(self._pass("down", far_reader, writer, pipe), name="down")
        except* OSError:
            pass
        finally:
            self._pipes.discard(pipe)
            writer.transport.abort()
            far.transport.abort()

    async def _pass(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pipe: _Pipe) -> None:
        sent = 0
        while True:
            data = await reader.read(CHUNK_BYTES)
            # A piece that was read before the network went must not pass after.
            await self._open[way].wait()
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            limit = self._cut_after if way == "down" else None
            if limit is not None and sent + len(data) > limit:
                pipe.reset()
                return
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            sent = sent + len(data) if limit is not None else 0
            self.passed_bytes += len(data)
            writer.write(data)
            await writer.drain()

    async def _swallow(self, ways: tuple[str, ...], *, begin: bool) -> None:
        for way in ways:
            if begin:
                self._open[way].clear()
            else:
                self._open[way].set()

    async def _reset(self) -> None:
        for pipe in list(self._pipes):
            pipe.reset()

    async def _end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(STOP_LIMIT_S)


class FaultProxies:
    """One for each of several targets, with commas between them: a network on which all of them lie."""

    def __init__(self, targets: str, *, host: str = "127.0.0.1") -> None:
        self._proxies = [FaultProxy(target, host=host) for target in targets.split(",")]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for proxy in self._proxies:
            self._stack.enter_context(proxy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """Where they are, with commas."""
        return ",".join(proxy.address for proxy in self._proxies)

    @contextlib.contextmanager
    def swallowing(self, way: Way = "both") -> Iterator[None]:
        """As FaultProxy's."""
        with contextlib.ExitStack() as stack:
            for proxy in self._proxies:
                stack.enter_context(proxy.swallowing(way))
            yield

    @contextlib.contextmanager
    def delaying(self, seconds: float) -> Iterator[None]:
        """As FaultProxy's."""
        with contextlib.ExitStack() as stack:
            for proxy in self._proxies:
                stack.enter_context(proxy.delaying(seconds))
            yield

    @contextlib.contextmanager
    def cutting(self, after_bytes: int) -> Iterator[None]:
        """As FaultProxy's."""
        with contextlib.ExitStack() as stack:
            for proxy in self._proxies:
                stack.enter_context(proxy.cutting(after_bytes))
            yield

    def reset(self) -> None:
        """As FaultProxy's."""
        for proxy in self._proxies:
            proxy.reset()
