"""Connections that have changed their protocol (101): the node's end and the caller's, joined while both last.

Nothing is kept but how many bytes went each way. Each message that one end has sent is given to the other before the
next is read, so a slow end holds back its own connection and nobody else. When one of the two ends, for whatever
reason, both are over.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from ngpu.v1 import node_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane import ids
from controlplane.api import translate
from controlplane.api.gate import Caller, Stream
from controlplane.api.nodes import session_of
from controlplane.api.owners import Owners
from controlplane.api.requests import chunk_of
from controlplane.dispatcher import Dispatcher
from controlplane.errors import InvalidArgument, NotFound, StaleAttempt
from controlplane.tasks import Meter

#: How long the node's end waits for the caller's.
CONNECT_LIMIT_S: Final = 10.0


class Tunnels:
    """Serves Tunnel and Connect. `tunnels` are those that are up or wait for their caller, by attempt."""

    def __init__(self, owners: Owners, dispatcher: Dispatcher) -> None:
        self._owners = owners
        self._dispatcher = dispatcher
        self.tunnels: dict[str, _Tunnel] = {}

    async def tunnel(self, stream: Stream[node_pb2.TunnelRequest, node_pb2.TunnelResponse], caller: Caller) -> None:
        """See node.proto."""
        addr = session_of(caller).node_addr
        first = await stream.read()
        if first is None:
            raise InvalidArgument("The first message must name the attempt and have the head.")
        attempt_id = first.attempt_id
        if not self._dispatcher.attempt_is_current(addr, attempt_id) or attempt_id in self.tunnels:
            raise StaleAttempt

        async def give(data: bytes) -> None:
            tunnel.meter.request_bytes += len(data)
            await stream.write(node_pb2.TunnelResponse(data=data))

        tunnel = self.tunnels[attempt_id] = _Tunnel(give)
        try:
            self._dispatcher.answering(addr, attempt_id, translate.response_of(first.head), tunnel.meter)
            await asyncio.wait({tunnel.taken}, timeout=CONNECT_LIMIT_S)
            if tunnel.to_caller is None:
                raise NotFound("The task's caller has gone.")
            await tunnel.carry(stream, tunnel.to_caller)
        finally:
            del self.tunnels[attempt_id]
            tunnel.end()

    async def connect(self, stream: Stream[pb.ConnectRequest, pb.ConnectResponse], caller: Caller) -> None:
        """See task.proto."""
        first = await stream.read()
        if first is None:
            raise InvalidArgument("The first message must name the task.")
        view = await self._owners.task(first.task_id, first.workspace_id, caller.principal)
        tunnel = self.tunnels.get(ids.attempt_id(view.task_id, view.attempt))
        if tunnel is None or tunnel.to_caller is not None:
            raise NotFound("The task has no connection to be taken.")

        async def give(data: bytes) -> None:
            tunnel.meter.response_bytes += len(data)
            await stream.write(pb.ConnectResponse(data=data))

        tunnel.take(give)
        try:
            await tunnel.carry(stream, tunnel.to_node)
        finally:
            tunnel.end()


class _Tunnel:
    """The two ends. Each is served by the handler of its own stream, which reads there and writes to the other."""

    def __init__(self, to_node: Callable[[bytes], Awaitable[None]]) -> None:
        self.to_node = to_node
        self.to_caller: Callable[[bytes], Awaitable[None]] | None = None
        self.meter = Meter()
        loop = asyncio.get_running_loop()
        self.taken: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()

    def take(self, to_caller: Callable[[bytes], Awaitable[None]]) -> None:
        """The caller is there."""
        self.to_caller = to_caller
        if not self.taken.done():
            self.taken.set_result(None)

    def end(self) -> None:
        """One of the two has ended."""
        if not self._over.done():
            self._over.set_result(None)

    async def carry(self, stream: Stream[Any, Any], give: Callable[[bytes], Awaitable[None]]) -> None:
        """Give what comes on one's own stream to the other, until either ends."""
        carrying = asyncio.create_task(_carry(stream, give), name="tunnel")
        try:
            await asyncio.wait({carrying, self._over}, return_when=asyncio.FIRST_COMPLETED)
            # A write to an end that has gone fails: that is its end, and no fault.
            if carrying.done() and isinstance(fault := carrying.exception(), InvalidArgument):
                raise fault
        finally:
            carrying.cancel()


async def _carry(stream: Stream[Any, Any], give: Callable[[bytes], Awaitable[None]]) -> None:
    while (message := await stream.read()) is not None:
        await give(chunk_of(message))
