"""The fleet in memory: who there is, found by every key, and what the nodes last said. Knows nothing of the disk.

`fleet` alone changes who there is. What the nodes say is only kept here: they say it all again after our restart.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from msgspec.structs import replace
from ngpu.image import comparable, directory

from controlplane import health, trail
from controlplane.census import Node, Replica, Route, Workspace
from controlplane.changes import Changes
from controlplane.errors import NodeRevoked, NodeUnknown, NotFound
from controlplane.report import Inventory, ReplicaReport, ReplicaState, Report
from controlplane.trail import Trail

_log = structlog.get_logger(__name__)

#: Images whose size is remembered, over all nodes.
IMAGES_KEPT: Final = 10_000


class Picture:
    """Who and what there is."""

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        #: Touched with a workspace's uid when it or one of its replicas changes.
        self.workspace_changes = Changes()
        #: Touched with a node's address when what it should run or may take changes.
        self.node_changes = Changes()
        self._clock = clock
        self._monotonic = monotonic
        self._workspaces: dict[str, Workspace] = {}
        self._uid_of_id: dict[str, str] = {}
        self._uid_of_name: dict[str, str] = {}
        self._routes: dict[str, Route] = {}
        self._nodes: dict[str, Node] = {}
        self._addr_of_address: dict[str, str] = {}
        self._addr_of_name: dict[str, str] = {}
        self._replicas: dict[str, Replica] = {}
        # Tuples, replaced when they change: who keeps one sees by identity whether it still holds.
        self._replicas_of: dict[str, tuple[Replica, ...]] = {}
        self._replicas_on: dict[str, tuple[Replica, ...]] = {}
        self._trails: dict[str, Trail] = {}
        self._image_bytes: OrderedDict[str, int] = OrderedDict()
        #: Set when there is something new that plans are made of; who plans clears it.
        self.news = asyncio.Event()
        #: Nodes that said something of themselves that is worth keeping.
        self._unsaved: set[str] = set()
        self._called: set[str] = set()
        #: `take_called` has some to give.
        self.calls = asyncio.Event()

    # Who there is.

    def workspace(self, key: str) -> Workspace:
        """By id, uid or name; deleted ones by id and uid only. Raises NotFound."""
        uid = self._uid_of_name.get(key) or self._uid_of_id.get(key) or key
        try:
            return self._workspaces[uid]
        except KeyError:
            raise NotFound("There is no such workspace, or it is not yours.") from None

    def workspaces(self, *, deleted: bool = False) -> list[Workspace]:
        """All living ones, or all, by name."""
        wanted = (workspace for workspace in self._workspaces.values() if deleted or not workspace.deleted)
        return sorted(wanted, key=lambda workspace: (workspace.name, workspace.create_time))

    def workspace_of(self, workspace_id: str) -> str | None:
        """The uid of the workspace, deleted or not, with that id, which is its credential; None: there is none."""
        return self._uid_of_id.get(workspace_id)

    def route(self, name: str) -> Route | None:
        """The route of that name, or None."""
        return self._routes.get(name)

    def routes(self) -> list[Route]:
        """All, by name."""
        return [self._routes[name] for name in sorted(self._routes)]

    def node(self, key: str) -> Node:
        """By address, in any case, or by name; also revoked ones. Raises NodeUnknown."""
        addr = self._addr_of_address.get(key.lower()) or self._addr_of_name.get(key)
        if addr is None:
            raise NodeUnknown
        return self._nodes[addr]

    def nodes(self, *, revoked: bool = False) -> list[Node]:
        """Those not revoked, or all, by name."""
        wanted = (node for node in self._nodes.values() if revoked or not node.revoked)
        return sorted(wanted, key=lambda node: node.name)

    def every_node(self) -> Collection[Node]:
        """All, revoked ones too, in no order: for what looks at each of them every second."""
        return self._nodes.values()

    def replica(self, replica_id: str) -> Replica | None:
        """None if there is none of that id, or it is known to be gone."""
        return self._replicas.get(replica_id)

    def replicas(self) -> Sequence[Replica]:
        """All not known to be gone, oldest first."""
        return tuple(self._replicas.values())

    def replicas_of(self, workspace_uid: str) -> tuple[Replica, ...]:
        """All of a workspace not known to be gone, oldest first."""
        return self._replicas_of.get(workspace_uid, ())

    def replicas_on(self, node_addr: str) -> tuple[Replica, ...]:
        """All on a node not known to be gone, oldest first."""
        return self._replicas_on.get(node_addr, ())

    def state_of(self, replica: Replica) -> ReplicaReport:
        """How it stands: what its node last said; ASSIGNED before that; LOST while the node is not connected."""
        node = self._nodes[replica.node_addr]
        said = node.said.get(replica.id)
        if not node.connected:
            return ReplicaReport(replica.id, ReplicaState.LOST, message=f"Node {node.name} is not connected.")
        if replica.stop_time is not None:
            return ReplicaReport(replica.id, ReplicaState.STOPPING, message=said.message if said else "")
        if said is None:
            return ReplicaReport(replica.id, ReplicaState.ASSIGNED)
        stall = trail.stall(self._trails.get(replica.id), self._monotonic())
        return replace(said, message=f"{said.message}: {stall}") if stall else said

    def failing(self, replica: Replica) -> str:
        """Why it will not come up by itself, in words; empty: it is ready, or may become so."""
        spec = self._workspaces[replica.workspace_uid].spec_at(replica.generation)
        return trail.failure(self._trails.get(replica.id), spec.readiness.start_limit_s, self._monotonic())

    def image_bytes(self, reference: str) -> int | None:
        """The size of an image by normalised reference, if a node has told of it."""
        return self._image_bytes.get(reference)

    # What tasks call for.

    def call(self, workspace_uid: str) -> None:
        """A task waits. If the workspace follows the load and has been without replicas, it is one of `take_called`."""
        workspace = self._workspaces[workspace_uid]
        if workspace.spec.scale.max_replicas and not workspace.deployment.target:
            self._called.add(workspace_uid)
            self.calls.set()

    def take_called(self) -> set[str]:
        """Uids of the workspaces that were called for since this was asked last."""
        called, self._called = self._called, set()
        self.calls.clear()
        return called

    # What nodes say.

    def listen(self) -> None:
        """Nodes can reach us from now on: silence counts from here."""
        for node in list(self._nodes.values()):
            self._nodes[node.addr] = replace(node, heard_s=self._monotonic())

    def listen_again(self) -> None:
        """We heard nobody for a while, by our own doing: the silence of who is connected counts from here."""
        for node in list(self._nodes.values()):
            if node.connected:
                self._nodes[node.addr] = replace(node, heard_s=self._monotonic())

    def session_up(self, addr: str, ip: str) -> None:
        """A session of the node has begun. Raises NodeUnknown, NodeRevoked."""
        node = self.node(addr)
        if node.revoked:
            raise NodeRevoked
        self._unsaved.add(addr)
        self._show_node(replace(self._heard(node), connected=True, ip=ip))

    def session_down(self, addr: str) -> None:
        """The node's session has ended."""
        self._unsaved.add(addr)
        self._show_node(replace(self._nodes[addr], connected=False))

    def count_failure(self, addr: str) -> None:
        """The node was lost: placement prefers others."""
        self._unsaved.add(addr)
        self._nodes[addr] = replace(self._nodes[addr], failures=self._nodes[addr].failures + 1)

    def report(self, addr: str, report: Report) -> None:
        """All that is on the node: one message."""
        before = self._nodes[addr]
        testable = self._testable(before)
        memories = health.judge_all(
            before.memories,
            report.inventory.gpus,
            report.readings,
            self._monotonic(),
            tests=report.gpu_tests,
            # A time, so that none that was given out before a restart is given out again.
            number=int(self._clock().timestamp() * 1000) if testable else 0,
            testable=testable,
        )
        doomed = self._doomed(before, report)
        same_images = before.report is not None and before.report.images == report.images
        same_build = before.report is not None and _same_build(before.inventory, report.inventory)
        same_replicas = before.report is not None and before.report.replicas is report.replicas
        same_memories = memories == before.memories and [*memories] == [*before.memories]
        node = replace(
            self._heard(before),
            inventory=report.inventory,
            report=report,
            reports=before.reports + 1,
            # What is as it was stays the same object: who has looked at it sees that.
            said=before.said if same_replicas else {said.replica_id: said for said in report.replicas},
            images=before.images if same_images else self._sizes(report),
            health=before.health if same_memories else {gpu_id: memory.health for gpu_id, memory in memories.items()},
            memories=before.memories if same_memories else memories,
            doomed=doomed,
        )
        self._nodes[addr] = node
        remembers = before.doomed != doomed or any(
            health.is_news(before.memories.get(gpu_id), memory)
            for gpu_id, memory in ({} if same_memories else memories).items()
        )
        if remembers or not same_build:
            self._unsaved.add(addr)
        if remembers:
            self._follow_tests(before, node)
        for replica in self.replicas_on(addr):
            self._follow(replica, node)
            if before.said.get(replica.id) != node.said.get(replica.id):
                self.workspace_changes.touch(replica.workspace_uid)
        if remembers or not (same_images and same_build and before.said == node.said and before.health == node.health):
            self.news.set()

    def _testable(self, node: Node) -> set[str]:
        """GPUs in quarantine after an Xid that no replica holds."""
        waiting = {gpu_id for gpu_id, memory in node.memories.items() if memory.xids}
        if waiting:
            waiting.difference_update(*(replica.gpu_ids for replica in self.replicas_on(node.addr)))
        return waiting

    def _follow_tests(self, before: Node, node: Node) -> None:
        if before.gpu_tests != node.gpu_tests:
            self.node_changes.touch(node.addr)
        for gpu_id, memory in node.memories.items():
            tests, known = memory.tests, before.memories.get(gpu_id)
            if known is None or known.tests == tests:
                continue
            if tests.number and tests.number != known.tests.number:
                _log.info("gpu_test_asked", node=node.addr, name=node.name, gpu=gpu_id)
            elif tests.last and not tests.number and known.tests.number:
                state = tests.last.name
                _log.info("gpu_test_ended", node=node.addr, name=node.name, gpu=gpu_id, state=state, words=tests.words)

    def time_of(self, monotonic_s: float) -> datetime:
        """The time of day at that reading of the monotonic clock, to the second: two clocks are never alike."""
        return (self._clock() + timedelta(seconds=monotonic_s - self._monotonic() + 0.5)).replace(microsecond=0)

    def _follow(self, replica: Replica, node: Node) -> None:
        said = node.said.get(replica.id)
        if said is not None:
            self._trails[replica.id] = trail.follow(self._trails.get(replica.id), said, self._monotonic())

    def _doomed(self, node: Node, report: Report) -> frozenset[str]:
        """Replicas there whose container must start anew: told once, remembered until they are stopped."""
        restarting = {reading.gpu_id for reading in report.readings if health.restarts(reading)}
        if not restarting and not node.doomed:
            return node.doomed
        return frozenset(
            replica.id
            for replica in self.replicas_on(node.addr)
            if replica.stop_time is None and (replica.id in node.doomed or not restarting.isdisjoint(replica.gpu_ids))
        )

    def _heard(self, node: Node) -> Node:
        return replace(node, heard_s=self._monotonic(), last_seen_time=self._clock())

    def _sizes(self, report: Report) -> dict[str, int]:
        if report.inventory.engine == "process":
            # Directories: not what an image of that name is elsewhere.
            return {directory(image.reference): image.size_bytes for image in report.images}
        sizes = {comparable(image.reference): image.size_bytes for image in report.images}
        for reference, size in sizes.items():
            self._image_bytes[reference] = size
            self._image_bytes.move_to_end(reference)
        while len(self._image_bytes) > IMAGES_KEPT:
            self._image_bytes.popitem(last=False)
        return sizes

    # How it is changed.

    def _show_workspace(self, workspace: Workspace) -> Workspace:
        before = self._workspaces.get(workspace.uid)
        self._workspaces[workspace.uid] = workspace
        self._uid_of_id[workspace.id] = workspace.uid
        if not workspace.deleted:
            self._uid_of_name[workspace.name] = workspace.uid
        elif self._uid_of_name.get(workspace.name) == workspace.uid:
            del self._uid_of_name[workspace.name]
        self.workspace_changes.touch(workspace.uid)
        if before is not None and before.spec is not workspace.spec:
            # What needs no new container is told to those there are.
            for addr in {replica.node_addr for replica in self.replicas_of(workspace.uid)}:
                self.node_changes.touch(addr)
        self.news.set()
        return workspace

    def _show_node(self, node: Node) -> Node:
        self._nodes[node.addr] = node
        self._addr_of_address[node.addr.lower()] = node.addr
        self._addr_of_name[node.name] = node.addr
        self.node_changes.touch(node.addr)
        self.news.set()
        for uid in {replica.workspace_uid for replica in self.replicas_on(node.addr)}:
            self.workspace_changes.touch(uid)
        return node

    def _show_replicas(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            if replica.gone_time is None:
                self._replicas[replica.id] = replica
            else:
                self._replicas.pop(replica.id, None)
                self._trails.pop(replica.id, None)
            _put(self._replicas_of, replica.workspace_uid, replica)
            _put(self._replicas_on, replica.node_addr, replica)
            self.workspace_changes.touch(replica.workspace_uid)
            self.node_changes.touch(replica.node_addr)
        self.news.set()


def _put(index: dict[str, tuple[Replica, ...]], key: str, replica: Replica) -> None:
    """Add, replace, or (if it is gone) take out one of the replicas of `key`; the oldest stays first."""
    there = {other.id: other for other in index.get(key, ())}
    if replica.gone_time is None:
        there[replica.id] = replica
    else:
        there.pop(replica.id, None)
    index[key] = tuple(there.values())


def _same_build(one: Inventory, other: Inventory) -> bool:
    """But for what changes all the time."""
    return one is other or one == replace(other, disk_free_bytes=one.disk_free_bytes)
