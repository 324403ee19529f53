"""The fleet: found by every key, written before it is shown, the same after a restart."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane import explain
from controlplane.errors import Conflict, InvalidArgument, NodeRevoked, NodeUnknown, NotFound, Unavailable
from controlplane.explain import Candidate
from controlplane.fleet import SEEN_S, Fleet, Replica, Rows, Workspace
from controlplane.generations import VERSIONS
from controlplane.health import Grade
from controlplane.migrations import migrate
from controlplane.model import Availability, Role, Token
from controlplane.report import (
    CachedImage,
    Gpu,
    GpuReading,
    GpuTest,
    GpuTestState,
    Inventory,
    ReplicaReport,
    ReplicaState,
    Report,
)
from controlplane.room import looks_alike
from controlplane.spec import GIB, Spec
from controlplane.store import Store
from tests.controlplane.fake_rows import FakeRows

SPEC = Spec(name="demo", image="demo:1", ports=(8000, 9000), env={"KEY": "secret"}, replicas=2)
ADDR = "0xAb5801a7D398351b8bE11C439e05C5B3259aeC9B"
OTHER = "0x52908400098527886E0F7030069857D2E4169EE7"
CARD = Gpu("GPU-1", "NVIDIA GeForce RTX 4090", 24 * GIB)
INVENTORY = Inventory(gpus=(CARD,), cpus=16, memory_bytes=64 * GIB, disk_free_bytes=100 * GIB, engine="docker")
REPORT = Report(INVENTORY, readings=(GpuReading("GPU-1"),))


class Time:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
        self.now_s = 1000.0

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.now_s += seconds

    def clock(self) -> datetime:
        return self.now

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def rows() -> FakeRows:
    return FakeRows()


@pytest.fixture
def time() -> Time:
    return Time()


def opened(rows: Rows, time: Time) -> Fleet:
    return Fleet(rows, clock=time.clock, monotonic=time.monotonic)


@pytest.fixture
def fleet(rows: FakeRows, time: Time) -> Fleet:
    return opened(rows, time)


def replica(workspace: Workspace, number: int = 1, **values: Any) -> Replica:
    one = Replica(f"r-{number}", workspace.uid, ADDR, 1, ("GPU-1",), workspace.create_time)
    return replace(one, **values)


async def test_a_workspace_is_found_by_every_key(fleet: Fleet) -> None:
    made = await fleet.create_workspace(SPEC)
    assert len(made.id) == 24
    assert made.uid.startswith("w-")
    assert fleet.workspace(made.id) == fleet.workspace(made.uid) == fleet.workspace("demo") == made
    assert fleet.workspace_of(made.id) == made.uid
    assert fleet.workspace_of("demo") is None
    with pytest.raises(NotFound):
        fleet.workspace("other")


async def test_neither_id_nor_secrets_are_in_a_repr(fleet: Fleet) -> None:
    made = await fleet.create_workspace(SPEC)
    assert made.id not in repr(made)
    assert "secret" not in repr(made)


async def test_a_faulty_description_makes_nothing(fleet: Fleet, rows: FakeRows) -> None:
    with pytest.raises(InvalidArgument, match=r"name: .*; image: "):
        await fleet.create_workspace(replace(SPEC, name="Demo", image=""))
    assert rows.workspace == {}


async def test_a_name_is_taken_while_its_workspace_lives(fleet: Fleet) -> None:
    first = await fleet.create_workspace(SPEC)
    with pytest.raises(Conflict, match="'demo'"):
        await fleet.create_workspace(SPEC)
    await fleet.delete_workspace("demo")
    second = await fleet.create_workspace(SPEC)
    assert fleet.workspace("demo") == second
    assert fleet.workspace(first.id).deleted
    assert [workspace.uid for workspace in fleet.workspaces()] == [second.uid]
    assert len(fleet.workspaces(deleted=True)) == 2


async def test_of_many_at_once_one_gets_the_name(fleet: Fleet, rows: FakeRows) -> None:
    made = await asyncio.gather(*(fleet.create_workspace(SPEC) for _ in range(5)), return_exceptions=True)
    assert [type(one) for one in made].count(Workspace) == 1
    assert [type(one) for one in made].count(Conflict) == 4
    assert len(rows.workspace) == 1


async def test_scaling_changes_only_the_number(fleet: Fleet) -> None:
    made = await fleet.create_workspace(SPEC)
    scaled = await fleet.scale_workspace(made.id, 5)
    assert scaled == replace(made, spec=replace(SPEC, replicas=5), deployment=replace(made.deployment, target=5))
    with pytest.raises(InvalidArgument):
        await fleet.scale_workspace("demo", 1001)
    with pytest.raises(NotFound):
        await fleet.scale_workspace("other", 1)


async def test_a_pull_that_stalls_is_marked(fleet: Fleet, time: Time) -> None:
    made = await fleet.create_workspace(SPEC)
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    replica = Replica("r-1", made.uid, ADDR, 1, (), time.now)
    await fleet.add_replicas([replica])
    fleet.session_up(ADDR, "")
    for progress, message in ((30, "pulling x"), (30, "pulling x: no progress for 2 min"), (31, "pulling x")):
        said = ReplicaReport("r-1", ReplicaState.PULLING, progress, "pulling x")
        fleet.report(ADDR, replace(REPORT, replicas=(said,)))
        time.pass_s(1)
        fleet.report(ADDR, replace(REPORT, replicas=(said,)))
        assert fleet.state_of(replica).message == message
        time.pass_s(120)


async def test_what_an_update_may_not_change(fleet: Fleet) -> None:
    await fleet.create_workspace(SPEC)
    await fleet.publish_route("img2img", "demo", port=SPEC.ports[0])
    with pytest.raises(InvalidArgument, match=r"name: .*'demo'.*; ports: the route 'img2img' leads to"):
        await fleet.replace_workspace("demo", replace(SPEC, name="other", ports=(81,)))
    with pytest.raises(InvalidArgument, match="image"):
        await fleet.replace_workspace("demo", replace(SPEC, image=""))
    with pytest.raises(NotFound):
        await fleet.replace_workspace("other", SPEC)


async def test_generations_that_replicas_are_of_are_kept_and_no_others(
    fleet: Fleet, rows: FakeRows, time: Time
) -> None:
    made = await fleet.create_workspace(SPEC)
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    for number in range(1, VERSIONS + 2):
        replica = Replica(f"r-{number}", made.uid, ADDR, number, (), time.now)
        if number <= VERSIONS:
            await fleet.add_replicas([replica])
            await fleet.replace_workspace("demo", replace(SPEC, image=f"demo:{number + 1}"))
    await fleet.add_replicas([replica])
    with pytest.raises(Conflict, match="earlier descriptions"):
        await fleet.replace_workspace("demo", replace(SPEC, image="one:too-many"))
    again = opened(rows, time)
    await again.load()
    workspace = again.workspace("demo")
    assert workspace.generation == VERSIONS + 1
    assert [workspace.spec_at(number).image for number in (1, 2, 9)] == [SPEC.image, "demo:2", "demo:9"]
    gone = [replace(one, gone_time=time.now) for one in again.replicas() if one.generation < 5]
    await again.update_replicas(gone)
    workspace = await again.replace_workspace("demo", replace(SPEC, image="demo:10"))
    assert [version.generation for version in workspace.deployment.versions] == [5, 6, 7, 8, 9]


async def test_a_verdict_on_what_is_not_current_any_more_changes_nothing(fleet: Fleet) -> None:
    made = await fleet.create_workspace(SPEC)
    second = await fleet.replace_workspace("demo", replace(SPEC, image="demo:2"))
    await fleet.keep_good(made.uid, 1)
    await fleet.take_back(made.uid, 1, 7, "it crashed")
    assert fleet.workspace("demo") == second


async def test_a_deleted_workspace_wants_nothing_and_cannot_be_scaled(fleet: Fleet) -> None:
    made = await fleet.create_workspace(SPEC)
    await fleet.publish_route("img2img", "demo")
    deleted = await fleet.delete_workspace(made.id)
    assert (deleted.wanted, fleet.routes()) == (0, [])
    assert await fleet.delete_workspace(made.id) == deleted
    with pytest.raises(NotFound):
        await fleet.scale_workspace(made.id, 1)
    with pytest.raises(NotFound):
        await fleet.publish_route("img2img", made.id)


async def test_routes_have_defaults_and_move(fleet: Fleet) -> None:
    first = await fleet.create_workspace(SPEC)
    second = await fleet.create_workspace(replace(SPEC, name="other"))
    route = await fleet.publish_route("sdapi/v1/img2img", "demo")
    assert (route.workspace_uid, route.port, route.path) == (first.uid, 8000, "/sdapi/v1/img2img")
    await fleet.publish_route("sdapi/v1/img2img", second.id, port=9000, path="/x")
    moved = fleet.route("sdapi/v1/img2img")
    assert moved is not None
    assert (moved.workspace_uid, moved.port, moved.path) == (second.uid, 9000, "/x")
    await fleet.delete_route("sdapi/v1/img2img")
    await fleet.delete_route("sdapi/v1/img2img")
    assert fleet.routes() == []


async def test_a_reserved_route_is_refused(fleet: Fleet) -> None:
    await fleet.create_workspace(SPEC)
    with pytest.raises(InvalidArgument, match="REST interface"):
        await fleet.publish_route("queryTask", "demo")


@pytest.mark.parametrize(
    ("asked", "given"),
    [("node", "node"), ("Node A!", "node-a"), ("", "node"), ("..", "node"), ("x" * 80, "x" * 63), ("gpü", "gp")],
)
async def test_a_nodes_name_is_made_fit(fleet: Fleet, asked: str, given: str) -> None:
    assert (await fleet.enroll_node(ADDR, asked, token_id="t-1")).name == given


async def test_a_nodes_name_is_made_unique(fleet: Fleet) -> None:
    names = [(await fleet.enroll_node(f"0x{n}", "x" * 63, token_id=f"t-{n}")).name for n in range(3)]
    assert names == ["x" * 63, "x" * 61 + "-2", "x" * 61 + "-3"]


async def test_a_node_is_found_by_address_in_any_case_and_by_name(fleet: Fleet) -> None:
    node = await fleet.enroll_node(ADDR, "a", token_id="t-1")
    assert fleet.node(ADDR) == fleet.node(ADDR.lower()) == fleet.node("a") == node
    with pytest.raises(NodeUnknown):
        fleet.node("b")
    # A name that looks like another's address is not taken for it.
    await fleet.enroll_node(OTHER, ADDR.lower(), token_id="t-2")
    assert fleet.node(ADDR.lower()) == node


async def test_enrolling_twice_is_no_error_unless_revoked(fleet: Fleet, rows: FakeRows) -> None:
    node = await fleet.enroll_node(ADDR, "a", token_id="t-1")
    assert await fleet.enroll_node(ADDR, "b", token_id="t-1") == node
    assert rows.tokens == {"t-1": ADDR}
    revoked = await fleet.revoke_node("a")
    assert revoked.revoked
    assert fleet.nodes() == []
    assert fleet.nodes(revoked=True) == [revoked]
    with pytest.raises(NodeRevoked):
        await fleet.enroll_node(ADDR, "a", token_id="t-2")
    with pytest.raises(NodeRevoked):
        fleet.session_up(ADDR, "")


@pytest.mark.parametrize("real", [False, True])
async def test_all_is_there_again_after_a_restart(rows: FakeRows, time: Time, tmp_path: Path, real: bool) -> None:
    if not real:
        await check_restart(rows, time)
        return
    url = f"sqlite:///{tmp_path}/ngpu.db"
    migrate(url)
    store = await Store.open(url)
    await store.add_token(Token(id="t-1", secret_hash=b"x", role=Role.NODE, create_time=time.now))
    await check_restart(store, time)
    await store.close()


async def check_restart(rows: Rows, time: Time) -> None:
    fleet = opened(rows, time)
    made = await fleet.create_workspace(SPEC)
    await fleet.enroll_node(ADDR, "a", token_id="t-1", ip="192.0.2.7")
    await fleet.set_availability("a", Availability.CORDONED)
    await fleet.publish_route("img2img", "demo")
    decision = explain.decide(time.now, "replica r-1", [Candidate("0x1", cost=0.1)], [])
    await fleet.add_replicas([replica(made, explanation=explain.encode(decision)), replica(made, 2)])
    await fleet.update_replicas([replica(made, 2, stop_time=time.now, gone_time=time.now)])
    await fleet.keep_unplaced(made.uid, decision)
    again = opened(rows, time)
    await again.load()
    assert again.workspaces() == fleet.workspaces()
    assert again.routes() == fleet.routes()
    assert again.nodes() == fleet.nodes()
    assert again.replicas() == fleet.replicas()
    assert [one.id for one in again.replicas_on(ADDR)] == ["r-1"]


async def test_replicas_are_found_until_they_are_gone(fleet: Fleet, time: Time) -> None:
    made = await fleet.create_workspace(SPEC)
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    one, two = replica(made, 1), replica(made, 2)
    await fleet.add_replicas([one, two])
    assert fleet.replicas_of(made.uid) == fleet.replicas_on(ADDR) == fleet.replicas() == (one, two)
    drained = replace(one, drain_time=time.now)
    await fleet.update_replicas([drained])
    assert fleet.replicas_of(made.uid) == (drained, two)
    await fleet.update_replicas([replace(drained, stop_time=time.now, gone_time=time.now)])
    assert fleet.replicas_of(made.uid) == fleet.replicas_on(ADDR) == (two,)
    assert fleet.replica("r-1") is None


async def test_how_a_replica_stands(fleet: Fleet, time: Time) -> None:
    made = await fleet.create_workspace(SPEC)
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    one = replica(made)
    await fleet.add_replicas([one])
    assert fleet.state_of(one).state is ReplicaState.LOST
    assert fleet.state_of(one).message == "Node a is not connected."
    fleet.session_up(ADDR, "192.0.2.7")
    assert fleet.state_of(one).state is ReplicaState.ASSIGNED
    pulling = ReplicaReport("r-1", ReplicaState.PULLING, progress=40, message="pulling demo:1")
    fleet.report(ADDR, replace(REPORT, replicas=(pulling,)))
    assert fleet.state_of(one) == pulling
    assert fleet.state_of(replace(one, stop_time=time.now)).state is ReplicaState.STOPPING
    fleet.session_down(ADDR)
    assert fleet.state_of(one).state is ReplicaState.LOST


async def test_changes_are_told_to_those_they_concern(fleet: Fleet) -> None:
    made = await fleet.create_workspace(SPEC)
    other = await fleet.create_workspace(replace(SPEC, name="other"))
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    await fleet.add_replicas([replica(made)])
    fleet.session_up(ADDR, "")

    def versions() -> tuple[int, int, int]:
        changes = fleet.workspace_changes
        return changes.version(made.uid), changes.version(other.uid), fleet.node_changes.version(ADDR)

    before = versions()
    waiting = asyncio.create_task(fleet.workspace_changes.newer(made.uid, before[0]))
    fleet.report(ADDR, replace(REPORT, replicas=(ReplicaReport("r-1", ReplicaState.PULLING),)))
    # What a node says of its replicas is news of the workspace; the node itself need not be told what it said.
    assert versions() == (before[0] + 1, before[1], before[2])
    assert await waiting == before[0] + 1
    fleet.report(ADDR, replace(REPORT, replicas=(ReplicaReport("r-1", ReplicaState.PULLING),)))
    assert versions()[0] == before[0] + 1
    await fleet.scale_workspace("other", 7)
    assert versions() == (before[0] + 1, before[1] + 1, before[2])


@pytest.mark.parametrize(
    ("changes", "news"),
    [
        ({}, False),
        ({"attempt_ids": ("t.1",)}, False),
        ({"inventory": replace(INVENTORY, disk_free_bytes=1)}, False),
        ({"inventory": replace(INVENTORY, memory_bytes=1)}, True),
        ({"inventory": replace(INVENTORY, gpus=())}, True),
        ({"readings": (GpuReading("GPU-1", temperature_c=70),)}, False),
        ({"readings": (GpuReading("GPU-1", error="lost"),)}, True),
        ({"images": (CachedImage("demo:1", GIB),)}, True),
        ({"replicas": (ReplicaReport("r-9", ReplicaState.READY),)}, True),
    ],
)
async def test_only_what_plans_are_made_of_is_news(fleet: Fleet, changes: dict[str, Any], news: bool) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, REPORT)
    fleet.news.clear()
    fleet.report(ADDR, replace(REPORT, **changes))
    assert fleet.news.is_set() is news


async def test_a_node_that_only_reads_its_gpus_anew_looks_as_it_did(fleet: Fleet) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, REPORT)
    before = fleet.node("a")
    fleet.report(ADDR, replace(REPORT, readings=(GpuReading("GPU-1", temperature_c=70, utilization=90),)))
    after = fleet.node("a")
    assert looks_alike(before, after)
    assert (after.reports, after.memories) == (before.reports + 1, before.memories)
    fleet.report(ADDR, replace(REPORT, readings=(GpuReading("GPU-1", error="lost"),)))
    assert not looks_alike(after, fleet.node("a"))


async def test_what_a_node_says_of_itself_is_kept_but_not_at_every_heartbeat(
    fleet: Fleet, rows: FakeRows, time: Time
) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "192.0.2.7")
    fleet.report(ADDR, REPORT)
    await fleet.save_seen()
    assert rows.node[ADDR].ip == "192.0.2.7"
    assert b"GPU-1" in rows.node[ADDR].inventory_json
    first = rows.node[ADDR].last_seen_time
    for _ in range(5):
        time.pass_s(5)
        fleet.report(ADDR, REPORT)
        await fleet.save_seen()
    assert rows.node[ADDR].last_seen_time == first
    time.pass_s(SEEN_S)
    fleet.report(ADDR, REPORT)
    await fleet.save_seen()
    assert rows.node[ADDR].last_seen_time == time.now
    assert rows.writes.count("update_node") == 2


async def test_a_write_while_a_node_reports_loses_neither(fleet: Fleet, rows: FakeRows) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    cordon = asyncio.create_task(fleet.set_availability("a", Availability.CORDONED))
    await asyncio.sleep(0)
    fleet.report(ADDR, REPORT)
    await asyncio.gather(cordon, fleet.save_seen())
    assert fleet.node("a").availability is Availability.CORDONED
    assert fleet.node("a").inventory == INVENTORY
    assert rows.node[ADDR].availability is Availability.CORDONED
    assert b"GPU-1" in rows.node[ADDR].inventory_json


async def test_gpus_missing_since_before_the_restart_are_noticed(fleet: Fleet, rows: FakeRows, time: Time) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, REPORT)
    await fleet.save_seen()
    again = opened(rows, time)
    await again.load()
    again.session_up(ADDR, "")
    again.report(ADDR, Report(replace(INVENTORY, gpus=())))
    assert again.node("a").health["GPU-1"].grade is Grade.QUARANTINED


async def test_opening_a_node_is_the_word_that_its_gpus_were_tested(fleet: Fleet) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    gone = replace(INVENTORY, gpus=(CARD, Gpu("GPU-2", "RTX 4090", 24 * GIB, 1)))
    fleet.report(ADDR, Report(gone, readings=(GpuReading("GPU-1", xids=(79,)), GpuReading("GPU-2"))))
    fleet.report(ADDR, REPORT)
    assert [health.grade for health in fleet.node("a").health.values()] == [Grade.QUARANTINED] * 2
    await fleet.set_availability("a", Availability.DRAINING)
    await fleet.set_availability("a", Availability.OPEN)
    fleet.report(ADDR, REPORT)
    assert {id: health.grade for id, health in fleet.node("a").health.items()} == {"GPU-1": Grade.OK}


async def test_images_are_compared_by_what_they_name(fleet: Fleet) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, replace(REPORT, images=(CachedImage("docker.io/library/demo:latest", 5), CachedImage("?", 1))))
    assert fleet.node("a").images == {"docker.io/library/demo:latest": 5, "?": 1}
    assert fleet.image_bytes("docker.io/library/demo:latest") == 5
    process = replace(INVENTORY, engine="process")
    fleet.report(ADDR, Report(process, images=(CachedImage("team/demo:1", 7),)))
    assert fleet.node("a").images == {"team_demo_1": 7}


@pytest.mark.parametrize("written", [False, True])
async def test_after_a_failed_write_the_picture_is_what_is_on_disk(fleet: Fleet, rows: FakeRows, written: bool) -> None:
    await fleet.load()
    rows.fail_in, rows.fail_after_write = 0, written
    with pytest.raises(Unavailable):
        await fleet.create_workspace(SPEC)
    assert fleet.workspaces() == []
    if written:
        with pytest.raises(Conflict):
            await fleet.create_workspace(SPEC)
    else:
        await fleet.create_workspace(SPEC)
    assert [workspace.name for workspace in fleet.workspaces()] == ["demo"]
    assert len(rows.workspace) == 1


async def test_what_nodes_said_survives_a_reading_anew(fleet: Fleet, rows: FakeRows) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, REPORT)
    rows.fail_in, rows.fail_after_write = 0, True
    with pytest.raises(Unavailable):
        await fleet.set_availability("a", Availability.CORDONED)
    assert fleet.node("a").availability is Availability.OPEN
    await fleet.load()
    node = fleet.node("a")
    assert (node.availability, node.connected, node.inventory) == (Availability.CORDONED, True, INVENTORY)


async def test_a_caller_that_hangs_up_does_not_part_picture_and_disk(fleet: Fleet, rows: FakeRows) -> None:
    await fleet.load()
    caller = asyncio.create_task(fleet.create_workspace(SPEC))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await fleet.close()
    assert [workspace.name for workspace in fleet.workspaces()] == ["demo"]
    assert len(rows.workspace) == 1


async def test_what_is_known_of_a_gpus_past_survives_kill_9(fleet: Fleet, rows: FakeRows, time: Time) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, replace(REPORT, readings=(GpuReading("GPU-1", xids=(79,)),)))
    fleet.count_failure(ADDR)
    await fleet.save_seen()
    time.pass_s(1)
    fleet.report(ADDR, REPORT)
    await fleet.save_seen()
    writes = len(rows.writes)
    time.pass_s(1)
    fleet.report(ADDR, REPORT)
    await fleet.save_seen()
    assert len(rows.writes) == writes, "that it is still bad is no news"
    time.pass_s(300)
    time.now_s = 7.0  # the machine has started anew: its monotonic clock too
    again = opened(rows, time)
    await again.load()
    node = again.node("a")
    assert node.health["GPU-1"].grade is Grade.QUARANTINED
    assert node.failures == 1
    again.session_up(ADDR, "")
    again.report(ADDR, REPORT)
    assert again.node("a").health["GPU-1"].reason.startswith("Xid 79")
    assert again.node("a").health["GPU-1"].evacuate, "the 15 seconds were over before"
    await again.set_availability("a", Availability.OPEN)
    again.report(ADDR, REPORT)
    time.pass_s(20)
    again.report(ADDR, REPORT)
    assert again.node("a").health["GPU-1"].grade is Grade.OK
    third = opened(rows, time)
    await third.load()
    third.session_up(ADDR, "")
    third.report(ADDR, REPORT)
    assert third.node("a").health["GPU-1"].grade is Grade.OK, "the word that it was tested is on disk"


async def test_tests_of_gpus_survive_kill_9(fleet: Fleet, rows: FakeRows, time: Time) -> None:
    def says(fleet: Fleet, *xids: int, state: GpuTestState | None = None, words: str = "") -> None:
        time.pass_s(1)
        number = fleet.node("a").gpu_tests.get("GPU-1", 0)
        tests = (GpuTest("GPU-1", number, state, words),) if state else ()
        fleet.report(ADDR, replace(REPORT, readings=(GpuReading("GPU-1", xids=xids),), gpu_tests=tests))

    async def after_kill_9(fleet: Fleet) -> Fleet:
        await fleet.save_seen()
        time.now_s = 7.0
        again = opened(rows, time)
        await again.load()
        again.session_up(ADDR, "")
        return again

    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    with pytest.raises(InvalidArgument, match="No GPU of a is in quarantine after an Xid"):
        await fleet.test_gpus("a", [])
    fleet.session_up(ADDR, "")
    says(fleet, 79)
    seen = fleet.node_changes.version(ADDR)
    says(fleet)
    (number,) = fleet.node("a").gpu_tests.values()
    assert fleet.node_changes.version(ADDR) != seen, "the node is told at once"

    # The same test goes on.
    fleet = await after_kill_9(fleet)
    assert fleet.node("a").gpu_tests == {"GPU-1": number}
    says(fleet, state=GpuTestState.RUNNING)
    fleet = await after_kill_9(fleet)
    seen = fleet.node_changes.version(ADDR)
    says(fleet, state=GpuTestState.FAILED, words="bad memory")
    assert fleet.node("a").gpu_tests == {}
    assert fleet.node_changes.version(ADDR) != seen

    # What it found and how long to wait are not forgotten, nor that an operator does not want to.
    fleet = await after_kill_9(fleet)
    says(fleet)
    assert "it failed its test: bad memory" in fleet.node("a").health["GPU-1"].reason
    assert fleet.node("a").gpu_tests == {}
    await fleet.test_gpus(ADDR, ["GPU-1"])
    fleet = await after_kill_9(fleet)
    says(fleet)
    assert fleet.node("a").gpu_tests["GPU-1"] > number, "a test that is new has a number that is"
    says(fleet, state=GpuTestState.PASSED)
    fleet = await after_kill_9(fleet)
    says(fleet)
    assert fleet.node("a").health["GPU-1"].grade is Grade.OK


async def test_a_gpu_is_tested_only_once_no_replica_holds_it(fleet: Fleet, time: Time) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    one = replica(await fleet.create_workspace(SPEC))
    await fleet.add_replicas([one])
    fleet.report(ADDR, replace(REPORT, readings=(GpuReading("GPU-1", xids=(79,)),)))
    for stopped in (one, replace(one, drain_time=time.now), replace(one, stop_time=time.now)):
        await fleet.update_replicas([stopped])
        fleet.report(ADDR, REPORT)
        assert fleet.node("a").gpu_tests == {}
    await fleet.update_replicas([replace(one, stop_time=time.now, gone_time=time.now)])
    fleet.report(ADDR, REPORT)
    assert list(fleet.node("a").gpu_tests) == ["GPU-1"]
    # To open the node is the operator's word: what was asked for is not any more.
    await fleet.set_availability("a", Availability.CORDONED)
    await fleet.set_availability("a", Availability.OPEN)
    assert fleet.node("a").gpu_tests == {}


async def test_a_write_that_fails_is_made_later(fleet: Fleet, rows: FakeRows) -> None:
    await fleet.enroll_node(ADDR, "a", token_id="t-1")
    fleet.session_up(ADDR, "")
    fleet.report(ADDR, replace(REPORT, readings=(GpuReading("GPU-1", xids=(79,)),)))
    rows.fail_in = 0
    with pytest.raises(Unavailable):
        await fleet.save_seen()
    assert b"79" not in rows.node[ADDR].health_json
    await fleet.save_seen()
    assert b"79" in rows.node[ADDR].health_json
