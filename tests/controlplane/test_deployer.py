"""The deployer with simulated nodes: what it tells whom, and that whatever it meets, its promises hold."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from controlplane import explain, model
from controlplane.autoscale import DOWN_AFTER_S, Load
from controlplane.deployer import Assignment, Deployer, hash_of
from controlplane.errors import InvalidArgument, NgpuError, NodeRevoked, Unavailable
from controlplane.fleet import Fleet
from controlplane.model import Availability
from controlplane.report import Gpu, GpuReading, Inventory, ReplicaReport, ReplicaState, Report
from controlplane.rollout import MOVES, MOVES_WITHIN_S
from controlplane.spec import GIB, GpuNeed, Limits, Readiness, Registry, Scale, Spec
from tests.controlplane.fake_rows import FakeRows


class FakeTasks:
    """Remembers what it was told; replicas are as busy as the test says."""

    def __init__(self) -> None:
        self.capacity: dict[str, int] = {}
        self.gone: list[str] = []
        self.lost: list[str] = []
        self.deleted: list[str] = []
        self.running: dict[str, int] = {}
        self.loads: dict[str, Load] = {}

    def set_capacity(
        self, replica_id: str, workspace_uid: str, node_addr: str, capacity: int, *, gpu_ids: Sequence[str] = ()
    ) -> None:
        self.capacity[replica_id] = capacity

    def replica_gone(self, replica_id: str) -> None:
        self.gone.append(replica_id)
        self.capacity.pop(replica_id, None)
        self.running.pop(replica_id, None)

    def node_lost(self, node_addr: str) -> None:
        self.lost.append(node_addr)

    def workspace_deleted(self, workspace_uid: str) -> None:
        self.deleted.append(workspace_uid)

    def load(self, workspace_uid: str) -> Load:
        return self.loads.get(workspace_uid, Load())

    def running_on(self, replica_id: str) -> int:
        return self.running.get(replica_id, 0)


class FakeNode:
    """A node daemon that obeys node.proto: runs what its last list says; what it stops takes three more."""

    def __init__(self, name: str, *, gpus: int = 2) -> None:
        self.addr = name
        cards = tuple(Gpu(f"{name}{n}", "NVIDIA GeForce RTX 4090", 24 * GIB, n) for n in range(gpus))
        self.inventory = Inventory(
            gpus=cards, cpus=32, memory_bytes=256 * GIB, disk_free_bytes=500 * GIB, engine="docker"
        )
        self.containers: dict[str, Assignment] = {}
        self.states: dict[str, ReplicaState] = {}
        self.signs: dict[str, dict[str, Any]] = {}
        self.stopping: dict[str, int] = {}
        self.session = 0
        #: No container comes up here.
        self.broken = False
        #: Lists that are on their way, in order.
        self.inbox: list[list[Assignment]] = []

    def obey(self, desired: list[Assignment]) -> None:
        listed = {assignment.replica_id: assignment for assignment in desired}
        self.stopping = {id: self.stopping.get(id, 4) - 1 for id in self.containers if id not in listed}
        ending = {id: self.containers[id] for id, left in self.stopping.items() if left}
        for id, one in self.containers.items():
            assert id not in listed or listed[id].spec_hash == one.spec_hash, "a container was changed under its tasks"
        self.states = {id: self.next_state(one) for id, one in listed.items()}
        self.states |= dict.fromkeys(ending, ReplicaState.STOPPING)
        self.containers = ending | listed

    def next_state(self, one: Assignment) -> ReplicaState:
        before = self.states.get(one.replica_id)
        if self.broken or one.spec.image.startswith("bad"):
            return ReplicaState.BACKOFF if before is ReplicaState.STARTING else ReplicaState.STARTING
        return ReplicaState.STARTING if before is None else ReplicaState.READY

    def report(self) -> Report:
        readings = tuple(GpuReading(gpu.id, **self.signs.get(gpu.id, {})) for gpu in self.inventory.gpus)
        replicas = tuple(
            ReplicaReport(
                id, self.states[id], capacity=one.spec.concurrency if self.states[id] is ReplicaState.READY else 0
            )
            for id, one in self.containers.items()
        )
        # An Xid is told once.
        for sign in self.signs.values():
            sign.pop("xids", None)
        return Report(self.inventory, readings=readings, replicas=replicas)

    def reboot(self) -> None:
        self.containers, self.states, self.stopping = {}, {}, {}


class Plant:
    """Rows, fleet, deployer and nodes, and a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.rows = FakeRows()
        self.nodes: dict[str, FakeNode] = {}
        self.now = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
        self.now_s = 1000.0
        self.numbers = itertools.count(1)
        self.start()

    def start(self) -> None:
        """Begin, or begin anew after kill -9: only the rows are left."""
        self.tasks = FakeTasks()
        clocks: Any = {"clock": lambda: self.now, "monotonic": lambda: self.now_s}
        self.fleet = Fleet(self.rows, random=self.random, **clocks)
        self.deployer = Deployer(self.fleet, self.tasks, random=self.random, **clocks)

    def random(self, count: int) -> bytes:
        return next(self.numbers).to_bytes(count)

    async def node(self, name: str, **values: Any) -> FakeNode:
        await self.fleet.enroll_node(name, name, token_id=f"t-{name}")
        self.nodes[name] = FakeNode(name, **values)
        self.connect(name)
        return self.nodes[name]

    def connect(self, name: str) -> None:
        self.nodes[name].inbox.clear()
        self.nodes[name].session = self.deployer.session_up(name, "192.0.2.7")
        self.beat(name)

    def beat(self, name: str, *, late: bool = False) -> None:
        """One heartbeat and its answer; `late`: which arrives only after the next heartbeat was sent."""
        node = self.nodes[name]
        self.deployer.report(name, node.report())
        node.inbox.append(self.deployer.desired(name))
        while len(node.inbox) > late:
            node.obey(node.inbox.pop(0))

    def connected(self) -> list[str]:
        return [node.addr for node in self.fleet.nodes() if node.connected]

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.now_s += seconds

    async def settle(self, rounds: int = 30) -> None:
        """Heartbeats and plans until nothing is left to do."""
        for _ in range(rounds):
            self.pass_s(5)
            for name in self.connected():
                self.beat(name)
            await self.deployer.scaler.look()
            while await self.deployer.step():
                pass

    def ready(self, key: str) -> dict[str, str]:
        """Ready replicas and where they are."""
        replicas = self.fleet.replicas_of(self.fleet.workspace(key).uid)
        return {one.id: one.node_addr for one in replicas if self.fleet.state_of(one).state is ReplicaState.READY}

    def serving(self, key: str) -> dict[str, str]:
        """Ready replicas that take tasks, and where they are."""
        ready = self.ready(key)
        return {one.id: one.node_addr for one in self.fleet.replicas() if one.id in ready and one.active}


