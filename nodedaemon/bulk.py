"""Large bodies between the control plane and this node: on a channel of their own, resumed where they broke off.

A broken stream is not the end of anything: each body goes on from the byte that the other side has, for as long as its
attempt lasts, over as many sessions as that takes.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final, TypeAlias

import grpc
import structlog
from ngpu import parcels
from ngpu.parcels import Parcel
from ngpu.v1 import http_pb2, node_pb2

from nodedaemon.course import CUSTOMER, PLATFORM, NoAnswer
from nodedaemon.dial import (
    CALL_LIMIT_S,
    Backoff,
    LinkLost,
    Metadata,
    ask,
    bearer,
    read,
    reason_of,
    stub_of,
    words_of,
    write,
)
from nodedaemon.spool import Body

DeliverCall: TypeAlias = "grpc.aio.StreamStreamCall[Parcel[node_pb2.DeliverRequest], node_pb2.DeliverResponse]"
TunnelCall: TypeAlias = "grpc.aio.StreamStreamCall[node_pb2.TunnelRequest, node_pb2.TunnelResponse]"

log = structlog.get_logger()

#: Waits between tries of one body.
FIRST_RETRY_S: Final = 0.1
RETRY_CAP_S: Final = 5.0
#: Bodies of ended attempts delivered at once; those of running ones are never held back.
BACKLOG_AT_ONCE: Final = 32


class GivenUp(NoAnswer):
    """The control plane does not want this attempt any more."""

    def __init__(self) -> None:
        super().__init__("CANCELLED", PLATFORM, "The control plane gave the attempt up.")


class Tunnel:
    """The caller's side of a connection that is no longer HTTP. One reader, one writer."""

    def __init__(self, call: TunnelCall) -> None:
        self._call = call
        self._over = asyncio.Event()

    async def read(self) -> bytes:
        """The next bytes for the container; empty at the end. Raises NoAnswer: nobody takes the connection."""
        data = b""
        try:
            data = (await read(self._call)).data
        except grpc.aio.AioRpcError as fault:
            if fault.code() is grpc.StatusCode.NOT_FOUND:
                raise NoAnswer("CANCELLED", CUSTOMER, reason_of(fault)[1]) from None
        except LinkLost:
            pass
        if not data:
            self._over.set()
        return data

    async def write(self, data: bytes) -> None:
        """Bytes of the container; returns when there is room for more. Nothing happens once the caller has gone."""
        with contextlib.suppress(grpc.aio.AioRpcError, LinkLost):
            await write(self._call, node_pb2.TunnelRequest(data=data))

    async def end(self) -> None:
        """The container has closed: returns when the caller has all that was written. `read` must go on meanwhile."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()
        await self._over.wait()

    def close(self) -> None:
        """Let go of it, whatever is under way."""
        self._call.cancel()


class Bulk:
    """Fetches and delivers bodies over `channel`, which outlives sessions: they come and go beside it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._use(channel)
        self._metadata: Metadata = ()
        self._open = asyncio.Event()
        self._backlog = asyncio.Semaphore(BACKLOG_AT_ONCE)

    async def move(self, channel: grpc.aio.Channel) -> None:
        """Over this one from now on: it is another control plane. What was under way goes on there."""
        old = self._channel
        self._use(channel)
        await old.close()

    def _use(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub = stub_of(channel)
        self._fetch = channel.unary_stream(
            "/ngpu.v1.NodeService/Fetch",
            request_serializer=node_pb2.FetchRequest.SerializeToString,
            response_deserializer=parcels.reader(node_pb2.FetchResponse),
        )
        self._deliveries = channel.stream_stream(
            "/ngpu.v1.NodeService/Deliver",
            request_serializer=parcels.writer(node_pb2.DeliverRequest),
            response_deserializer=node_pb2.DeliverResponse.FromString,
        )

    async def shut(self) -> None:
        """Nothing more."""
        await self._channel.close()

    def open(self, session_token: str) -> None:
        """A session has begun."""
        # So that the first body does not wait for the connection.
        self._channel.get_state(try_to_connect=True)
        self._metadata = bearer(session_token)
        self._open.set()

    def close(self) -> None:
        """The session is over: begin no call before the next."""
        self._open.clear()

    async def fetch(self, attempt_id: str, offset: int, size: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a request's body from `offset` to `size`, as they come. Raises NoAnswer, GivenUp."""
        backoff = Backoff(FIRST_RETRY_S, RETRY_CAP_S)
        while offset < size:
            await self._open.wait()
            call = self._fetch(node_pb2.FetchRequest(attempt_id=attempt_id, offset=offset), metadata=self._metadata)
            try:
                while offset < size:
                    data = (await read(call)).data
                    offset += len(data)
                    if offset > size:
                        raise NoAnswer("INTERNAL", PLATFORM, "The request's body is longer than its size says.")
                    yield data
                    backoff.reset()
            except (grpc.aio.AioRpcError, LinkLost) as fault:
                _check(fault)
                log.info("fetch_broken", attempt=attempt_id, offset=offset, size=size, reason=words_of(fault))
            finally:
                call.cancel()
            if offset < size:
                await asyncio.sleep(backoff.next())

    async def deliver(self, attempt_id: str, head: http_pb2.HttpResponse, body: Body) -> None:
        """Send a response's body as it grows; returns when the control plane has all of it on disk.

        Raises GivenUp, NoAnswer (too large for the control plane), OSError (`body` cannot be read).
        """
        backoff = Backoff(FIRST_RETRY_S, RETRY_CAP_S)
        while True:
            await self._open.wait()
            try:
                # Growing ones are bounded by the replicas' capacity; after a long absence there may be many others.
                async with self._backlog if body.ended else contextlib.nullcontext():
                    return await self._deliver(attempt_id, head, body)
            except (grpc.aio.AioRpcError, LinkLost) as fault:
                _check(fault)
                log.info("deliver_broken", attempt=attempt_id, size=body.size, reason=words_of(fault))
            await asyncio.sleep(backoff.next())

    async def record(self, message: node_pb2.RecordRequest) -> None:
        """Tell what is kept of an attempt. Raises AioRpcError, LinkLost."""
        await self._open.wait()
        await ask(self._stub.Record(message, metadata=self._metadata, timeout=CALL_LIMIT_S))

    async def tunnel(self, attempt_id: str, head: http_pb2.HttpResponse) -> Tunnel:
        """The way to the caller for the bytes after the container's 101, whose head this is. It cannot be resumed."""
        await self._open.wait()
        tunnel = Tunnel(call := self._stub.Tunnel(metadata=self._metadata))
        # Should this fail, reading says so.
        with contextlib.suppress(grpc.aio.AioRpcError, LinkLost):
            await write(call, node_pb2.TunnelRequest(attempt_id=attempt_id, head=head))
        return tunnel

    async def _deliver(self, attempt_id: str, head: http_pb2.HttpResponse, body: Body) -> None:
        call = self._deliveries(metadata=self._metadata)
        tasks: list[asyncio.Task[None]] = []
        try:
            await write(call, Parcel(node_pb2.DeliverRequest(attempt_id=attempt_id, head=head)))
            answer = await read(call)
            if answer.complete:
                return
            tasks.append(asyncio.create_task(_hear(call), name=f"delivered {attempt_id}"))
            tasks.append(asyncio.create_task(_tell(call, body, answer.stored_bytes), name=f"deliver {attempt_id}"))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)


async def _hear(call: DeliverCall) -> None:
    """Until the control plane has all."""
    while not (await read(call)).complete:
        pass


async def _tell(call: DeliverCall, body: Body, offset: int) -> None:
    """All of the body from `offset`, as it grows. If the stream ends under it, `_hear` hears why."""
    with contextlib.suppress(grpc.aio.AioRpcError, LinkLost):
        last = False
        while not last:
            data = await body.read(offset)
            last = body.ended and offset + len(data) >= body.size
            await write(call, Parcel(node_pb2.DeliverRequest(offset=offset, last=last), data))
            offset += len(data)


def _check(fault: grpc.aio.AioRpcError | LinkLost) -> None:
    """Raises what another try cannot mend."""
    if isinstance(fault, grpc.aio.AioRpcError):
        reason, message = reason_of(fault)
        if fault.code() is grpc.StatusCode.NOT_FOUND:
            raise GivenUp
        if reason == "TOO_LARGE":
            raise NoAnswer("RESPONSE_TOO_LARGE", CUSTOMER, message)
