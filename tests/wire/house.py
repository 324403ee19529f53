"""A whole control plane in this process, called over real gRPC, and its callers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from ngpu import wire
from ngpu.v1 import (
    asset_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    http_pb2,
    node_pb2_grpc,
    task_pb2,
    task_pb2_grpc,
    usage_pb2_grpc,
    workspace_pb2,
    workspace_pb2_grpc,
)

from controlplane import config, migrations
from controlplane.__main__ import serve

#: Everything on the wire is quick here; what takes longer hangs.
DEADLINE_S: Final = 20.0
#: Holds an asset by the house's ledger; the other is as valid and holds nothing.
RICH: Final = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
POOR: Final = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"


class Client:
    """Somebody with a credential, on a channel of his own. `auth` goes with every call as its metadata."""

    def __init__(self, address: str, credential: str | None) -> None:
        self.credential = credential
        self.channel = grpc.aio.insecure_channel(address, options=wire.BULK_CLIENT_OPTIONS)
        self.auth = ((wire.AUTHORIZATION, f"Bearer {credential}"),) if credential else ()
        self.tasks: Any = task_pb2_grpc.TaskServiceStub(self.channel)
        self.workspaces: Any = workspace_pb2_grpc.WorkspaceServiceStub(self.channel)
        self.nodes: Any = node_pb2_grpc.NodeServiceStub(self.channel)
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(self.channel)
        self.assets: Any = asset_pb2_grpc.AssetServiceStub(self.channel)
        self.usage: Any = usage_pb2_grpc.UsageServiceStub(self.channel)

    async def workspace(self, name: str = "echo", **fields: Any) -> workspace_pb2.Workspace:
        """Make a workspace; an operator can."""
        spec = workspace_pb2.WorkspaceSpec(**{"name": name, "image": "img", "ports": [8080], "replicas": 1, **fields})
        answer = await self.workspaces.CreateWorkspace(
            workspace_pb2.CreateWorkspaceRequest(spec=spec), metadata=self.auth, timeout=DEADLINE_S
        )
        return answer.workspace  # type: ignore[no-any-return]

    async def join_token(self) -> str:
        """A one-time token; an operator can make one."""
        answer = await self.fleet.CreateToken(
            fleet_pb2.CreateTokenRequest(role=fleet_pb2.ROLE_NODE), metadata=self.auth, timeout=DEADLINE_S
        )
        return str(answer.secret)

    async def schedule(self, request: task_pb2.ScheduleRequest) -> task_pb2.ScheduleResponse:
        """Schedule, alone."""
        return await self.tasks.Schedule(request, metadata=self.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]

    async def ready(self, workspace: str, replicas: int = 1) -> workspace_pb2.Workspace:
        """Wait until so many replicas are ready."""
        call = self.workspaces.WatchWorkspace(
            workspace_pb2.WatchWorkspaceRequest(workspace=workspace), metadata=self.auth, timeout=DEADLINE_S
        )
        async for event in call:
            if event.workspace.ready_replicas >= replicas:
                call.cancel()
                return event.workspace  # type: ignore[no-any-return]
        raise AssertionError("the watch ended")


class House:
    """A running control plane."""

    def __init__(self, address: str, state_dir: Path, stop: asyncio.Event, running: "asyncio.Task[None]") -> None:
        self.address = address
        self.state_dir = state_dir
        self.stop = stop
        self.running = running
        self._clients: list[Client] = []
        self.operator = self.client(self._token("operator"))
        self.bridge = self.client(self._token("bridge"))

    def _token(self, name: str) -> str:
        return (self.state_dir / f"{name}.token").read_text().strip()

    def client(self, credential: str | None) -> Client:
        """A new caller."""
        client = Client(self.address, credential)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.channel.close()
        self.stop.set()
        await self.running


@asynccontextmanager
async def house(state_dir: Path, **options: Any) -> AsyncIterator[House]:
    """Start a control plane on `state_dir`, again if it was there before; and stop it in good order."""
    ledger = state_dir / "ledger.toml"
    ledger.write_text(f'[{RICH}]\nAINN = "100.5"\n')
    assets = {"providers": [{"kind": "ledger", "path": str(ledger)}]}
    fixed = {"state_dir": state_dir, "listen": "127.0.0.1:0", "metrics_listen": "", "assets": assets, "stop_grace": 5}
    settings = config.load(None, {**fixed, **options})
    await asyncio.to_thread(migrations.migrate, settings.database)
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop), name="house")
    address = state_dir / "address"
    while not address.exists():
        if running.done():
            running.result()
        await asyncio.sleep(0.002)
    there = House(address.read_text().strip(), state_dir, stop, running)
    try:
        yield there
    finally:
        await there.close()


@contextmanager
def refused(code: grpc.StatusCode, reason: str, words: str = "") -> Iterator[None]:
    """What is within must fail with that status, that reason in the error, and those words in its message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    error = error_of(caught.value)
    assert (caught.value.code(), error.reason) == (code, reason), error.message
    check_words(error)
    assert words in error.message


def error_of(error: grpc.aio.AioRpcError) -> http_pb2.Error:
    """The error that came in the trailing metadata; it must be there, and say the same as the status."""
    found = [value for key, value in error.trailing_metadata() or () if key == wire.ERROR]
    assert len(found) == 1, error
    assert isinstance(found[0], bytes)
    message = http_pb2.Error.FromString(found[0])
    assert message.code == error.code().value[0]
    assert message.message == error.details()
    return message


def check_words(error: http_pb2.Error) -> None:
    """For a person, and nothing of our insides."""
    assert error.message
    for inside in ("Traceback", 'File "', "controlplane.", "sqlalchemy"):
        assert inside not in error.message


def request(
    workspace: workspace_pb2.Workspace | None = None, path: str = "/echo", body: bytes = b"", **fields: Any
) -> task_pb2.ScheduleRequest:
    """A POST to a workspace."""
    wait_s = fields.pop("wait_s", 0.0)
    message = task_pb2.ScheduleRequest(
        workspace_id=workspace.id if workspace is not None else "",
        request=http_pb2.HttpRequest(method="POST", path=path, body=http_pb2.Body(inline=body)),
        **fields,
    )
    if wait_s:
        message.wait.CopyFrom(seconds(wait_s))
    return message


def seconds(number: float) -> Duration:
    """A duration on the wire."""
    return Duration(seconds=int(number), nanos=round(number % 1 * 1e9))


async def until(true: Callable[[], bool]) -> None:
    """Wait until something that announces itself to nobody is so."""
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.002)