SPEC = Spec(name="demo", image="demo:1", ports=(8000,), gpu=GpuNeed("4090", 1), concurrency=2)


@pytest.fixture
async def plant() -> AsyncIterator[Plant]:
    plant = Plant()
    await plant.fleet.load()
    yield plant
    await plant.fleet.close()


async def test_a_workspace_is_deployed_and_offered(plant: Plant) -> None:
    await plant.node("a")
    await plant.node("b")
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    assert sorted(plant.ready("demo").values()) == ["a", "b"]
    assert list(plant.tasks.capacity.values()) == [2, 2]


async def test_what_a_node_is_told(plant: Plant) -> None:
    await plant.node("a")
    made = await plant.fleet.create_workspace(SPEC)
    before = plant.fleet.node_changes.version("a")
    await plant.deployer.step()
    assert plant.fleet.node_changes.version("a") > before
    (told,) = plant.deployer.desired("a")
    assert (told.workspace_name, told.generation, told.spec, told.gpu_ids, told.draining) == (
        "demo",
        1,
        SPEC,
        ("a0",),
        False,
    )
    assert made.id not in str(told)
    await plant.settle()
    await plant.fleet.scale_workspace("demo", 0)
    plant.tasks.running[told.replica_id] = 1
    await plant.deployer.step()
    assert [one.draining for one in plant.deployer.desired("a")] == [True]
    plant.tasks.running.clear()
    await plant.deployer.step()
    assert plant.deployer.desired("a") == []


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"replicas": 7}, True),
        ({"limits": Limits(queue_length=5)}, True),
        ({"repeatable": False, "account": "x", "registry": Registry("a", "b")}, True),
        ({"readiness": Readiness("/health"), "concurrency": 3}, True),
        ({"image": "demo:2"}, False),
        ({"command": ("a", "b")}, False),
        ({"env": {"A": "1"}}, False),
        ({"ports": (8000, 8001)}, False),
        ({"cpus": 2}, False),
        ({"memory_bytes": GIB}, False),
        ({"shm_bytes": GIB}, False),
        ({"writable_paths": ("/data",)}, False),
    ],
)
def test_what_makes_another_container(changes: dict[str, Any], same: bool) -> None:
    assert (hash_of(replace(SPEC, **changes), ("a0",)) == hash_of(SPEC, ("a0",))) is same
    assert hash_of(SPEC, ("a1",)) != hash_of(SPEC, ("a0",))


def test_the_order_of_variables_makes_no_other_container() -> None:
    one, other = replace(SPEC, env={"A": "1", "B": "2"}), replace(SPEC, env={"B": "2", "A": "1"})
    assert hash_of(one, ()) == hash_of(other, ())


@pytest.mark.parametrize(
    ("said", "offered"),
    [
        (ReplicaReport("?", ReplicaState.READY, capacity=2), 2),
        (ReplicaReport("?", ReplicaState.READY, capacity=1), 1),
        # A node's word counts up to what the customer allows.
        (ReplicaReport("?", ReplicaState.READY, capacity=999), 2),
        (ReplicaReport("?", ReplicaState.STARTING, capacity=2), 0),
        (ReplicaReport("?", ReplicaState.BACKOFF, capacity=2), 0),
        (None, 0),
    ],
)
async def test_what_is_offered(plant: Plant, said: ReplicaReport | None, offered: int) -> None:
    node = await plant.node("a")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    (id,) = plant.tasks.capacity
    plant.deployer.report("a", Report(node.inventory, replicas=() if said is None else (replace(said, replica_id=id),)))
    assert plant.tasks.capacity == {id: offered}


