"""A connection that is no longer HTTP (a WebSocket): bytes both ways between the caller and the container.

Nothing is understood and nothing is kept: what one side has sent is given to the other before more is read, so each
side holds back the other and nobody else. When one side closes, the other gets what had been sent, and is closed too.
"""

import asyncio
import contextlib
from typing import Any, Final, cast

import grpc
from aiohttp import StreamReader, web
from ngpu import streams, wire
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from httpbridge.calls import Connection
from httpbridge.passed import Passed
from httpbridge.plain import Request

#: Bytes of the caller that wait for the control plane; past it he waits.
BUFFER_BYTES: Final = 256 * 1024
#: When one side has closed, the other's last words have so long.
CLOSE_S: Final = 1.0


class Tunnel(Passed):
    """The answer 101, and what comes after it. Made in the handler: aiohttp must know before it gets the answer."""

    def __init__(
        self, request: web.BaseRequest, response: http_pb2.HttpResponse, connection: Connection, *, task_id: str
    ) -> None:
        super().__init__(response, b"", method=request.method, task_id=task_id)
        self._to_container = connection
        self._protocol = next((h.value.decode("latin-1") for h in response.headers if h.name == "Upgrade"), "websocket")
        self._incoming = _Incoming(request.protocol)
        # Of a parser it asks for these two methods and no others.
        request.protocol.set_parser(cast("Any", self._incoming))

    def _connection(self, request: Request) -> list[str]:  # noqa: ARG002
        return ["Connection: Upgrade", f"Upgrade: {self._protocol}"]

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002
        """Called by aiohttp: everything, until the end of the connection."""
        request = self._request
        assert request is not None
        # What comes after is no request.
        self._keep_alive = False
        try:
            await self._send(request, self._head(request, ""))
            await self._carry(request, self._incoming.reader, self._to_container)
        finally:
            # With this the control plane ends the task.
            self._to_container.cancel()

    async def _carry(self, request: Request, reader: StreamReader, connection: Connection) -> None:
        out = asyncio.create_task(_out(reader, connection), name="tunnel out")
        back = asyncio.create_task(self._back(request, connection), name="tunnel back")
        both = {out, back}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if out.done():
                await asyncio.wait(both, timeout=CLOSE_S)
        except asyncio.CancelledError:
            # The caller has gone; what he had sent goes on.
            await asyncio.wait(both, timeout=CLOSE_S)
            raise
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both)

    async def _back(self, request: Request, connection: Connection) -> None:
        """From the container. That it breaks off, or the caller does, is an end like any other."""
        with contextlib.suppress(grpc.aio.AioRpcError, ConnectionError):
            while (message := await streams.read(connection)) is not grpc.aio.EOF:
                assert isinstance(message, pb.ConnectResponse)
                await self._send(request, message.data)


async def _out(reader: StreamReader, connection: Connection) -> None:
    """To the container."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while data := await reader.readany():
            for at in range(0, len(data), wire.CHUNK_BYTES):
                await connection.write(pb.ConnectRequest(data=data[at : at + wire.CHUNK_BYTES]))
        await connection.done_writing()


class _Incoming:
    """What aiohttp gives the caller's bytes to, once they are no requests any more."""

    def __init__(self, protocol: Any) -> None:
        self.reader = StreamReader(protocol, BUFFER_BYTES // 2, loop=asyncio.get_running_loop())

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """More of them. Gives whether that was the end, and what was left over."""
        self.reader.feed_data(data)
        return False, b""

    def feed_eof(self) -> None:
        """There will be no more."""
        self.reader.feed_eof()
