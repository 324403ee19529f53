"""What goes from a node's disk and when, on a fake engine and a fake clock."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from nodedaemon.caches import AGAIN_S, IMAGES_AT_ONCE, LOOK_S, VOLUME_IDLE_S, Caches, doomed
from nodedaemon.engine import GIB, Assignment, Mount, Volume
from nodedaemon.last_use import LastUse
from tests.nodedaemon.fake_engine import FakeEngine, FakeTime, assignment, settle

IDLE_S = 5 * LOOK_S
MODELS = (Mount("models", "/models"),)


class Node:
    """Caches with what is around them. The disk has room for as many images as `engine.disk_free_bytes` says."""

    def __init__(self, directory: Path, *, volume_limit_bytes: int = 100, disk_reserve_bytes: int = 3) -> None:
        self.time = FakeTime()
        self.engine = FakeEngine()
        self.engine.pulled = LastUse(directory / "pulled.json", clock=self.time.monotonic)
        self.engine.disk_free_bytes = 10
        self.here: list[Assignment] | None = []
        self.ended: list[tuple[str, str, bool]] = []
        self.volumes = LastUse(directory / "volumes.json", clock=self.time.monotonic)
        self.caches = Caches(
            self.engine,
            self,
            self.volumes,
            volume_limit_bytes=volume_limit_bytes,
            disk_reserve_bytes=disk_reserve_bytes,
            image_idle_s=IDLE_S,
            monotonic=self.time.monotonic,
            sleep=self.time.sleep,
        )
        self.task: asyncio.Task[None] | None = None

    def assignments(self) -> list[Assignment] | None:
        return self.here

    def on_full(self, make_room: Callable[[], None]) -> None:
        self.make_room = make_room

    def end(self, replica_id: str, why: str, *, customers: bool) -> None:
        self.ended.append((replica_id, why, customers))

    async def run(self) -> None:
        self.task = asyncio.create_task(self.caches.run())
        await self.passes(0)

    async def passes(self, seconds: float) -> None:
        while True:
            step = min(seconds, LOOK_S)
            await self.time.advance(step)
            # Ledgers are written by threads.
            async with asyncio.timeout(10):
                while self.task and not self.time.sleepers:
                    await asyncio.sleep(0.0005)
            await settle()
            seconds -= step
            if seconds <= 0:
                return

    def pulled(self, *images: str) -> None:
        for image in images:
            self.engine.cache.add(image)
            self.engine.pulled.touch([image])
            self.time.now += 1


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    yield node
    if node.task:
        node.task.cancel()
        await asyncio.gather(node.task, return_exceptions=True)


# Images.


async def test_images_go_when_the_disk_is_short_unused_for_longest_first(node: Node) -> None:
    node.pulled("a", "b", "c", "d", "e")
    node.engine.cache.add("operators-own")
    node.engine.pulled.touch(["a"])
    await node.run()
    await node.passes(IDLE_S + LOOK_S)
    assert node.engine.removed_images == [], "there is room"
    node.engine.disk_free_bytes = 1
    await node.passes(LOOK_S)
    # Each of the fake's images makes room for one.
    assert node.engine.removed_images == ["b", "c"]
    assert node.engine.cache == {"a", "d", "e", "operators-own"}
    assert node.engine.pulled.oldest() == ["d", "e", "a"]


async def test_an_image_of_a_replica_stays_however_short_the_disk_is(node: Node) -> None:
    node.pulled("running", "old", "other")
    node.engine.disk_free_bytes = 0
    node.here = [assignment(image="running")]
    await node.run()
    await node.passes(2 * IDLE_S)
    assert node.engine.cache == {"running"}
    # Once its replica is gone its time begins.
    node.here = []
    await node.passes(IDLE_S - 2 * LOOK_S)
    assert node.engine.cache == {"running"}
    await node.passes(3 * LOOK_S)
    assert node.engine.cache == set()


async def test_nothing_goes_before_the_control_plane_has_said_what_should_be(node: Node) -> None:
    node.pulled("a")
    node.engine.disk_free_bytes = 0
    node.time.now += 2 * IDLE_S
    node.here = None
    await node.run()
    await node.passes(10 * LOOK_S)
    assert node.engine.cache == {"a"}
    node.here = [assignment(image="a")]
    await node.passes(LOOK_S)
    assert node.engine.cache == {"a"}


async def test_what_somebody_else_runs_stays_and_is_not_asked_for_all_the_time(node: Node) -> None:
    node.pulled("a", "b")
    node.engine.held_images = {"a"}
    node.engine.disk_free_bytes = 0
    await node.run()
    await node.passes(IDLE_S + LOOK_S)
    assert node.engine.cache == {"a"}
    assert node.engine.pulled.idle_s("a") <= LOOK_S


async def test_a_pull_that_a_crash_cut_off_does_not_make_a_later_image_ours(node: Node) -> None:
    node.engine.pulled.touch(["cut-off", "pulling"])
    node.here = [assignment(image="pulling")]
    node.engine.disk_free_bytes = 0
    await node.run()
    assert node.engine.pulled.oldest() == ["pulling"]
    node.engine.cache |= {"cut-off", "pulling"}
    node.here = []
    await node.passes(2 * IDLE_S)
    assert node.engine.cache == {"cut-off"}


async def test_one_look_removes_no_more_than_so_many(node: Node) -> None:
    node.pulled(*(f"i{n}" for n in range(IMAGES_AT_ONCE + 5)))
    node.engine.disk_free_bytes = -1000
    node.time.now += IDLE_S
    await node.run()
    assert len(node.engine.cache) == 5


async def test_a_reserve_of_nothing_keeps_all(tmp_path: Path) -> None:
    node = Node(tmp_path, disk_reserve_bytes=0)
    node.pulled("a")
    node.engine.disk_free_bytes = 0
    node.time.now += 2 * IDLE_S
    await node.run()
    assert node.engine.cache == {"a"}
    assert node.task
    node.task.cancel()


async def test_an_engine_that_is_away_ends_nothing(node: Node) -> None:
    node.pulled("a")
    node.engine.disk_free_bytes = 0
    node.time.now += 2 * IDLE_S
    node.engine.go_down()
    await node.run()
    node.engine.come_up()
    await node.passes(LOOK_S)
    assert node.engine.cache == set()


async def test_a_disk_too_full_to_note_it_does_not_keep_images_from_going(node: Node, tmp_path: Path) -> None:
    node.pulled("a", "b")
    node.here = [assignment(image="b")]
    node.engine.disk_free_bytes = 0
    (tmp_path / "pulled.part").mkdir()
    await node.run()
    await node.passes(2 * IDLE_S)
    assert node.engine.cache == {"b"}


async def test_what_did_not_fit_makes_one_image_go_though_the_reserve_is_there(node: Node) -> None:
    node.pulled("a", "b", "running")
    node.here = [assignment(image="running")]
    await node.run()
    node.make_room()
    await node.passes(0)
    assert len(node.engine.cache) == 3, "used within the time in which none goes"
    await node.passes(IDLE_S)
    for left in ({"b", "running"}, {"running"}, {"running"}):
        node.make_room()
        await node.passes(0)
        assert node.engine.cache == left


# Volumes.


async def test_volumes_of_workspaces_that_are_no_more_go_once_no_container_has_them(node: Node) -> None:
    mine, dead = Volume("w-1", "models", 10), Volume("w-2", "models", 10, in_use=True)
    node.engine.kept_volumes = [mine, dead]
    await node.run()
    assert node.caches.volumes() == [mine, dead]
    node.caches.bury(["w-2"])
    await node.passes(LOOK_S)
    assert node.caches.volumes() == [mine, dead]
    node.engine.kept_volumes[1] = replace(dead, in_use=False)
    # Heard again, with the answer to the next report.
    node.caches.bury(["w-2"])
    await node.passes(0)
    assert node.caches.volumes() == node.engine.kept_volumes == [mine]
    assert node.volumes.oldest() == ["w-1/models"]


async def test_what_should_run_here_is_not_dead_whatever_was_heard_before(node: Node) -> None:
    node.engine.kept_volumes = [Volume("w-1", "models", 10)]
    node.here = [assignment(workspace_uid="w-1", mounts=MODELS)]
    node.caches.bury(["w-1"])
    await node.run()
    assert len(node.engine.kept_volumes) == 1


async def test_a_volume_that_nobody_has_used_for_long_goes(node: Node) -> None:
    node.engine.kept_volumes = [Volume("w-1", "models", 10), Volume("w-2", "models", 10)]
    node.here = [assignment(workspace_uid="w-2", mounts=MODELS)]
    node.volumes.touch(["w-1/models", "w-2/models"])
    node.time.now += VOLUME_IDLE_S - LOOK_S / 2
    await node.run()
    assert len(node.engine.kept_volumes) == 2
    await node.passes(LOOK_S)
    assert node.engine.kept_volumes == [Volume("w-2", "models", 10)]


async def test_when_volumes_outgrow_the_limit_the_unused_go_first(node: Node) -> None:
    old, young = Volume("w-1", "models", 50), Volume("w-2", "models", 40)
    used = Volume("w-3", "models", 50, in_use=True)
    node.engine.kept_volumes = [old]
    await node.run()
    node.engine.kept_volumes += [young, used]
    node.here = [assignment(workspace_uid="w-3", mounts=MODELS)]
    await node.passes(LOOK_S)
    assert node.engine.kept_volumes == [young, used]
    assert node.ended == []


async def test_who_outgrows_the_limit_is_ended_and_begins_empty(node: Node) -> None:
    small, large = Volume("w-1", "models", 30, in_use=True), Volume("w-2", "models", 2 * GIB, in_use=True)
    node.engine.kept_volumes = [small, large]
    node.caches.volume_limit_bytes = GIB
    node.here = [
        assignment("r-1", workspace_uid="w-1", mounts=MODELS),
        assignment("r-2", workspace_uid="w-2", mounts=MODELS),
        assignment("r-3", workspace_uid="w-2", mounts=MODELS),
        assignment("r-4", workspace_uid="w-2"),
    ]
    await node.run()
    assert [(replica_id, customers) for replica_id, _, customers in node.ended] == [("r-2", True), ("r-3", True)]
    assert node.ended[0][1] == (
        "its volumes hold 2 GiB and are emptied: all on this node hold 2 GiB, 1 GiB are allowed"
    )
    # Until it is empty nothing is started into it.
    assert "volumes on this node hold 2 GiB" in node.caches.refusal(node.here[1])
    assert node.caches.refusal(node.here[3]) == ""
    node.engine.kept_volumes[1] = replace(large, in_use=False)
    await node.passes(AGAIN_S)
    assert node.engine.kept_volumes == [small]
    assert node.caches.refusal(node.here[1]) == ""


async def test_a_node_that_allows_no_volumes_says_so(tmp_path: Path) -> None:
    caches = Node(tmp_path, volume_limit_bytes=0).caches
    assert caches.refusal(assignment(mounts=MODELS)) == "it needs volumes, and this node's operator allows none"
    assert caches.refusal(assignment()) == ""


def test_sizes_that_cannot_be_told_count_as_nothing(tmp_path: Path) -> None:
    ledger = LastUse(tmp_path / "v.json")
    assert doomed([Volume("w-1", "a"), Volume("w-1", "b", 5)], [], ledger, 5) == []


@pytest.mark.parametrize(
    ("name", "variable"), [("models", "NGPU_VOLUME_MODELS"), ("hub-cache-2", "NGPU_VOLUME_HUB_CACHE_2")]
)
def test_a_container_is_told_where_a_volume_is(name: str, variable: str) -> None:
    assert Mount(name, "/x").variable == variable