async def test_what_drains_is_not_offered_whatever_its_node_says(plant: Plant) -> None:
    await plant.node("a")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    (id,) = plant.tasks.capacity
    plant.tasks.running[id] = 1
    await plant.fleet.scale_workspace("demo", 0)
    await plant.settle()
    assert plant.tasks.capacity == {id: 0}
    assert plant.tasks.gone == []
    plant.tasks.running.clear()
    await plant.settle()
    assert plant.tasks.gone == [id]
    assert plant.fleet.replicas() == ()


async def test_a_goodbye_takes_the_offer_back_and_a_broken_stream_does_not(plant: Plant) -> None:
    node = await plant.node("a")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    plant.deployer.session_down("a", clean=False, session=node.session)
    assert list(plant.tasks.capacity.values()) == [2]
    plant.connect("a")
    plant.deployer.session_down("a", clean=True, session=node.session)
    assert list(plant.tasks.capacity.values()) == [0]


async def test_of_two_sessions_the_older_ones_end_says_nothing(plant: Plant) -> None:
    node = await plant.node("a")
    older = node.session
    plant.connect("a")
    plant.deployer.session_down("a", clean=False, session=older)
    assert plant.fleet.node("a").connected
    plant.deployer.session_down("a", clean=False, session=node.session)
    assert not plant.fleet.node("a").connected


async def test_a_lost_node_is_told_once_and_replaced(plant: Plant) -> None:
    await plant.node("a")
    await plant.node("b")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    ((id, lost),) = plant.ready("demo").items()
    plant.deployer.session_down(lost, clean=False)
    plant.pass_s(14)
    await plant.deployer.step()
    assert plant.tasks.lost == []
    await plant.settle()
    assert plant.tasks.lost == [lost]
    assert plant.tasks.capacity[id] == 0
    assert list(plant.ready("demo").values()) == [{"a": "b", "b": "a"}[lost]]
    assert plant.fleet.node(lost).failures == 1


async def test_who_stood_still_gives_nobody_up_for_the_silence(plant: Plant) -> None:
    for name in ("a", "b", "c"):
        await plant.node(name)
    plant.deployer.session_down("c", clean=False)
    plant.pass_s(60)
    plant.fleet.listen_again()
    await plant.deployer.step()
    assert plant.tasks.lost == ["c"], "it was gone before"


async def test_a_lost_node_that_comes_back_stops_what_was_replaced(plant: Plant) -> None:
    a = await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    await plant.node("b", gpus=1)
    (id,) = plant.ready("demo")
    plant.deployer.session_down("a", clean=False)
    await plant.settle()
    assert id in a.containers, "it runs there still"
    assert plant.fleet.replica(id) is not None, "and holds its GPU"
    await plant.fleet.scale_workspace("demo", 2)
    await plant.settle()
    assert len(plant.ready("demo")) == 1
    plant.connect("a")
    await plant.settle()
    assert id not in a.containers
    assert plant.tasks.gone == [id]
    assert sorted(plant.ready("demo").values()) == ["a", "b"]
    assert plant.tasks.lost == ["a"]


async def test_a_lost_node_that_comes_back_ends_what_it_ran_before_it_stops(plant: Plant) -> None:
    a = await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    await plant.node("b", gpus=1)
    (id,) = plant.ready("demo")
    plant.tasks.running[id] = 1
    plant.deployer.session_down("a", clean=False)
    await plant.settle()
    assert plant.tasks.lost == ["a"]
    assert list(plant.serving("demo").values()) == ["b"]
    plant.connect("a")
    await plant.settle()
    assert a.containers[id].draining, "it goes on, and takes nothing new"
    assert plant.tasks.capacity[id] == 0
    assert list(plant.serving("demo").values()) == ["b"]
    plant.tasks.running[id] = 0
    await plant.settle()
    assert id not in a.containers
    assert plant.tasks.gone == [id]


async def test_a_drained_node_empties_without_a_gap(plant: Plant) -> None:
    await plant.node("a")
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    await plant.node("b")
    await plant.fleet.set_availability("a", Availability.DRAINING)
    for _ in range(30):
        assert len(plant.ready("demo")) >= 2
        assert sum(one.active for one in plant.fleet.replicas()) <= 3
        await plant.settle(1)
    assert list(plant.ready("demo").values()) == ["b", "b"]
    assert plant.nodes["a"].containers == {}


async def test_a_failing_gpu_is_left_and_no_other_takes_its_place(plant: Plant) -> None:
    a = await plant.node("a")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    a.signs["a0"] = {"error": "GPU is lost"}
    await plant.settle()
    (replica,) = plant.fleet.replicas()
    assert replica.gpu_ids == ("a1",)
    await plant.fleet.scale_workspace("demo", 2)
    await plant.settle()
    summary, (newest, _) = plant.deployer.explain("demo")
    assert summary == (
        "1 of 2 replicas of demo are ready. Replica of demo: none of 1 will do: 1 no free healthy GPU of model 4090."
    )
    assert newest.refusals == {"no free healthy GPU of model 4090": 1}


