"""Customers of a fleet: workspaces come, are scaled and updated, and go; their owners call them."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import grpc
from ngpu.v1 import workspace_pb2, workspace_pb2_grpc

GIB: Final = 1024**3
#: GPUs of one replica, and how often that many are wanted.
SIZES: Final = {0: 2, 1: 50, 2: 24, 4: 18, 8: 6}
#: Thousandths of one GPU that small replicas want, and how often a replica with one GPU is small.
SHARES: Final = (100, 250, 500)
SMALL: Final = 0.4
REPLICAS: Final = (1, 10)
IMAGES: Final = 40
#: Of what is done when something is done to a workspace that is there: each so often.
CHANGES: Final = {"delete": 6, "scale": 3, "update": 1}
#: How much of all GPUs is wanted, from time to time: too much now and then, so that some must wait.
WANTED: Final = (0.75, 0.9, 1.15, 0.85, 1.05, 0.8)
TURN_S: Final = 25.0
CALL_S: Final = 60.0
WHOLE: Final = 1000


@dataclass
class Living:
    """A workspace that is there."""

    id: str
    spec: workspace_pb2.WorkspaceSpec

    @property
    def gpus(self) -> float:
        """That its replicas want together."""
        return self.spec.replicas * self.spec.gpu.count * (self.spec.gpu.share_milli or WHOLE) / WHOLE


@dataclass
class Customers:
    """`gpus`: of the whole fleet. `models`: words that some ask for. `rate`: events a second, `calls`: requests."""

    stub: Any
    metadata: tuple[tuple[str, str], ...]
    bridge: str
    chance: random.Random
    gpus: int
    models: tuple[str, ...]
    largest: int
    rate: float
    calls: float
    living: dict[str, Living] = field(default_factory=dict)
    did: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _count: int = 0

    @property
    def wanted(self) -> float:
        """Share of the fleet's GPUs that is wanted."""
        return sum(one.gpus for one in self.living.values()) / self.gpus

    async def come_and_go(self) -> None:
        """Until cancelled."""
        began = asyncio.get_running_loop().time()
        while True:
            passed_s = asyncio.get_running_loop().time() - began
            aim = WANTED[int(passed_s / TURN_S) % len(WANTED)]
            await asyncio.sleep(self.chance.expovariate(self.rate))
            try:
                if self.chance.random() < min(0.9, max(0.1, 0.5 + 2 * (aim - self.wanted))):
                    await self._create()
                elif self.living:
                    await self._change()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                self.did[f"refused: {error.code().name}"] += 1

    async def go(self, wanted: float) -> None:
        """Delete workspaces until no more than that share of the GPUs is wanted."""
        while self.wanted > wanted:
            await self._delete(self.chance.choice(list(self.living)))

    async def _create(self) -> None:
        self._count += 1
        spec = self._spec()
        answer = await self.stub.CreateWorkspace(
            workspace_pb2.CreateWorkspaceRequest(spec=spec), metadata=self.metadata, timeout=CALL_S
        )
        self.living[spec.name] = Living(answer.workspace.id, spec)
        self.did["create"] += 1
        self.did["replicas wanted"] += spec.replicas

    def _spec(self) -> workspace_pb2.WorkspaceSpec:
        chance = self.chance
        sizes = [size for size in SIZES if size <= self.largest]
        count = chance.choices(sizes, [SIZES[size] for size in sizes])[0]
        need = workspace_pb2.GpuNeed(count=count)
        if count and chance.random() < 1 / 3:
            need.model = chance.choice(self.models)
        if count == 1 and chance.random() < SMALL:
            need.share_milli = chance.choice(SHARES)
        gpus = max(1, count)
        return workspace_pb2.WorkspaceSpec(
            name=f"fleet-{self._count}",
            image=f"registry.example/models/image-{chance.randrange(IMAGES)}:1",
            ports=[8080],
            gpu=need,
            replicas=chance.randint(*REPLICAS),
            concurrency=chance.choice((1, 1, 2, 4)),
            cpus=gpus * chance.choice((0.5, 1.0, 2.0, 4.0, 12.0)),
            memory_bytes=gpus * chance.choice((2, 4, 8, 16, 48)) * GIB,
        )

    async def _change(self) -> None:
        name = self.chance.choice(list(self.living))
        kind = self.chance.choices(list(CHANGES), list(CHANGES.values()))[0]
        one = self.living[name]
        if kind == "delete":
            await self._delete(name)
        elif kind == "scale":
            replicas = self.chance.randint(*REPLICAS)
            scale = workspace_pb2.ScaleWorkspaceRequest(workspace=name, replicas=replicas)
            await self.stub.ScaleWorkspace(scale, metadata=self.metadata, timeout=CALL_S)
            self.did["replicas wanted"] += max(0, replicas - one.spec.replicas)
            one.spec.replicas = replicas
            self.did["scale"] += 1
        else:
            spec = workspace_pb2.WorkspaceSpec()
            spec.CopyFrom(one.spec)
            spec.env["VERSION"] = str(self.did["update"])
            update = workspace_pb2.UpdateWorkspaceRequest(workspace=name, spec=spec)
            await self.stub.UpdateWorkspace(update, metadata=self.metadata, timeout=CALL_S)
            one.spec = spec
            self.did["update"] += 1

    async def _delete(self, name: str) -> None:
        # Whoever calls it from now on would be told that it is not there.
        self.living.pop(name)
        await self.stub.DeleteWorkspace(
            workspace_pb2.DeleteWorkspaceRequest(workspace=name), metadata=self.metadata, timeout=CALL_S
        )
        self.did["delete"] += 1

    async def call(self) -> None:
        """Call workspaces that are there, until cancelled; what has begun ends."""
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            try:
                while True:
                    await asyncio.sleep(self.chance.expovariate(self.calls))
                    if self.living:
                        name = self.chance.choice(list(self.living))
                        group.create_task(self._call(session, name, self.living[name].id), name="call")
            except asyncio.CancelledError:
                # The block waits for the calls that are under way.
                pass

    async def _call(self, session: aiohttp.ClientSession, name: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with session.post(f"{self.bridge}/user/hello", json={}, headers=headers, timeout=CALLING) as response:
                said = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[f"no answer: {type(error).__name__}"] += 1
            return
        if said.get("result_code") != 200:
            gone = "" if name in self.living else ", workspace deleted"
            self.answers[f"{response.status}: {said.get('msg', '')[:60]}{gone}"] += 1
            if response.status == 500:
                self.wrong.append(f"a call of {name} found the platform broken: {said.get('msg', '')[:200]}")
            return
        self.answers["answered"] += 1
        answer = json.loads(said["data"])
        if answer["workspace"] != name:
            self.wrong.append(f"a call of {name} was answered by {answer['workspace']} on {answer['node']}")


CALLING: Final = aiohttp.ClientTimeout(total=CALL_S)


def stub_of(channel: grpc.aio.Channel) -> Any:
    """WorkspaceService."""
    return workspace_pb2_grpc.WorkspaceServiceStub(channel)
