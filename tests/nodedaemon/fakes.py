"""Fakes around the node daemon: a control plane on real gRPC, containers on sockets, replicas and GPUs as values."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import coincurve
import grpc
from eth_hash.auto import keccak
from ngpu import wire
from ngpu.v1 import flight_pb2, http_pb2, node_pb2, node_pb2_grpc

from nodedaemon.connection import Address
from nodedaemon.engine import Assignment, Exit
from nodedaemon.gpus import GpuInventory, GpuReading
from nodedaemon.identity import address_of
from nodedaemon.replicas import ReplicaReport, State

#: For anything that should come at once.
SOON_S = 10.0


# Containers.


@dataclass
class Request:
    """What a container was asked."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class Wire:
    """A container's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> Request:
        """The next request without its body. Raises IncompleteReadError at the end of the connection."""
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = raw[:-4].split("\r\n")
        method, target, version = line.split(" ")
        assert version == "HTTP/1.1"
        headers = [(name, value) for name, _, value in (field.partition(": ") for field in fields)]
        return Request(method, target, headers, b"")

    async def request(self) -> Request:
        """The next request, whole."""
        request = await self.head()
        request.body = await self.reader.readexactly(int(request.header("content-length") or 0))
        return request

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"", *, status: int = 200, headers: str = "") -> None:
        await self.send(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)

    async def closed(self) -> None:
        """Returns when the other side has closed."""
        with contextlib.suppress(OSError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        """RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class Container:
    """A server that does what its handler does with each connection."""

    address: Address
    connections: int = 0


@contextlib.asynccontextmanager
async def container(handler: Callable[[Wire], Awaitable[None]]) -> AsyncIterator[Container]:
    """Serve on a free port; connections are closed when their handler returns."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        found.connections += 1
        try:
            await handler(Wire(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**20)
    found = Container(server.sockets[0].getsockname()[:2])
    try:
        yield found
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def echo(wire_: Wire) -> None:
    """Answers every request with its body."""
    while True:
        request = await wire_.request()
        await wire_.answer(request.body)


# What runs here.


@dataclass
class FakeReplicas:
    """Replicas as plain values."""

    addresses: dict[str, Address] = field(default_factory=dict)
    gpus: dict[str, tuple[str, ...]] = field(default_factory=dict)
    containers: dict[str, str] = field(default_factory=dict)
    applied: list[Assignment] | None = None
    version: int = 0
    exits: dict[str, Exit] = field(default_factory=dict)
    waiting_for_exit: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def address(self, replica_id: str, port: int) -> Address | None:
        return self.addresses.get(replica_id) if port == 80 else None

    def container_id(self, replica_id: str) -> str:
        return self.containers.get(replica_id, "")

    def gpu_ids(self, replica_id: str) -> tuple[str, ...]:
        return self.gpus.get(replica_id, ())

    async def exited(self, replica_id: str, *, since: float, within_s: float) -> Exit | None:
        self.waiting_for_exit.set()
        return self.exits.get(replica_id)

    def apply(self, assignments: Iterable[Assignment]) -> None:
        before, self.applied = self.applied, list(assignments)
        if self.applied != (before or []):
            self.change()

    def change(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seen: int) -> int:
        while self.version <= seen:
            await self._changed.wait()
        return self.version

    def reports(self) -> tuple[ReplicaReport, ...]:
        return tuple(ReplicaReport(a.replica_id, State.READY, capacity=a.concurrency) for a in self.applied or ())


@dataclass
class FakeGpus:
    """GPUs as plain values."""

    found: GpuInventory = field(default_factory=GpuInventory)
    now: tuple[GpuReading, ...] = ()
    acknowledged: list[GpuReading] = field(default_factory=list)

    def inventory(self) -> GpuInventory:
        return self.found

    def readings(self) -> tuple[GpuReading, ...]:
        return self.now

    def acknowledge(self, readings: Iterable[GpuReading]) -> None:
        self.acknowledged += readings


# The control plane.


class ExecuteStream:
    """The control plane's end of one Execute stream."""

    def __init__(self, resume: node_pb2.Resume) -> None:
        self.resume = resume
        self.frames: asyncio.Queue[node_pb2.ExecuteRequest] = asyncio.Queue()
        self.outbox: asyncio.Queue[node_pb2.ExecuteResponse | None] = asyncio.Queue()

    def send(self, **frame: Any) -> None:
        self.outbox.put_nowait(node_pb2.ExecuteResponse(**frame))

    def end(self) -> None:
        """End the stream as a control plane does that stops."""
        self.outbox.put_nowait(None)

    async def frame(self) -> node_pb2.ExecuteRequest:
        async with asyncio.timeout(SOON_S):
            return await self.frames.get()

    async def result(self) -> node_pb2.Result:
        """The next frame's one result."""
        (result,) = await self.results(1)
        return result

    async def results(self, count: int) -> list[node_pb2.Result]:
        """The next ones, in as many frames as they come in."""
        results: list[node_pb2.Result] = []
        while len(results) < count:
            results += (await self.frame()).results
        return results