async def test_a_contained_memory_error_starts_the_container_anew(plant: Plant) -> None:
    a = await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    (id,) = plant.ready("demo")
    a.signs["a0"] = {"xids": (94,)}
    await plant.settle()
    (other,) = plant.ready("demo")
    assert other != id
    assert plant.tasks.gone == [id]


async def test_a_restart_that_is_due_survives_kill_9(plant: Plant) -> None:
    a = await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    (id,) = plant.ready("demo")
    a.signs["a0"] = {"xids": (94,)}
    plant.beat("a")
    await plant.fleet.save_seen()
    plant.start()
    await plant.fleet.load()
    plant.connect("a")
    await plant.settle()
    (other,) = plant.ready("demo")
    assert other != id
    assert plant.fleet.node("a").doomed == frozenset()


async def test_a_container_nobody_knows_is_stopped_before_anything_is_placed(plant: Plant) -> None:
    a = await plant.node("a", gpus=1)
    orphan = Assignment("r-orphan", "old", 1, SPEC, ("a0",), "", draining=False)
    a.containers, a.states = {"r-orphan": orphan}, {"r-orphan": ReplicaState.READY}
    await plant.fleet.create_workspace(SPEC)
    plant.deployer.report("a", a.report())
    await plant.deployer.step()
    assert plant.fleet.replicas() == ()
    await plant.settle()
    assert list(plant.ready("demo").values()) == ["a"]
    assert "r-orphan" not in a.containers


async def test_a_deleted_workspace_ends_what_it_runs_and_is_told_once(plant: Plant) -> None:
    await plant.node("a")
    made = await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    (id,) = plant.ready("demo")
    plant.tasks.running[id] = 1
    await plant.fleet.delete_workspace("demo")
    await plant.settle()
    assert plant.tasks.deleted == [made.uid]
    assert plant.nodes["a"].containers[id].draining
    plant.tasks.running.clear()
    await plant.settle()
    assert plant.nodes["a"].containers == {}
    plant.start()
    await plant.fleet.load()
    await plant.deployer.step()
    assert plant.tasks.deleted == [made.uid], "again after a restart: it may have been missed"


async def test_a_revoked_node_has_nothing_at_once(plant: Plant) -> None:
    await plant.node("a")
    await plant.node("b")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    ((id, addr),) = plant.ready("demo").items()
    await plant.fleet.revoke_node(addr)
    assert plant.deployer.desired(addr) == []
    await plant.settle()
    assert plant.tasks.gone == [id]
    assert plant.tasks.lost == [addr]
    assert len(plant.ready("demo")) == 1
    with pytest.raises(NodeRevoked):
        plant.connect(addr)


async def test_missing_replicas_are_explained_until_there_is_room(plant: Plant) -> None:
    await plant.node("a", gpus=0)
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    unplaced = plant.fleet.workspace("demo").unplaced
    assert unplaced is not None
    assert explain.summary(unplaced) == "Replica of demo: none of 1 will do: 1 no GPU of model 4090."
    writes = len(plant.rows.writes)
    await plant.settle(5)
    assert len(plant.rows.writes) == writes, "the same reason is not written again and again"
    await plant.node("b")
    await plant.settle()
    assert plant.fleet.workspace("demo").unplaced is None
    summary, (decision,) = plant.deployer.explain("demo")
    assert summary == "1 of 1 replicas of demo are ready."
    assert (decision.chosen, decision.refusals) == ("b", {"no GPU of model 4090": 1})


async def test_an_update_goes_one_by_one_and_never_serves_with_fewer(plant: Plant) -> None:
    await plant.node("a", gpus=4)
    await plant.fleet.create_workspace(replace(SPEC, replicas=3))
    await plant.settle()
    await plant.fleet.replace_workspace("demo", replace(SPEC, image="demo:2", replicas=3))
    for _ in range(40):
        assert len(plant.serving("demo")) >= 3
        assert sum(one.active for one in plant.fleet.replicas()) <= 4
        await plant.settle(1)
    assert {one.spec.image for one in plant.nodes["a"].containers.values()} == {"demo:2"}
    assert len(plant.ready("demo")) == 3
    assert plant.deployer.explain("demo")[0] == "3 of 3 replicas of demo are ready."
    workspace = plant.fleet.workspace("demo")
    assert (workspace.generation, workspace.returns_to) == (2, 0)


@pytest.mark.parametrize("killed", [False, True])
async def test_an_update_that_does_not_come_up_is_taken_back(plant: Plant, killed: bool) -> None:
    await plant.node("a", gpus=3)
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    before = plant.ready("demo")
    await plant.fleet.replace_workspace("demo", replace(SPEC, image="bad:2", replicas=2))
    await plant.settle(3)
    summary, _ = plant.deployer.explain("demo")
    assert "Updating to generation 2: 0 of 2 replicas are ready, 2 of an earlier generation serve until" in summary
    if killed:
        plant.start()
        await plant.fleet.load()
        plant.connect("a")
        assert plant.fleet.workspace("demo").spec.image == "bad:2"
    for _ in range(20):
        assert plant.serving("demo") == before
        await plant.settle(1)
    workspace = plant.fleet.workspace("demo")
    assert (workspace.generation, workspace.spec.image, workspace.returns_to) == (1, "demo:1", 0)
    assert plant.ready("demo") == before
    assert "Generation 2 was taken back: on node a it failed 4 times" in plant.deployer.explain("demo")[0]
    again = await plant.fleet.replace_workspace("demo", replace(SPEC, image="demo:3", replicas=2))
    assert again.generation == 3, "a number is not given twice"
    await plant.settle()
    assert {one.spec.image for one in plant.nodes["a"].containers.values()} == {"demo:3"}
    assert plant.fleet.workspace("demo").deployment.fault == ""


