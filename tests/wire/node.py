"""A node that obeys the wire contract and has no engine: its replicas are ready at once, its answers are a function."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Literal

import coincurve
import grpc
from eth_hash.auto import keccak
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, task_pb2, workspace_pb2

from controlplane.access import address_of, proof_text
from tests.wire.house import DEADLINE_S, Client, House, until

#: What a start becomes; None: it runs on until the test says otherwise.
Answer = Callable[[node_pb2.Start], node_pb2.Result | None]

GIB: Final = 1024**3


def echo(start: node_pb2.Start) -> node_pb2.Result:
    """The request's body and path come back."""
    return answered(start.attempt_id, start.request.body.inline, headers={"X-Path": start.request.path})


def answered(
    attempt_id: str, body: bytes = b"", status: int = 200, *, size: int = 0, headers: dict[str, str] | None = None
) -> node_pb2.Result:
    """The container has answered."""
    return node_pb2.Result(
        attempt_id=attempt_id,
        delivery=task_pb2.DELIVERY_ANSWERED,
        response=http_pb2.HttpResponse(
            status=status,
            headers=[http_pb2.Header(name=name, value=value.encode()) for name, value in (headers or {}).items()],
            body=http_pb2.Body(inline=body, size=size or len(body), is_utf8=True),
        ),
        sent_after_us=10,
        first_byte_after_us=20,
        last_byte_after_us=30,
        gpu_us=20,
    )


