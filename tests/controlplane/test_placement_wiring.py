"""What the deployer's placements rest on: the nodes as the rows say, shares of GPUs, and the demand it learns."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.census import Node, Replica, Workspace
from controlplane.errors import Unavailable
from controlplane.grade import Grade, Health
from controlplane.model import Availability
from controlplane.placement import Need
from controlplane.report import Gpu, Inventory, ReplicaReport, ReplicaState, Report
from controlplane.room import Room, looks_alike, newly_wanted, view_of
from controlplane.sites import Sites
from controlplane.spec import GIB, GpuNeed, Scale, Spec
from tests.controlplane.test_deployer import SPEC, Plant

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
CARDS = tuple(Gpu(f"GPU-{number}", "RTX 4090", 24 * GIB, number) for number in range(3))
INVENTORY = Inventory(gpus=CARDS, cpus=16, memory_bytes=64 * GIB, disk_free_bytes=500 * GIB, engine="docker")
NODE = Node(
    addr="0xa",
    name="a",
    enroll_time=NOW,
    inventory=INVENTORY,
    connected=True,
    report=Report(INVENTORY),
    health={card.id: Health() for card in CARDS},
)
SHARED = replace(SPEC, name="shared", gpu=GpuNeed(count=1, share=300))


@pytest.fixture
async def plant() -> AsyncIterator[Plant]:
    plant = Plant()
    await plant.fleet.load()
    yield plant
    await plant.fleet.close()


def replica(number: int, *gpu_ids: str, generation: int = 1) -> Replica:
    return Replica(f"r-{number}", "w-1", "0xa", generation, gpu_ids, NOW)


def test_a_node_that_says_nothing_new_looks_as_it_did() -> None:
    quiet = replace(NODE, heard_s=9.0, last_seen_time=NOW, reports=7, report=Report(INVENTORY, images=()))
    assert looks_alike(NODE, quiet)
    assert view_of(NODE, (), lambda _: SPEC, NOW) == view_of(quiet, (), lambda _: SPEC, NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"connected": False},
        {"availability": Availability.DRAINING},
        {"inventory": replace(INVENTORY, disk_free_bytes=1)},
        {"health": {card.id: Health(Grade.QUARANTINED, "broken") for card in CARDS}},
        {"images": {"demo:1": 5}},
        {"failures": 1},
        {"report": None},
        {"report": Report(INVENTORY, attempt_ids=("t.1",))},
        {"said": {}},
    ],
)
def test_a_node_that_changes_does_not_look_alike(change: dict[str, Any]) -> None:
    loaded = replace(NODE, said={"r-2": ReplicaReport("r-2", ReplicaState.READY, capacity=4)})
    changed = replace(loaded, **change)
    assert view_of(loaded, (), lambda _: SPEC, NOW) != view_of(changed, (), lambda _: SPEC, NOW)
    assert not looks_alike(loaded, changed)


def test_a_view_is_the_node_less_what_its_replicas_hold() -> None:
    specs = {1: SPEC, 2: SHARED, 3: replace(SHARED, gpu=GpuNeed(count=1, share=450))}
    replicas = [
        replica(1, "GPU-0"),
        replica(2, "GPU-1", generation=2),
        replica(3, "GPU-1", generation=3),
        replace(replica(4, "GPU-2", generation=2), drain_time=NOW),
    ]
    view = view_of(NODE, replicas, lambda one: specs[one.generation], NOW)
    assert [(gpu.free, gpu.shared) for gpu in view.gpus] == [(False, 0), (True, 750), (True, 300)]
    assert (view.cpus_free, view.memory_free_bytes, view.replicas) == (12, 48 * GIB, 4)
    assert view.here == {"w-1": 3}
    assert view.connected
    assert not view_of(NODE, (), lambda _: SPEC, NOW, lost=True).connected


def test_a_container_that_was_given_up_is_an_orphan() -> None:
    said = {"r-9": ReplicaReport("r-9", ReplicaState.STOPPING)}
    assert view_of(replace(NODE, said=said), (), lambda _: SPEC, NOW).orphans == 1


def test_within_a_plan_each_placement_sees_those_before_it_and_after_it_none_is_left() -> None:
    sites = Sites()
    view = view_of(NODE, (), lambda _: SPEC, NOW)
    sites.put(view)
    workspace = Workspace("w-1", "1" * 24, SPEC, 1, NOW)
    with Room(sites, time=NOW, image_bytes=lambda _: None) as room:
        found = [room.find(workspace, f"r-{number}") for number in range(4)]
        assert [one.gpu_ids for one in found[:3] if isinstance(one, Replica)] == [("GPU-0",), ("GPU-1",), ("GPU-2",)]
        assert not isinstance(found[3], Replica)
        assert found[3].refusals == {"no free healthy GPU of model 4090": 1}
    assert sites["0xa"] is view


FOLLOWS = Scale(min_replicas=0, max_replicas=5)


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [
        (None, replace(SPEC, replicas=3), 3),
        (replace(SPEC, replicas=3), replace(SPEC, replicas=3, image="demo:2"), 0),
        (replace(SPEC, replicas=1), replace(SPEC, replicas=3), 2),
        (replace(SPEC, replicas=3), replace(SPEC, replicas=1), 0),
        # Of another kind: all are asked for.
        (replace(SPEC, replicas=3), replace(SPEC, replicas=3, gpu=GpuNeed(count=2)), 3),
        (replace(SPEC, replicas=3), replace(SPEC, replicas=3, gpu=GpuNeed("4090", 1, share=500)), 3),
        (replace(SPEC, replicas=3), replace(SPEC, replicas=3, cpus=8), 3),
        (None, replace(SPEC, replicas=3, scale=FOLLOWS), 0),
    ],
)
def test_what_counts_as_asked_for(before: Spec | None, after: Spec, more: int) -> None:
    was = Workspace("w-1", "1" * 24, before, 1, NOW) if before else None
    assert newly_wanted(was, Workspace("w-1", "1" * 24, after, 1, NOW)) == more


async def test_replicas_with_shares_live_on_one_gpu_until_it_is_full(plant: Plant) -> None:
    await plant.node("a", gpus=2)
    await plant.fleet.create_workspace(replace(SHARED, replicas=7))
    await plant.fleet.create_workspace(replace(SPEC, name="whole", replicas=0))
    await plant.settle()
    shared = sorted(one.gpu_ids for one in plant.fleet.replicas_of(plant.fleet.workspace("shared").uid))
    assert shared == [("a0",)] * 3 + [("a1",)] * 3
    unplaced = plant.fleet.workspace("shared").unplaced
    assert unplaced is not None
    assert unplaced.refusals == {"no healthy GPU with 300/1000 free": 1}
    await plant.fleet.scale_workspace("whole", 1)
    await plant.settle()
    unplaced = plant.fleet.workspace("whole").unplaced
    assert unplaced is not None
    assert unplaced.refusals == {"no free healthy GPU of model 4090": 1}
    await plant.fleet.delete_workspace("shared")
    await plant.settle()
    assert len(plant.ready("whole")) == 1


async def test_a_share_is_held_over_kill_9(plant: Plant) -> None:
    await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(replace(SHARED, replicas=3))
    await plant.settle()
    plant.start()
    await plant.fleet.load()
    plant.connect("a")
    await plant.fleet.create_workspace(replace(SHARED, name="fourth"))
    await plant.settle()
    assert len(plant.ready("shared")) == 3
    assert plant.ready("fourth") == {}


async def test_what_a_failed_write_would_have_placed_holds_nothing(plant: Plant) -> None:
    await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(SPEC)
    plant.rows.fail_in = 0
    with pytest.raises(Unavailable):
        await plant.deployer.step()
    assert plant.fleet.replicas() == ()
    await plant.settle()
    assert len(plant.ready("demo")) == 1


async def test_nodes_that_did_not_change_are_not_seen_anew(plant: Plant) -> None:
    await plant.node("a")
    await plant.node("b")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    before = {name: plant.deployer._sites[name] for name in ("a", "b")}
    plant.beat("a")
    await plant.deployer.step()
    assert plant.deployer._sites["a"] is not before["a"]
    assert plant.deployer._sites["b"] is before["b"]
    await plant.fleet.revoke_node("b")
    await plant.deployer.step()
    assert plant.deployer._sites.addrs == {"a"}


async def test_the_demand_is_learnt_and_learnt_again_after_a_restart(plant: Plant) -> None:
    lots = (("NVIDIA GeForce RTX 4090", 24 * GIB, 500),)
    assert plant.deployer._sites.fragmentation.of(lots, 64) == 0
    await plant.fleet.create_workspace(replace(SPEC, replicas=3))
    await plant.fleet.create_workspace(SHARED)
    await plant.deployer.step()
    # Half a GPU is useless to three requests of four.
    assert plant.deployer._sites.fragmentation.of(lots, 64) == pytest.approx(0.375, abs=0.001)
    plant.start()
    await plant.fleet.load()
    await plant.deployer.step()
    assert plant.deployer._sites.fragmentation.of(lots, 64) == pytest.approx(0.375, abs=0.001)
    need = Need("w-9", "x", gpu=GpuNeed(count=1))
    assert not plant.deployer._sites.knows(need)