async def test_what_needs_no_new_container_is_told_to_the_old(plant: Plant) -> None:
    await plant.node("a")
    await plant.fleet.create_workspace(SPEC)
    await plant.settle()
    before = plant.ready("demo")
    version = plant.fleet.node_changes.version("a")
    changed = replace(SPEC, concurrency=5, limits=Limits(queue_length=7))
    assert (await plant.fleet.replace_workspace("demo", changed)).generation == 1
    assert plant.fleet.node_changes.version("a") > version
    await plant.settle()
    assert plant.ready("demo") == before
    assert list(plant.tasks.capacity.values()) == [5]


async def test_an_update_replaced_by_another_leads_to_the_last(plant: Plant) -> None:
    await plant.node("a", gpus=3)
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    for image in ("demo:2", "bad:3", "demo:4"):
        await plant.fleet.replace_workspace("demo", replace(SPEC, image=image, replicas=2))
        await plant.settle(2)
        assert len(plant.serving("demo")) >= 2
    await plant.settle()
    assert {one.spec.image for one in plant.nodes["a"].containers.values()} == {"demo:4"}


async def test_who_describes_what_was_there_before_gets_it_back(plant: Plant) -> None:
    await plant.node("a", gpus=3)
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    before = plant.ready("demo")
    await plant.fleet.replace_workspace("demo", replace(SPEC, image="demo:2", replicas=2))
    await plant.settle(1)
    assert (await plant.fleet.replace_workspace("demo", replace(SPEC, replicas=2))).generation == 1
    await plant.settle()
    assert plant.ready("demo") == before


async def test_a_cure_gets_the_place_of_what_it_cures(plant: Plant) -> None:
    await plant.node("a", gpus=1)
    await plant.fleet.create_workspace(replace(SPEC, image="bad:1"))
    await plant.settle()
    assert plant.ready("demo") == {}
    await plant.fleet.replace_workspace("demo", SPEC)
    await plant.settle()
    assert len(plant.ready("demo")) == 1


async def test_a_workspace_sleeps_when_idle_and_wakes_on_call(plant: Plant) -> None:
    await plant.node("a", gpus=4)
    made = await plant.fleet.create_workspace(replace(SPEC, scale=Scale(0, 3, idle_time_s=60)))
    await plant.settle(5)
    assert len(plant.ready("demo")) == 1, "it begins with what is asked for"
    await plant.settle(20)
    assert plant.fleet.replicas() == ()
    assert plant.deployer.explain("demo")[0].endswith("It is idle: the next call brings up a replica.")
    plant.start()
    plant.tasks.loads[made.uid] = Load(queued=1)
    await plant.fleet.load()
    assert plant.fleet.workspace("demo").wanted == 0, "it sleeps on"
    plant.connect("a")
    await plant.settle(5)
    assert len(plant.ready("demo")) == 1
    plant.tasks.loads[made.uid] = Load(queued=50, running=2, ready=1, mean_s=60)
    await plant.settle(5)
    assert len(plant.ready("demo")) == 3
    plant.tasks.loads[made.uid] = Load(running=1, ready=3, mean_s=60)
    await plant.settle(int(DOWN_AFTER_S / 5) - 3)
    assert len(plant.ready("demo")) == 3, "not at once"
    await plant.settle(10)
    assert len(plant.ready("demo")) < 3


async def test_an_update_of_a_sleeping_workspace_shows_when_it_wakes(plant: Plant) -> None:
    await plant.node("a", gpus=4)
    sleepy = replace(SPEC, scale=Scale(0, 3, idle_time_s=60))
    made = await plant.fleet.create_workspace(sleepy)
    await plant.settle()
    assert plant.fleet.replicas() == ()
    await plant.fleet.replace_workspace("demo", replace(sleepy, image="bad:2"))
    plant.tasks.loads[made.uid] = Load(queued=1)
    await plant.settle(20)
    assert {one.spec.image for one in plant.nodes["a"].containers.values()} == {"demo:1"}
    assert "Generation 2 was taken back" in plant.deployer.explain("demo")[0]


async def test_who_scales_by_hand_what_follows_the_load_stays_within_its_bounds(plant: Plant) -> None:
    made = await plant.fleet.create_workspace(replace(SPEC, scale=Scale(1, 3)))
    assert (await plant.fleet.scale_workspace(made.uid, 3)).wanted == 3
    with pytest.raises(InvalidArgument, match="follow the load between 1 and 3"):
        await plant.fleet.scale_workspace(made.uid, 4)
    fixed = await plant.fleet.replace_workspace("demo", replace(SPEC, replicas=2))
    assert fixed.wanted == 2
    assert (await plant.fleet.replace_workspace("demo", replace(SPEC, replicas=9, scale=Scale(0, 5)))).wanted == 5


