"""When workspaces are looked at. What is decided then: test_autoscale; what follows from it: test_deployer."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from controlplane.autoscale import Load
from controlplane.fleet import Fleet, Workspace
from controlplane.scaler import LOOK_S, Scaler
from controlplane.spec import Scale, Spec
from tests.controlplane.fake_rows import FakeRows

SOON_S = 10.0
ASLEEP = Spec(name="asleep", image="demo:1", ports=(8000,), replicas=0, scale=Scale(max_replicas=2))


class Plant:
    """A fleet and a scaler that runs, with a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.loads: dict[str, Load] = {}
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.rows = FakeRows()
        self.fleet = Fleet(self.rows, monotonic=lambda: self.now_s)
        self.scaler = Scaler(self.fleet, self, monotonic=lambda: self.now_s)

    def load(self, workspace_uid: str) -> Load:
        self.asked.put_nowait(workspace_uid)
        return self.loads.get(workspace_uid, Load())

    async def follow(self, before: Workspace) -> int:
        """The number of replicas once it has changed."""
        async with asyncio.timeout(SOON_S):
            while (target := self.fleet.workspace(before.uid).deployment.target) == before.deployment.target:
                version = self.fleet.workspace_changes.version(before.uid)
                await self.fleet.workspace_changes.newer(before.uid, version)
        return target


@pytest.fixture
async def plant() -> AsyncIterator[Plant]:
    plant = Plant()
    await plant.fleet.load()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(plant.scaler.run())
        yield plant
        running.cancel()
    await plant.fleet.close()


async def test_who_sleeps_is_looked_at_when_a_task_calls_for_it(plant: Plant) -> None:
    called = await plant.fleet.create_workspace(ASLEEP)
    await plant.fleet.create_workspace(replace(ASLEEP, name="other"))
    plant.loads[called.uid] = Load(queued=1)
    # The clock stands: the time for a look at all does not come.
    plant.fleet.call(called.uid)
    assert await plant.follow(called) == 1
    asked = [plant.asked.get_nowait() for _ in range(plant.asked.qsize())]
    assert asked == [called.uid]


async def test_all_are_looked_at_in_time(plant: Plant) -> None:
    workspace = await plant.fleet.create_workspace(ASLEEP)
    plant.loads[workspace.uid] = Load(queued=1)
    plant.now_s += LOOK_S
    plant.fleet.calls.set()
    assert await plant.follow(workspace) == 1


async def test_a_call_outlives_a_failed_write(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = await plant.fleet.create_workspace(ASLEEP)
    plant.loads[workspace.uid] = Load(queued=1)
    monkeypatch.setattr("controlplane.scaler.RETRY_S", 0.0)
    plant.rows.fail_in = 0
    plant.fleet.call(workspace.uid)
    assert await plant.follow(workspace) == 1
    assert plant.asked.qsize() >= 2


@pytest.mark.parametrize(
    "spec", [replace(ASLEEP, scale=Scale()), replace(ASLEEP, replicas=1)], ids=["follows no load", "has one"]
)
async def test_calls_for_others_change_nothing(plant: Plant, spec: Spec) -> None:
    workspace = await plant.fleet.create_workspace(spec)
    plant.fleet.call(workspace.uid)
    assert not plant.fleet.calls.is_set()
    assert not plant.fleet.take_called()


async def test_one_that_was_deleted_meanwhile_is_left_alone(plant: Plant) -> None:
    gone = await plant.fleet.create_workspace(ASLEEP)
    plant.loads[gone.uid] = Load(queued=1)
    await plant.fleet.delete_workspace(gone.uid)
    plant.fleet.call(gone.uid)
    last = await plant.fleet.create_workspace(replace(ASLEEP, name="last"))
    plant.loads[last.uid] = Load(queued=1)
    plant.fleet.call(last.uid)
    await plant.follow(last)
    assert plant.fleet.workspace(gone.uid).deployment.target == 0
