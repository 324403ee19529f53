"""Sessions over real gRPC: joining, reporting, obeying, and beginning anew whatever happens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from ngpu.v1 import http_pb2, node_pb2, workspace_pb2

from nodedaemon.bulk import Bulk
from nodedaemon.dial import Backoff, Dialler
from nodedaemon.engine import CachedImage, EngineInfo, Mount, Volume
from nodedaemon.errors import EnrolRefused, NodeError, NotEnrolled, Revoked, Superseded
from nodedaemon.execute import Executor
from nodedaemon.gpus import Gpu, GpuInventory, GpuReading
from nodedaemon.identity import Identity
from nodedaemon.journal import Journal
from nodedaemon.machine import Machine
from nodedaemon.relay import Relay
from nodedaemon.session import Pace, Session
from nodedaemon.spool import Spool
from nodedaemon.statement import assignment
from tests.nodedaemon.fakes import SOON_S, FakeControlPlane, FakeGpus, FakeReplicas, container, control_plane, echo


class FakeEngine:
    """An engine of which only the description is asked."""

    async def info(self) -> EngineInfo:
        return EngineInfo("docker", version="27.1", disk_free_bytes=1000)

    async def images(self) -> list[CachedImage]:
        return [CachedImage("demo:1", 500)]


class FakeCaches:
    """Two volumes, of which one has not been measured."""

    def __init__(self) -> None:
        self.volume_limit_bytes = 7
        self.dead: list[str] = []

    def volumes(self) -> list[Volume]:
        return [Volume("w-1", "models", 5), Volume("w-2", "models")]

    def bury(self, workspace_uids: Iterable[str]) -> None:
        self.dead = list(workspace_uids)


class Node:
    """A daemon whose replicas and GPUs are fakes."""

    def __init__(self, plane: FakeControlPlane, state_dir: Path, *, token: str = "", **options: Any) -> None:
        self.plane = plane
        self.replicas = FakeReplicas()
        self.gpus = FakeGpus()
        self.machine = Machine(FakeEngine())  # type: ignore[arg-type]
        self.identity = Identity.load(state_dir / "node.key")
        self.spool = Spool(state_dir / "spool", limit_bytes=2**30)
        dialler = Dialler(plane.address)
        self.bulk_channel = dialler.channel()
        self.bulk = Bulk(self.bulk_channel)
        self.relay = Relay()
        self.executor = Executor(
            places=self.replicas,
            relay=self.relay,
            bulk=self.bulk,
            spool=self.spool,
            journal=Journal(state_dir / "journal"),
        )
        self.session = Session(
            dialler=dialler,
            identity=self.identity,
            boot_id="boot-1",
            name="my-node",
            token=token,
            executor=self.executor,
            bulk=self.bulk,
            replicas=self.replicas,
            gpus=self.gpus,
            machine=self.machine,
            chance=lambda: 0.0,
            **options,
        )
        self.executing = asyncio.create_task(self.executor.run())
        self.speaking = asyncio.create_task(self.session.run())

    async def ends_with(self, fault: type[NodeError]) -> str:
        """The session ends for good."""
        async with asyncio.timeout(SOON_S):
            with pytest.raises(fault) as caught:
                await self.speaking
        return str(caught.value)

    async def stop(self) -> None:
        for task in (self.speaking, self.executing):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, NodeError):
                await task
        self.relay.close()
        await self.bulk_channel.close()
        self.spool.close()


@pytest.fixture
async def plane() -> AsyncIterator[FakeControlPlane]:
    async with control_plane() as fake:
        yield fake


Boot = Callable[..., Node]


@pytest.fixture
async def boot(plane: FakeControlPlane, tmp_path: Path) -> AsyncIterator[Boot]:
    nodes: list[Node] = []

    def start(*, joined: bool = True, **options: Any) -> Node:
        node = Node(plane, tmp_path, **options)
        if joined:
            plane.nodes.add(node.identity.address)
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        await node.stop()


def desired(replica_id: str = "r-1", **spec: Any) -> node_pb2.Assignment:
    return node_pb2.Assignment(
        replica_id=replica_id,
        workspace_name="demo",
        spec=workspace_pb2.WorkspaceSpec(name="demo", image="demo:1", ports=[80], **spec),
        spec_hash="h1",
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0)


# Joining.


async def test_unknown_node_joins_with_its_token(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot(joined=False, token="join-me")
    await plane.report()
    assert plane.nodes == {node.identity.address}
    assert (plane.logins[0].boot_id, plane.logins[0].version) == ("boot-1", node.machine.daemon_version)


async def test_unknown_node_without_a_token_is_told_what_to_do(boot: Boot) -> None:
    assert "ngpu-node join" in await boot(joined=False).ends_with(NotEnrolled)


async def test_refused_token_is_told_in_the_control_planes_words(boot: Boot) -> None:
    assert "not known here" in await boot(joined=False, token="stale").ends_with(EnrolRefused)


async def test_revoked_node_stops(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.revoked.add(node.identity.address)
    await node.ends_with(Revoked)


async def test_node_revoked_in_mid_session_stops(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    await plane.report()
    plane.end_heartbeat(grpc.StatusCode.PERMISSION_DENIED, "NODE_REVOKED")
    await node.ends_with(Revoked)


# Reports.


async def test_report_says_all_that_is(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    gpu = Gpu("GPU-1", "NVIDIA RTX 4090", 24 * 2**30, index=1, pci_bus_id="00:01.0")
    node.gpus.found = GpuInventory((gpu,), driver_version="550", cuda_version="12.4", message="one is missing")
    node.gpus.now = (GpuReading("GPU-1", utilization=50, temperature_c=0, xids=(79,)),)
    node.replicas.apply([assignment(desired(concurrency=3))])
    await node.machine.survey()
    report = await plane.report()
    assert report.sequence == 1
    inventory = report.inventory
    assert (inventory.gpus[0].id, inventory.gpus[0].memory_bytes, inventory.gpu_message) == (
        "GPU-1",
        24 * 2**30,
        "one is missing",
    )
    assert (inventory.engine, inventory.engine_version, inventory.disk_free_bytes) == ("docker", "27.1", 1000)
    assert inventory.cpus >= 1
    assert inventory.memory_bytes > 2**28
    reading = report.readings[0]
    assert (reading.utilization, list(reading.xids)) == (50, [79])
    # Zero degrees are a reading; what the driver does not offer is none.
    assert reading.HasField("temperature_c")
    assert not reading.HasField("power_w")
    replica = report.replicas[0]
    assert (replica.replica_id, replica.state, replica.capacity) == ("r-1", workspace_pb2.REPLICA_STATE_READY, 3)
    assert report.images[0].reference == "demo:1"


async def test_volumes_are_told_and_the_dead_are_heard_of(boot: Boot, plane: FakeControlPlane) -> None:
    caches = FakeCaches()
    plane.dead = ["w-2"]
    boot(caches=caches)
    report = await plane.report()
    assert report.inventory.volume_limit_bytes == 7
    assert [(one.workspace_uid, one.name, one.size_bytes) for one in report.volumes] == [
        ("w-1", "models", 5),
        ("w-2", "models", 0),
    ]
    await until(lambda: caches.dead == ["w-2"])


async def test_shares_and_volumes_arrive() -> None:
    message = desired(
        gpu=workspace_pb2.GpuNeed(count=1, share_milli=250),
        volumes=[workspace_pb2.Volume(name="models", path="/models")],
    )
    message.workspace_uid = "w-1"
    found = assignment(message)
    assert (found.gpu_share, found.workspace_uid, found.mounts) == (250, "w-1", (Mount("models", "/models"),))


async def test_readings_are_acknowledged_once_the_report_is_answered(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    node.gpus.now = (GpuReading("GPU-1", xids=(79,)),)
    plane.desired = [desired()]
    await plane.report()
    await until(lambda: node.gpus.acknowledged)
    assert node.gpus.acknowledged[0].xids == (79,)


async def test_what_should_be_is_applied(boot: Boot, plane: FakeControlPlane) -> None:
    limit = workspace_pb2.Readiness(path="/ready", start_limit=Duration(seconds=90))
    plane.desired = [desired(command=["serve", "--fast"], env={"A": "b"}, readiness=limit)]
    node = boot()
    await until(lambda: node.replicas.applied is not None)
    found = (node.replicas.applied or [])[0]
    assert (found.replica_id, found.workspace, found.image, found.ports) == ("r-1", "demo", "demo:1", (80,))
    assert (found.command, dict(found.env)) == (("serve", "--fast"), {"A": "b"})
    assert (found.readiness.port, found.readiness.path, found.readiness.start_limit_s) == (80, "/ready", 90.0)
    # What the spec leaves open is resolved.
    assert (found.concurrency, found.cpus, found.memory_bytes) == (1, 1.0, 4 * 2**30)
    assert found.registry is None


async def test_change_is_reported_at_once(boot: Boot, plane: FakeControlPlane) -> None:
    plane.desired = [desired()]
    boot()
    assert not (await plane.report()).replicas
    # The next would be due in a minute; what was applied comes at once.
    assert (await plane.report()).replicas[0].replica_id == "r-1"


async def test_what_is_as_before_is_said_once_a_stream(boot: Boot, plane: FakeControlPlane) -> None:
    plane.report_after_ms = 300
    node = boot()
    node.gpus.now = (GpuReading("GPU-1", utilization=1),)
    assert (await plane.report()).HasField("inventory")
    node.gpus.now = (GpuReading("GPU-1", utilization=2),)
    second = await plane.report()
    assert second.same
    assert {field.name for field, _ in second.ListFields()} == {"sequence", "readings", "same"}
    # Readings are never left out.
    assert second.readings[0].utilization == 2
    plane.desired = [desired()]
    while (changed := await plane.report()).same:
        pass
    assert changed.HasField("inventory")
    assert changed.replicas[0].replica_id == "r-1"
    plane.session = "forgotten"
    plane.end_heartbeat(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    while (anew := await plane.report()).sequence != 1:
        pass
    assert anew.HasField("inventory")
    assert anew.replicas[0].replica_id == "r-1"


async def test_pace_is_the_control_planes(boot: Boot, plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodedaemon.session.REPORT_AFTER_S", 3600.0)
    plane.report_after_ms = 300
    boot(answer_limit_s=3600.0)
    assert [(await plane.report()).sequence for _ in range(3)] == [1, 2, 3]


async def test_what_else_a_control_plane_says_does_not_put_reports_off(boot: Boot, plane: FakeControlPlane) -> None:
    plane.report_after_ms, plane.quiet_s = 300, 0.02
    boot(answer_limit_s=3600.0)
    assert [(await plane.report()).sequence for _ in range(3)] == [1, 2, 3]


async def test_attempts_held_are_restated(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    async with container(echo) as there:
        node.replicas.addresses["r-1"] = there.address
        stream = await plane.stream()
        request = http_pb2.HttpRequest(method="GET", path="/")
        stream.send(starts=[node_pb2.Start(attempt_id="t.1", replica_id="r-1", port=80, request=request)])
        await stream.result()
        node.session.report_soon()
        while not (report := await plane.report()).attempt_ids:
            pass
        assert list(report.attempt_ids) == ["t.1"]


# Endings and beginnings.


async def test_session_that_is_not_known_any_more_begins_anew(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    await plane.report()
    plane.session = "forgotten"
    plane.end_heartbeat(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    await until(lambda: len(plane.logins) == 2)
    assert (await plane.report()).sequence == 1
    assert node.session.sessions == 2


async def test_broken_execute_stream_begins_the_session_anew(boot: Boot, plane: FakeControlPlane) -> None:
    boot()
    (await plane.stream()).end()
    await plane.stream()
    assert len(plane.logins) == 2


async def test_daemon_that_another_one_takes_over_from_stops(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    await plane.report()
    plane.login_elsewhere()
    assert "key" in await node.ends_with(Superseded)
    assert Superseded.exit_code == 3


async def test_control_plane_that_comes_back_is_found(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.desired = [desired()]
    await plane.report()
    await until(lambda: node.replicas.applied)
    port = int(plane.address.rpartition(":")[2])
    await plane.stop()
    await until(lambda: not node.session.up)
    # Nothing was stopped for want of a control plane.
    assert node.replicas.applied
    again = FakeControlPlane()
    again.nodes = plane.nodes
    again.desired = plane.desired
    await again.start(port)
    try:
        report = await again.report()
        assert [replica.replica_id for replica in report.replicas] == ["r-1"]
    finally:
        await node.stop()
        await again.stop()


async def test_control_plane_that_answers_no_report_is_left(boot: Boot, plane: FakeControlPlane) -> None:
    plane.answering = False
    boot(answer_limit_s=0.3)
    await until(lambda: len(plane.logins) == 2)


async def test_goodbye_ends_it_cleanly(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    await plane.report()
    node.session.leave()
    async with asyncio.timeout(SOON_S):
        await node.speaking
    while not (last := await plane.report()).goodbye:
        pass
    assert last.goodbye
    assert len(plane.logins) == 1


async def test_stopping_node_offers_no_capacity(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    plane.desired = [desired(concurrency=3)]
    await plane.report()
    await until(lambda: node.replicas.applied)
    node.executor.close()
    node.session.report_soon()
    while not (report := await plane.report()).replicas or report.replicas[0].capacity:
        pass
    assert report.replicas[0].state == workspace_pb2.REPLICA_STATE_READY


async def test_leaving_does_not_wait_for_a_control_plane_that_is_gone(boot: Boot, plane: FakeControlPlane) -> None:
    node = boot()
    await plane.report()
    await plane.stop()
    await until(lambda: not node.session.up)
    node.session.leave()
    async with asyncio.timeout(SOON_S):
        await node.speaking


def test_some_reports_may_come_in_a_row_and_more_at_their_pace() -> None:
    pace = Pace(0.25, 3)
    assert [pace.pause_s(10.0) for _ in range(4)] == [0, 0, 0, 0.25]
    assert [pace.pause_s(10.25 + 0.25 * n) for n in range(3)] == [0.25] * 3
    # Two intervals of quiet give two of them back.
    assert [pace.pause_s(11.5) for _ in range(3)] == [0, 0, 0.25]


def test_backoff_grows_to_its_cap_and_begins_anew() -> None:
    backoff = Backoff(0.1, 1.0, chance=lambda: 1.0)
    assert [backoff.next() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    backoff.reset()
    assert backoff.next() == pytest.approx(0.1)
    assert Backoff(0.1, 1.0, chance=lambda: 0.0).next() == pytest.approx(0.05)