class FakeControlPlane(node_pb2_grpc.NodeServiceServicer):
    """Speaks node.proto as it is written; what it is to do wrong is set by the test."""

    def __init__(self) -> None:
        self.server = grpc.aio.server(options=wire.SERVER_OPTIONS)
        node_pb2_grpc.add_NodeServiceServicer_to_server(self, self.server)
        self.address = ""
        # Who is who.
        self.tokens = {"join-me"}
        self.nodes: set[str] = set()
        self.revoked: set[str] = set()
        self.session = ""
        self.logins: list[node_pb2.LoginRequest] = []
        #: What was recorded, by attempt.
        self.flights: dict[str, flight_pb2.NodeFlight] = {}
        self._nonces: set[bytes] = set()
        # Heartbeat.
        self.reports: asyncio.Queue[node_pb2.HeartbeatRequest] = asyncio.Queue()
        self.desired: list[node_pb2.Assignment] = []
        self.dead: list[str] = []
        self.report_after_ms = 60_000
        self.answering = True
        #: How long it waits for a report before it says on its own account what should be, again and again.
        self.quiet_s: float | None = None
        self.news = asyncio.Event()
        self._endings: list[tuple[grpc.StatusCode, str]] = []
        # Execute.
        self.streams: asyncio.Queue[ExecuteStream] = asyncio.Queue()
        # Bodies.
        self.requests: dict[str, bytes] = {}
        self.fetches: list[int] = []
        self.stored: dict[str, bytearray] = {}
        self.heads: dict[str, http_pb2.HttpResponse] = {}
        self.complete: set[str] = set()
        self.delivered = asyncio.Event()
        #: Bytes after which the next such stream breaks.
        self.cut_fetch_at = 0
        self.cut_deliver_at = 0
        self.deliver_limit = 0
        self.taking = asyncio.Event()
        self.taking.set()
        #: Takes connections that have changed their protocol: the container's bytes in, its own out. None: nobody does.
        self.caller: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]] | None = None

    async def start(self, port: int = 0) -> None:
        port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{port}"
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(None)

    async def report(self) -> node_pb2.HeartbeatRequest:
        async with asyncio.timeout(SOON_S):
            return await self.reports.get()

    async def stream(self) -> ExecuteStream:
        async with asyncio.timeout(SOON_S):
            return await self.streams.get()

    def end_heartbeat(self, code: grpc.StatusCode, reason: str) -> None:
        self._endings.append((code, reason))
        self.news.set()

    def login_elsewhere(self) -> None:
        """Another daemon with the same key."""
        self.session = "another"
        self.end_heartbeat(grpc.StatusCode.ABORTED, "SUPERSEDED")

    # The service; its names are the wire's.
    # ruff: noqa: N802

    async def Challenge(self, request: node_pb2.ChallengeRequest, context: Any) -> node_pb2.ChallengeResponse:
        nonce = len(self._nonces).to_bytes(32, "big")
        self._nonces.add(nonce)
        return node_pb2.ChallengeResponse(nonce=nonce)

    async def Enroll(self, request: node_pb2.EnrollRequest, context: Any) -> node_pb2.EnrollResponse:
        await self._verify("enroll", request.proof, context)
        if request.token not in self.tokens:
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "The token is not known here.")
        self.nodes.add(request.proof.node_addr)
        return node_pb2.EnrollResponse(name=request.name)

    async def Login(self, request: node_pb2.LoginRequest, context: Any) -> node_pb2.LoginResponse:
        await self._verify("login", request.proof, context)
        if request.proof.node_addr in self.revoked:
            await fail(context, grpc.StatusCode.PERMISSION_DENIED, "NODE_REVOKED")
        if request.proof.node_addr not in self.nodes:
            await fail(context, grpc.StatusCode.NOT_FOUND, "NODE_UNKNOWN")
        self.logins.append(request)
        self.session = f"session-{len(self.logins)}"
        return node_pb2.LoginResponse(session_token=self.session, name="a-node")

    async def Heartbeat(
        self, requests: AsyncIterator[node_pb2.HeartbeatRequest], context: Any
    ) -> AsyncIterator[node_pb2.HeartbeatResponse]:
        await self._authenticate(context)
        queue: asyncio.Queue[node_pb2.HeartbeatRequest | None] = asyncio.Queue()
        reader = asyncio.create_task(self._hear(requests, queue))
        try:
            while True:
                try:
                    async with asyncio.timeout(self.quiet_s):
                        report = await queue.get()
                except TimeoutError:
                    yield self._answer(0)
                    continue
                if report is None:
                    break
                self.reports.put_nowait(report)
                if report.goodbye:
                    return
                if self.answering:
                    yield self._answer(report.sequence)
            while self._endings:
                await fail(context, *self._endings.pop())
        finally:
            reader.cancel()

    def _answer(self, sequence: int) -> node_pb2.HeartbeatResponse:
        return node_pb2.HeartbeatResponse(
            sequence=sequence,
            assignments=self.desired,
            report_after_ms=self.report_after_ms,
            dead_workspaces=self.dead,
        )

    async def _hear(
        self,
        requests: AsyncIterator[node_pb2.HeartbeatRequest],
        queue: asyncio.Queue[node_pb2.HeartbeatRequest | None],
    ) -> None:
        async def read() -> None:
            async for request in requests:
                queue.put_nowait(request)

        reading, ending = asyncio.ensure_future(read()), asyncio.ensure_future(self._told_to_end())
        try:
            await asyncio.wait([reading, ending], return_when=asyncio.FIRST_COMPLETED)
            queue.put_nowait(None)
        finally:
            reading.cancel()
            ending.cancel()

    async def _told_to_end(self) -> None:
        await self.news.wait()
        self.news.clear()

    async def Execute(
        self, requests: AsyncIterator[node_pb2.ExecuteRequest], context: Any
    ) -> AsyncIterator[node_pb2.ExecuteResponse]:
        await self._authenticate(context)
        first = await anext(aiter(requests))
        assert first.HasField("resume")
        stream = ExecuteStream(first.resume)
        self.streams.put_nowait(stream)

        async def hear() -> None:
            async for request in requests:
                stream.frames.put_nowait(request)

        reader = asyncio.create_task(hear())
        try:
            while (frame := await stream.outbox.get()) is not None:
                yield frame
        finally:
            reader.cancel()

    async def Fetch(self, request: node_pb2.FetchRequest, context: Any) -> AsyncIterator[node_pb2.FetchResponse]:
        await self._authenticate(context)
        self.fetches.append(request.offset)
        body = self.requests.get(request.attempt_id)
        if body is None:
            await fail(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        end, self.cut_fetch_at = self.cut_fetch_at or len(body), 0
        for start in range(request.offset, end, wire.CHUNK_BYTES):
            yield node_pb2.FetchResponse(data=body[start : min(start + wire.CHUNK_BYTES, end)])
        if end < len(body):
            await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")

    async def Tunnel(
        self, requests: AsyncIterator[node_pb2.TunnelRequest], context: Any
    ) -> AsyncIterator[node_pb2.TunnelResponse]:
        await self._authenticate(context)
        first = await anext(aiter(requests))
        self.heads[first.attempt_id] = first.head
        if self.caller is None:
            await fail(context, grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "Nobody took the connection.")
        async for data in self.caller(request.data async for request in requests):
            yield node_pb2.TunnelResponse(data=data)

    async def Record(self, request: node_pb2.RecordRequest, context: Any) -> node_pb2.RecordResponse:
        await self._authenticate(context)
        self.flights[request.attempt_id] = request.flight
        return node_pb2.RecordResponse()

    async def Deliver(
        self, requests: AsyncIterator[node_pb2.DeliverRequest], context: Any
    ) -> AsyncIterator[node_pb2.DeliverResponse]:
        await self._authenticate(context)
        first = await anext(aiter(requests))
        attempt_id = first.attempt_id
        assert not first.head.body.inline
        self.heads[attempt_id] = first.head
        stored = self.stored.setdefault(attempt_id, bytearray())
        yield node_pb2.DeliverResponse(stored_bytes=len(stored), complete=attempt_id in self.complete)
        async for request in requests:
            await self.taking.wait()
            assert request.offset == len(stored)
            assert len(request.data) <= wire.CHUNK_BYTES
            stored += request.data
            if self.cut_deliver_at and len(stored) >= self.cut_deliver_at:
                self.cut_deliver_at = 0
                await fail(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            if self.deliver_limit and len(stored) > self.deliver_limit:
                await fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", "It is too large.")
            if request.last:
                self.complete.add(attempt_id)
            yield node_pb2.DeliverResponse(stored_bytes=len(stored), complete=request.last)
            self.delivered.set()

    async def _authenticate(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        if metadata.get(wire.AUTHORIZATION) != f"Bearer {self.session}":
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "Log in again.")

    async def _verify(self, purpose: str, proof: node_pb2.KeyProof, context: Any) -> None:
        text = f"ngpu-node-v1:{purpose}:{proof.node_addr.lower()}:{proof.nonce.hex()}".encode()
        key = coincurve.PublicKey.from_signature_and_message(proof.signature, keccak(text), hasher=None)
        if proof.nonce not in self._nonces or address_of(key.format(compressed=False)) != proof.node_addr:
            await fail(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "bad proof")
        self._nonces.discard(proof.nonce)


async def fail(context: Any, code: grpc.StatusCode, reason: str, message: str = "") -> NoReturn:
    """End a call as the control plane does."""
    error = http_pb2.Error(code=code.value[0], reason=reason, message=message)
    await context.abort(code, message or reason, ((wire.ERROR, error.SerializeToString()),))
    raise AssertionError


@contextlib.asynccontextmanager
async def control_plane() -> AsyncIterator[FakeControlPlane]:
    """One that listens."""
    fake = FakeControlPlane()
    await fake.start()
    try:
        yield fake
    finally:
        await fake.stop()