async def test_what_does_not_come_up_is_tried_elsewhere_and_then_told(plant: Plant) -> None:
    for name in "abcde":
        await plant.node(name, gpus=1)
    await plant.fleet.create_workspace(replace(SPEC, image="bad:1"))
    tried = set()
    for _ in range(80):
        await plant.settle(1)
        tried |= {one.node_addr for one in plant.fleet.replicas() if one.active}
        assert len([one for one in plant.fleet.replicas() if one.active]) <= 1
    assert len(tried) == 1 + MOVES
    summary, _ = plant.deployer.explain("demo")
    assert "does not come up: it failed" in summary
    assert "Nor did it on 3 other nodes." in summary
    plant.start()
    await plant.fleet.load()
    for name in "abcde":
        plant.connect(name)
    await plant.settle(40)
    assert len(plant.fleet.workspace("demo").deployment.moves) == MOVES, "a restart of ours makes no more of it"
    plant.pass_s(MOVES_WITHIN_S)
    await plant.settle(1)
    assert len(plant.fleet.workspace("demo").deployment.moves) == MOVES + 1, "but an hour does"


async def test_a_node_on_which_nothing_comes_up_is_left(plant: Plant) -> None:
    await plant.node("a", gpus=2)
    plant.nodes["a"].broken = True
    await plant.fleet.create_workspace(SPEC)
    await plant.settle(5)
    await plant.node("b", gpus=2)
    await plant.settle()
    assert list(plant.ready("demo").values()) == ["b"]
    await plant.fleet.scale_workspace("demo", 2)
    await plant.settle()
    assert list(plant.ready("demo").values()) == ["b", "b"]


async def test_a_restart_costs_nothing(plant: Plant) -> None:
    await plant.node("a")
    await plant.node("b")
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    before = plant.ready("demo")
    plant.start()
    await plant.fleet.load()
    await plant.deployer.step()
    plant.pass_s(10)
    for name in plant.nodes:
        plant.connect(name)
    await plant.settle()
    assert plant.ready("demo") == before
    assert sorted(plant.tasks.capacity) == sorted(before)


@pytest.mark.parametrize("fail_in", range(4))
@pytest.mark.parametrize("fail_after_write", [False, True])
async def test_a_failed_write_is_made_good(plant: Plant, fail_in: int, fail_after_write: bool) -> None:
    await plant.node("a")
    await plant.node("b")
    await plant.fleet.create_workspace(replace(SPEC, replicas=2))
    await plant.settle()
    await plant.fleet.set_availability("a", Availability.DRAINING)
    plant.rows.fail_in, plant.rows.fail_after_write = fail_in, fail_after_write
    failures = 0
    for _ in range(10):
        try:
            await plant.settle(3)
        except Unavailable:
            failures += 1
    assert failures == 1
    assert list(plant.ready("demo").values()) == ["b", "b"]
    assert len(plant.fleet.replicas()) == 2


async def test_the_loop_is_woken_by_news(plant: Plant) -> None:
    await plant.node("a")
    running = asyncio.create_task(plant.deployer.run())
    made = await plant.fleet.create_workspace(SPEC)
    while not plant.fleet.replicas_of(made.uid):
        await plant.fleet.workspace_changes.newer(made.uid, plant.fleet.workspace_changes.version(made.uid))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


NAMES = ("a", "b", "c")


