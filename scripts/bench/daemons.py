"""Simulated node daemons: real connections, keys, enrolment, logins and reports; no engine and no work.

Run in a process of its own: python -m scripts.bench.daemons ADDRESS GPUS. On stdin one-time tokens, a line each, and
`end`: a node a token. Says `up` once all are, then for each line `report` how it went since the last, as JSON.
"""

import asyncio
import json
import resource
import secrets
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
from ngpu import wire
from ngpu.v1 import node_pb2, node_pb2_grpc

from nodedaemon.identity import Identity

#: Nodes that join at once.
JOINING = 32
CALL_LIMIT_S = 30.0
GIB = 1024**3
#: In each node's cache: names as long as real ones.
IMAGES = 10


@dataclass
class Tally:
    """What the reports of all nodes came to."""

    latencies_s: list[float] = field(default_factory=list)
    lost: int = 0

    def told(self) -> dict[str, float]:
        """Since the last time."""
        latencies, self.latencies_s = sorted(self.latencies_s), []
        return {
            "reports": len(latencies),
            "p50_ms": statistics.median(latencies) * 1e3 if latencies else 0.0,
            "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3 if latencies else 0.0,
            "lost": self.lost,
        }


class Daemon:
    """One node."""

    def __init__(self, address: str, number: int, gpus: int, tally: Tally) -> None:
        self._identity = Identity(secrets.token_bytes(32))
        self._number = number
        self._gpus = gpus
        self._tally = tally
        self._channel = grpc.aio.insecure_channel(address, options=wire.BULK_CLIENT_OPTIONS)
        self._stub: Any = node_pb2_grpc.NodeServiceStub(self._channel)
        self._metadata: tuple[tuple[str, str], ...] = ()

    async def join(self, token: str) -> None:
        """Enrol and log in."""
        stub, identity = self._stub, self._identity
        enroll = node_pb2.EnrollRequest(
            proof=identity.prove("enroll", await self._nonce()),
            token=token,
            name=f"simulated-{identity.address[2:12].lower()}",
        )
        await stub.Enroll(enroll, timeout=CALL_LIMIT_S)
        login = node_pb2.LoginRequest(
            proof=identity.prove("login", await self._nonce()), boot_id=secrets.token_hex(8), version="simulated"
        )
        session = await stub.Login(login, timeout=CALL_LIMIT_S)
        self._metadata = ((wire.AUTHORIZATION, f"Bearer {session.session_token}"),)

    async def _nonce(self) -> bytes:
        request = node_pb2.ChallengeRequest(node_addr=self._identity.address)
        nonce: bytes = (await self._stub.Challenge(request, timeout=CALL_LIMIT_S)).nonce
        return nonce

    async def live(self, first_report: asyncio.Event) -> None:
        """Both streams, until cancelled. A stream that ends counts as lost."""
        execute = self._stub.Execute(metadata=self._metadata)
        try:
            await execute.write(node_pb2.ExecuteRequest(resume=node_pb2.Resume()))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._report(first_report), name="reports")
                group.create_task(self._idle(execute), name="execute")
        except* grpc.aio.AioRpcError as errors:
            self._tally.lost += 1
            first_report.set()
            print(errors.exceptions[0], file=sys.stderr)
        finally:
            await self._channel.close()

    async def _idle(self, execute: Any) -> None:
        # No work comes; it ends with an error if it ends.
        while await execute.read() is not grpc.aio.EOF:
            pass

    async def _report(self, first_report: asyncio.Event) -> None:
        """All that is, when it is asked for."""
        stream = self._stub.Heartbeat(metadata=self._metadata)
        request = self._request()
        while True:
            request.sequence += 1
            for reading in request.readings:
                reading.utilization = (request.sequence + self._number) % 100
            began = time.perf_counter()
            await stream.write(request)
            answer = await stream.read()
            if answer is grpc.aio.EOF:
                self._tally.lost += 1
                return
            self._tally.latencies_s.append(time.perf_counter() - began)
            first_report.set()
            if not request.same:
                # As a node goes on that runs the same as before.
                request = node_pb2.HeartbeatRequest(sequence=request.sequence, readings=request.readings, same=True)
            await asyncio.sleep(answer.report_after_ms / 1000)

    def _request(self) -> node_pb2.HeartbeatRequest:
        ids = [f"GPU-{secrets.token_hex(16)}" for _ in range(self._gpus)]
        return node_pb2.HeartbeatRequest(
            inventory=node_pb2.Inventory(
                gpus=[
                    node_pb2.Gpu(
                        id=gpu_id,
                        model="NVIDIA GeForce RTX 4090",
                        memory_bytes=24 * GIB,
                        index=index,
                        pci_bus_id=f"00000000:{index:02x}:00.0",
                    )
                    for index, gpu_id in enumerate(ids)
                ],
                cpus=64,
                memory_bytes=256 * GIB,
                disk_free_bytes=1000 * GIB,
                engine="docker",
                engine_version="26.1",
                driver_version="550.54.15",
                cuda_version="12.4",
                os="Debian 12",
                daemon_version="simulated",
            ),
            readings=[
                node_pb2.GpuReading(
                    gpu_id=gpu_id, memory_used_bytes=GIB, utilization=0, temperature_c=55, power_w=80.0,
                    clocks_event_reasons=0, ecc_uncorrected=0,
                )
                for gpu_id in ids
            ],
            images=[
                node_pb2.CachedImage(reference=f"registry.example.com/models/image-{n}:1.0.0", size_bytes=5 * GIB)
                for n in range(IMAGES)
            ],
        )  # fmt: skip


async def main() -> None:
    address, gpus = sys.argv[1], int(sys.argv[2])
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tokens = []
    while (line := (await lines.readline()).decode().strip()) != "end":
        tokens.append(line)
    tally = Tally()
    daemons = [Daemon(address, number, gpus, tally) for number in range(len(tokens))]
    turns = asyncio.Semaphore(JOINING)

    async def join(daemon: Daemon, token: str) -> None:
        async with turns:
            await daemon.join(token)

    await asyncio.gather(*(join(daemon, token) for daemon, token in zip(daemons, tokens, strict=True)))
    reported = [asyncio.Event() for _ in daemons]
    lives = []
    for daemon, first_report in zip(daemons, reported, strict=True):
        lives.append(asyncio.create_task(daemon.live(first_report), name="daemon"))
        # As nodes are that started at any time.
        await asyncio.sleep(5 / len(daemons))
    await asyncio.gather(*(first_report.wait() for first_report in reported))
    print("up", flush=True)
    while (await lines.readline()).decode().strip() == "report":
        print(json.dumps(tally.told()), flush=True)
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(main())