class Node:
    """One machine. `number` makes its key."""

    def __init__(self, house: House, number: int = 1, *, answer: Answer = echo, gpus: int = 0) -> None:
        self.house = house
        self.name = f"node-{number}"
        self.answer = answer
        self.gpus = gpus
        self._key = coincurve.PrivateKey(number.to_bytes(32, "big"))
        self.addr = address_of(self._key.public_key.format(compressed=False))
        self.client: Client = house.client(None)
        self.boot_id = "boot"
        self.assignments: list[node_pb2.Assignment] = []
        #: Attempts that run until the test ends them.
        self.running: dict[str, node_pb2.Start] = {}
        #: Ended, and not acknowledged.
        self.ended: dict[str, node_pb2.Result] = {}
        self.cancelled: list[str] = []
        self.acked: list[str] = []
        self.errors: list[grpc.aio.AioRpcError] = []
        self.goodbye = False
        self._news = asyncio.Event()
        self._outbox: asyncio.Queue[node_pb2.ExecuteRequest] = asyncio.Queue()

    async def proof(self, purpose: Literal["enroll", "login"]) -> node_pb2.KeyProof:
        """A signed challenge."""
        challenge = await self.client.nodes.Challenge(
            node_pb2.ChallengeRequest(node_addr=self.addr), timeout=DEADLINE_S
        )
        text = proof_text(purpose, self.addr, challenge.nonce)
        signature = self._key.sign_recoverable(keccak(text), hasher=None)
        return node_pb2.KeyProof(node_addr=self.addr, nonce=challenge.nonce, signature=signature)

    async def join(self, token: str | None = None) -> str:
        """Enrol; gives the name."""
        token = token if token is not None else await self.house.operator.join_token()
        enroll = node_pb2.EnrollRequest(proof=await self.proof("enroll"), token=token, name=self.name)
        return str((await self.client.nodes.Enroll(enroll, timeout=DEADLINE_S)).name)

    async def login(self) -> None:
        """Begin a session."""
        login = node_pb2.LoginRequest(proof=await self.proof("login"), boot_id=self.boot_id, version="test")
        answer = await self.client.nodes.Login(login, timeout=DEADLINE_S)
        self.client.auth = ((wire.AUTHORIZATION, f"Bearer {answer.session_token}"),)

    @asynccontextmanager
    async def up(self, *, heartbeat: bool = True, execute: bool = True) -> AsyncIterator["Node"]:
        """Log in and keep the streams, until left; as if the power went."""
        await self.login()
        streams = [asyncio.create_task(self._told(self.heartbeat()), name="heartbeat")] if heartbeat else []
        streams += [asyncio.create_task(self._told(self.execute()), name="execute")] if execute else []
        try:
            yield self
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _told(self, stream: Any) -> None:
        try:
            await stream
        except grpc.aio.AioRpcError as error:
            self.errors.append(error)

    # Heartbeat.

    def report(self, sequence: int) -> node_pb2.HeartbeatRequest:
        """All that is."""
        return node_pb2.HeartbeatRequest(
            sequence=sequence,
            inventory=node_pb2.Inventory(
                gpus=[
                    node_pb2.Gpu(id=f"GPU-{self.name}-{index}", model="NVIDIA A100", memory_bytes=80 * GIB, index=index)
                    for index in range(self.gpus)
                ],
                cpus=64,
                memory_bytes=512 * GIB,
                disk_free_bytes=1000 * GIB,
                engine="docker",
                volume_limit_bytes=64 * GIB,
            ),
            readings=[node_pb2.GpuReading(gpu_id=f"GPU-{self.name}-{index}") for index in range(self.gpus)],
            replicas=[
                node_pb2.ReplicaReport(
                    replica_id=assignment.replica_id,
                    state=workspace_pb2.REPLICA_STATE_READY,
                    progress=100,
                    capacity=0 if assignment.draining else assignment.spec.concurrency,
                    spec_hash=assignment.spec_hash,
                )
                for assignment in self.assignments
            ],
            attempt_ids=[*self.running, *self.ended],
            goodbye=self.goodbye,
        )

    def say(self) -> None:
        """Report at once."""
        self._news.set()

    async def heartbeat(self) -> None:
        """Report and obey, until the stream ends."""
        call = self.client.nodes.Heartbeat(metadata=self.client.auth)
        every_s, sequence = 5.0, 1
        self._news.set()

        async def report() -> None:
            nonlocal sequence
            while not self.goodbye:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), every_s)
                self._news.clear()
                await call.write(self.report(sequence))
                sequence += 1
            await call.done_writing()

        reporting = asyncio.create_task(report(), name="report")
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                pace, every_s = every_s, message.report_after_ms / 1000
                if list(message.assignments) != self.assignments or every_s < 0.9 * pace:
                    self.assignments = list(message.assignments)
                    self._news.set()
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            call.cancel()

    # Execute.

    def end(self, result: node_pb2.Result) -> None:
        """An attempt has ended; said until it is acknowledged."""
        self.running.pop(result.attempt_id, None)
        self.ended[result.attempt_id] = result
        self._outbox.put_nowait(node_pb2.ExecuteRequest(results=[result]))

    def tell(self, message: node_pb2.ExecuteRequest) -> None:
        """Say anything."""
        self._outbox.put_nowait(message)

    async def execute(self) -> None:
        """Run what comes, until the stream ends."""
        call = self.client.nodes.Execute(metadata=self.client.auth)
        resume = node_pb2.Resume(running=list(self.running), ended=list(self.ended))
        await call.write(node_pb2.ExecuteRequest(resume=resume, results=list(self.ended.values())))

        async def write() -> None:
            while True:
                message = await self._outbox.get()
                while not self._outbox.empty():
                    message.MergeFrom(self._outbox.get_nowait())
                await call.write(message)

        writing = asyncio.create_task(write(), name="write")
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self._obey(message)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            call.cancel()

    def _obey(self, message: node_pb2.ExecuteResponse) -> None:
        for start in message.starts:
            if start.attempt_id in self.running or start.attempt_id in self.ended:
                continue
            self.running[start.attempt_id] = start
            if (result := self.answer(start)) is not None:
                self.end(result)
        self.cancelled += message.cancels
        for attempt_id in message.acks:
            self.acked.append(attempt_id)
            self.ended.pop(attempt_id, None)

    async def started(self, number: int = 1) -> list[node_pb2.Start]:
        """Wait until so many attempts run here."""
        await until(lambda: len(self.running) >= number)
        return list(self.running.values())


def hold(start: node_pb2.Start) -> None:
    """It runs on until the test ends it."""