class Promises(RuleBasedStateMachine):
    """Whatever happens in whatever order: no GPU is held twice, at most one more than wanted, and it comes to rest."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.plant = Plant()
        self.count = 0
        self.planned = False

    def do(self, what: Any) -> Any:
        try:
            return self.loop.run_until_complete(what)
        except NgpuError:
            return None

    @initialize(gpus=st.lists(st.integers(1, 3), min_size=3, max_size=3), replicas=st.integers(1, 4))
    def begin(self, gpus: list[int], replicas: int) -> None:
        self.do(self.plant.fleet.load())
        for name, count in zip(NAMES, gpus, strict=True):
            self.do(self.plant.node(name, gpus=count))
        self.create(replicas, 1)
        self.do(self.plant.settle(2))

    @rule(replicas=st.integers(0, 3), gpus=st.integers(0, 2))
    @precondition(lambda self: self.count < 4)
    def create(self, replicas: int, gpus: int) -> None:
        self.count += 1
        spec = Spec(name=f"ws{self.count}", image="x", ports=(80,), replicas=replicas, gpu=GpuNeed(count=gpus), cpus=8)
        self.do(self.plant.fleet.create_workspace(spec))

    @rule(number=st.integers(1, 4), replicas=st.integers(0, 4))
    def scale(self, number: int, replicas: int) -> None:
        self.do(self.plant.fleet.scale_workspace(f"ws{number}", replicas))

    @rule(number=st.integers(1, 4), image=st.sampled_from(["x", "y", "z", "bad"]), cpus=st.integers(1, 8))
    def update(self, number: int, image: str, cpus: int) -> None:
        with contextlib.suppress(NgpuError):
            spec = self.plant.fleet.workspace(f"ws{number}").spec
            self.do(self.plant.fleet.replace_workspace(spec.name, replace(spec, image=image, cpus=float(cpus))))

    @rule(number=st.integers(1, 4), least=st.integers(0, 2), more=st.integers(0, 2))
    def follow(self, number: int, least: int, more: int) -> None:
        with contextlib.suppress(NgpuError):
            spec = self.plant.fleet.workspace(f"ws{number}").spec
            scale = Scale(least, least + more, idle_time_s=10) if least + more else Scale()
            self.do(self.plant.fleet.replace_workspace(spec.name, replace(spec, scale=scale)))

    @rule(number=st.integers(1, 4), queued=st.integers(0, 9))
    def call(self, number: int, queued: int) -> None:
        with contextlib.suppress(NgpuError):
            self.plant.tasks.loads[self.plant.fleet.workspace(f"ws{number}").uid] = Load(queued=queued, mean_s=60)
            self.do(self.plant.deployer.scaler.look())

    @rule(number=st.integers(1, 4))
    def delete(self, number: int) -> None:
        self.do(self.plant.fleet.delete_workspace(f"ws{number}"))

    @rule(name=st.sampled_from(NAMES), availability=st.sampled_from(Availability))
    def steer(self, name: str, availability: Availability) -> None:
        self.do(self.plant.fleet.set_availability(name, availability))

    @rule(name=st.sampled_from(NAMES))
    def break_session(self, name: str) -> None:
        if self.plant.fleet.node(name).connected:
            self.plant.deployer.session_down(name, clean=False)

    @rule(name=st.sampled_from(NAMES), rebooted=st.booleans())
    def connect(self, name: str, rebooted: bool) -> None:
        if rebooted:
            self.plant.nodes[name].reboot()
        if not self.plant.fleet.node(name).revoked:
            self.plant.connect(name)

    @rule(name=st.sampled_from(NAMES), number=st.integers(0, 2), sign=st.sampled_from(["", "lost", "xid", "gone"]))
    def afflict(self, name: str, number: int, sign: str) -> None:
        node = self.plant.nodes[name]
        gpu_id = f"{name}{number}"
        node.signs[gpu_id] = {"error": "lost"} if sign == "lost" else {"xids": (94,)} if sign == "xid" else {}
        if sign == "gone" and number < len(node.inventory.gpus):
            gpus = tuple(gpu for gpu in node.inventory.gpus if gpu.id != gpu_id)
            node.inventory = replace(node.inventory, gpus=gpus)

    @rule(name=st.sampled_from(NAMES), broken=st.booleans())
    def break_down(self, name: str, broken: bool) -> None:
        self.plant.nodes[name].broken = broken

    @rule(name=st.sampled_from(NAMES))
    @precondition(lambda self: len(self.plant.fleet.nodes()) == len(NAMES))
    def revoke(self, name: str) -> None:
        self.do(self.plant.fleet.revoke_node(name))

    @rule(pick=st.integers(0, 9), busy=st.integers(0, 2))
    def work(self, pick: int, busy: int) -> None:
        replicas = self.plant.fleet.replicas()
        if replicas:
            self.plant.tasks.running[replicas[pick % len(replicas)].id] = busy

    @rule()
    def turn(self) -> None:
        self.beat(5, set(NAMES), late=False)
        self.step(None, after=False)

    @rule(seconds=st.sampled_from([1, 5, 16, 130]), names=st.sets(st.sampled_from(NAMES)), late=st.booleans())
    def beat(self, seconds: int, names: set[str], late: bool) -> None:
        self.plant.pass_s(seconds)
        for name in names & set(self.plant.connected()):
            self.plant.beat(name, late=late)

    @rule(fail_in=st.one_of(st.none(), st.integers(0, 3)), after=st.booleans())
    def step(self, fail_in: int | None, after: bool) -> None:
        self.plant.rows.fail_in, self.plant.rows.fail_after_write = fail_in, after
        done = self.do(self.plant.deployer.step())
        self.plant.rows.fail_in = None
        self.planned = done is not None
        if self.planned:
            for workspace in self.plant.fleet.workspaces(deleted=True):
                active = [one for one in self.plant.fleet.replicas_of(workspace.uid) if one.active]
                assert len(active) <= workspace.wanted + 1

    @rule()
    def kill_and_start(self) -> None:
        self.plant.start()
        self.do(self.plant.fleet.load())

    @invariant()
    def no_gpu_is_held_twice(self) -> None:
        rows = [row for row in self.plant.rows.replica.values() if row.gone_time is None]
        held = [gpu_id for row in rows for gpu_id in msgspec.json.decode(row.gpu_ids_json)]
        assert len(held) == len(set(held))
        for addr, node in self.plant.nodes.items():
            used_cpus = sum(self.spec_of(row).cpus for row in rows if row.node_addr == addr)
            assert used_cpus <= node.inventory.cpus
        for node in self.plant.nodes.values():
            if not self.plant.rows.node or self.plant.rows.node[node.addr].revoke_time is not None:
                continue
            used = [gpu_id for one in node.containers.values() for gpu_id in one.gpu_ids]
            assert len(used) == len(set(used))

    def spec_of(self, row: model.Replica) -> Spec:
        return self.plant.fleet.workspace(row.workspace_uid).spec_at(row.generation)

    def teardown(self) -> None:
        plant = self.plant
        if plant.nodes:
            # All is well again: the nodes that are left connect, their GPUs recover, nothing is drained or busy.
            for node in plant.fleet.nodes():
                plant.nodes[node.addr].signs.clear()
                plant.nodes[node.addr].broken = False
                plant.connect(node.addr)
                self.do(plant.fleet.set_availability(node.addr, Availability.OPEN))
            plant.tasks.running.clear()
            plant.tasks.loads.clear()
            # Past all lulls and idle times.
            self.do(plant.settle(160))
            self.at_rest()
        self.do(plant.fleet.close())
        self.loop.close()

    def at_rest(self) -> None:
        plant = self.plant
        assert self.do(plant.deployer.step()) == 0
        for workspace in plant.fleet.workspaces(deleted=True):
            replicas = plant.fleet.replicas_of(workspace.uid)
            assert all(one.active for one in replicas)
            assert len(replicas) <= workspace.wanted
            missing = workspace.wanted - sum(one.generation == workspace.generation for one in replicas)
            assert bool(missing) is (workspace.unplaced is not None and not workspace.deleted)
        assert {one.id for one in plant.fleet.replicas()} == {
            id for node in plant.fleet.nodes() for id in plant.nodes[node.addr].containers
        }


Promises.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPromises = Promises.TestCase


@pytest.mark.parametrize("seed", range(20))
def test_storms(seed: int) -> None:
    """The same promises in long lives, of which hypothesis tries few."""
    chance = random.Random(seed)
    storm = Promises()
    storm.begin([chance.randint(1, 3) for _ in NAMES], chance.randint(1, 4))

    def name() -> str:
        return chance.choice(NAMES)

    happenings: list[tuple[int, Callable[[], None]]] = [
        (100, storm.turn),
        (20, lambda: storm.beat(chance.choice([1, 5, 16]), set(chance.sample(NAMES, 2)), late=chance.random() < 0.5)),
        (20, lambda: storm.step(chance.choice([None, 0, 1]), after=chance.random() < 0.5)),
        (8, lambda: storm.steer(name(), chance.choice(list(Availability)))),
        (8, lambda: storm.break_session(name())),
        (12, lambda: storm.connect(name(), rebooted=chance.random() < 0.3)),
        (8, lambda: storm.afflict(name(), chance.randrange(3), chance.choice(["", "", "lost", "xid"]))),
        (8, lambda: storm.work(chance.randrange(10), chance.choice([0, 0, 1]))),
        (3, lambda: storm.break_down(name(), broken=chance.random() < 0.5)),
        (4, lambda: storm.call(chance.randint(1, 4), chance.choice([0, 3]))),
        (3, lambda: storm.follow(chance.randint(1, 4), chance.randint(0, 1), chance.randint(0, 2))),
        (6, lambda: storm.update(chance.randint(1, 4), chance.choice(["x", "y", "bad"]), chance.randint(1, 8))),
        (8, lambda: storm.scale(chance.randint(1, 4), chance.randint(0, 4))),
        (2, lambda: storm.create(chance.randint(1, 3), chance.randint(0, 2)) if storm.count < 4 else None),
        (2, storm.kill_and_start),
    ]
    weights = [weight for weight, _ in happenings]
    for _ in range(400):
        ((_, happen),) = chance.choices(happenings, weights)
        happen()
        storm.no_gpu_is_held_twice()
    storm.teardown()


@pytest.mark.parametrize("seed", range(10))
async def test_updates_alone_never_cost_a_serving_replica(plant: Plant, seed: int) -> None:
    """Good and bad ones in any order, reports that cross, restarts of ours, writes that fail."""
    chance = random.Random(seed)
    for name in NAMES:
        await plant.node(name, gpus=2)
    await plant.fleet.create_workspace(replace(SPEC, replicas=4))
    await plant.settle()
    for turn in range(200):
        if turn % 20 == 0:
            image = chance.choice(["demo:1", "demo:2", "demo:3", "bad:1"])
            with contextlib.suppress(NgpuError):
                await plant.fleet.replace_workspace("demo", replace(SPEC, image=image, replicas=4))
        plant.pass_s(2)
        if chance.random() < 0.05:
            plant.start()
            await plant.fleet.load()
        for name in chance.sample(NAMES, 2):
            if plant.fleet.node(name).connected:
                plant.beat(name, late=chance.random() < 0.3)
            else:
                plant.connect(name)
        plant.rows.fail_in = chance.choice([None, None, 0, 1])
        with contextlib.suppress(NgpuError):
            await plant.deployer.step()
        plant.rows.fail_in = None
        states = {id: state for node in plant.nodes.values() for id, state in node.states.items()}
        active = [one.id for one in plant.fleet.replicas() if one.active]
        assert [states.get(id) for id in active].count(ReplicaState.READY) >= 4
    for name in NAMES:
        plant.connect(name)
    await plant.settle(60)
    workspace = plant.fleet.workspace("demo")
    assert not workspace.spec.image.startswith("bad")
    assert {one.generation for one in plant.fleet.replicas()} == {workspace.generation}
