"""The fleet: the picture in memory, loaded once, and every change of it written through.

Rule of this file: nothing is shown before it is on disk. A change is checked against the picture, written, and only
then made in the picture, one at a time under a lock; so what a caller was told survives kill -9, and no two callers get
the same name.
"""

import asyncio
import functools
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from msgspec.structs import replace

from controlplane import admission, census, generations, health, ids, model
from controlplane.census import Deployment, Move, Node, Replica, Route, Workspace
from controlplane.errors import Conflict, InvalidArgument, NodeRevoked, NotFound, Unauthenticated, Unavailable
from controlplane.explain import Decision
from controlplane.model import Availability
from controlplane.picture import Picture
from controlplane.report import ReplicaState
from controlplane.spec import Spec

__all__ = ["Fleet", "Node", "Replica", "Route", "Rows", "Workspace"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

#: A node's `last_seen_time` is at most so old on disk; it is for people, and a write per heartbeat would buy nothing.
SEEN_S: Final = 60.0
#: Nodes written in one go.
SAVED_AT_ONCE: Final = 500
#: Most nodes and public names: the picture is in memory.
NODES: Final = 100_000
ROUTES: Final = 100_000
NODE_NAME_LENGTH: Final = 63
#: Moves of replicas remembered of one workspace: more than `rollout` allows within its window.
MOVES_KEPT: Final = 8


class Rows(Protocol):
    """What the fleet asks of the store; see store.Store."""

    async def workspaces(self) -> list[model.Workspace]: ...  # noqa: D102
    async def routes(self) -> list[model.Route]: ...  # noqa: D102
    async def nodes(self) -> list[model.Node]: ...  # noqa: D102
    async def replicas(self) -> list[model.Replica]: ...  # noqa: D102
    def add_workspace(self, row: model.Workspace) -> asyncio.Future[None]: ...  # noqa: D102
    def update_workspace(self, row: model.Workspace) -> asyncio.Future[None]: ...  # noqa: D102
    def delete_workspace(self, uid: str, now: datetime) -> asyncio.Future[None]: ...  # noqa: D102
    def put_route(self, row: model.Route) -> asyncio.Future[None]: ...  # noqa: D102
    def delete_route(self, name: str) -> asyncio.Future[None]: ...  # noqa: D102
    def enroll_node(self, row: model.Node, token_id: str) -> asyncio.Future[None]: ...  # noqa: D102
    def update_node(self, row: model.Node) -> asyncio.Future[None]: ...  # noqa: D102
    def add_replicas(self, rows: Sequence[model.Replica]) -> asyncio.Future[None]: ...  # noqa: D102
    def update_replicas(self, rows: Sequence[model.Replica]) -> asyncio.Future[None]: ...  # noqa: D102


def _change(
    method: Callable[Concatenate["Fleet", Arguments], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate["Fleet", Arguments], Coroutine[Any, Any, Result]]:
    """A method that changes the fleet: alone, and to its end even if its caller goes away.

    Else a caller that hangs up between the write and its showing would leave what is on disk out of the picture.
    """

    @functools.wraps(method)
    async def alone(self: "Fleet", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return await self._alone(lambda: method(self, *args, **kwargs))

    return alone


class Fleet(Picture):
    """The picture, and every change of it. Changes raise Unavailable as the store does; they may be asked for again."""

    def __init__(
        self,
        rows: Rows,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        random: ids.Random = secrets.token_bytes,
    ) -> None:
        super().__init__(clock=clock, monotonic=monotonic)
        self._rows = rows
        self._random = random
        self._saved_time: dict[str, datetime] = {}
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()
        #: What is on disk may differ from the picture.
        self._stale = True

    @_change
    async def load(self) -> None:
        """Read the picture, before anything else; again if a write has failed. Every change does so first."""

    async def close(self) -> None:
        """Let changes that were begun end."""
        while self._running:
            await asyncio.wait(self._running)

    @_change
    async def create_workspace(self, spec: Spec) -> Workspace:
        """Returns once it is on disk. Raises InvalidArgument with every fault, Conflict if the name is taken."""
        admission.admit(spec)
        if spec.name in self._uid_of_name:
            raise Conflict(f"There is a workspace {spec.name!r} already: choose another name, or delete that one.")
        workspace = self._made(spec)
        await self._on_disk(self._rows.add_workspace(census.workspace_row(workspace)))
        return self._show_workspace(workspace)

    def _made(self, spec: Spec) -> Workspace:
        return Workspace(
            uid=ids.workspace_uid(self._random),
            id=ids.workspace_id(self._random),
            spec=spec,
            generation=1,
            create_time=self._clock(),
            deployment=Deployment(target=spec.replicas),
        )

    def described(self, spec: Spec) -> tuple[Workspace | None, Workspace]:
        """The workspace of that name as it is, None if there is none; and as it would be. Nothing is changed.

        Raises as create_workspace or replace_workspace would.
        """
        admission.admit(spec)
        uid = self._uid_of_name.get(spec.name)
        if uid is None:
            return None, self._made(spec)
        workspace = self._living(uid)
        return workspace, self._replaced(workspace, spec)

    @_change
    async def scale_workspace(self, key: str, replicas: int) -> Workspace:
        """Set the number of replicas; where they follow the load, the number from which they do so.

        Raises NotFound (also if it is being deleted), InvalidArgument.
        """
        workspace = self._living(key)
        admission.admit_replicas(replicas, workspace.spec.scale)
        spec, deployment = replace(workspace.spec, replicas=replicas), replace(workspace.deployment, target=replicas)
        return await self._update_workspace(replace(workspace, spec=spec, deployment=deployment))

    @_change
    async def follow_load(self, uid: str, target: int) -> None:
        """So many replicas are called for by the load."""
        workspace = self.workspace(uid)
        await self._update_workspace(replace(workspace, deployment=replace(workspace.deployment, target=target)))

    @_change
    async def delete_workspace(self, key: str) -> Workspace:
        """Take it and its routes away; its replicas end once what they run is done. Idempotent. Raises NotFound."""
        workspace = self.workspace(key)
        if workspace.deleted:
            return workspace
        now = self._clock()
        await self._on_disk(self._rows.delete_workspace(workspace.uid, now))
        self._routes = {name: route for name, route in self._routes.items() if route.workspace_uid != workspace.uid}
        return self._show_workspace(replace(workspace, delete_time=now))

    @_change
    async def keep_unplaced(self, uid: str, decision: Decision | None) -> None:
        """Keep why replicas of a workspace are missing; None: none are."""
        await self._update_workspace(replace(self.workspace(uid), unplaced=decision))

    async def _update_workspace(self, workspace: Workspace) -> Workspace:
        if workspace == self._workspaces[workspace.uid]:
            return workspace
        await self._on_disk(self._rows.update_workspace(census.workspace_row(workspace)))
        return self._show_workspace(workspace)

    @_change
    async def replace_workspace(self, key: str, spec: Spec) -> Workspace:
        """Describe it anew. Where that needs other containers it is a new generation, which `rollout` brings up.

        Raises NotFound, InvalidArgument with every fault, Conflict if too many earlier updates are still under way.
        """
        admission.admit(spec)
        workspace = self._living(key)
        return await self._update_workspace(self._replaced(workspace, spec))

    def _replaced(self, workspace: Workspace, spec: Spec) -> Workspace:
        routes = [route for route in self._routes.values() if route.workspace_uid == workspace.uid]
        admission.admit_update(workspace.spec, spec, {route.name: route.port for route in routes})
        replicas = [one for one in self.replicas_of(workspace.uid) if one.generation == workspace.generation]
        serves = any(self.state_of(replica).state is ReplicaState.READY for replica in replicas)
        return generations.updated(workspace, spec, self._generations(workspace.uid), serves=serves)

    @_change
    async def keep_good(self, uid: str, generation: int) -> None:
        """The generation serves. Nothing happens if it is not the current one any more."""
        workspace = self.workspace(uid)
        if workspace.generation == generation:
            await self._update_workspace(generations.settled(workspace, self._generations(uid)))

    @_change
    async def take_back(self, uid: str, generation: int, good: int, fault: str) -> None:
        """Return to a generation that served before. Nothing happens if this is not the current one any more."""
        workspace = self.workspace(uid)
        if workspace.generation == generation:
            await self._update_workspace(generations.taken_back(workspace, good, fault, self._generations(uid)))

    @_change
    async def keep_move(self, uid: str, move: Move) -> None:
        """A replica is taken from a node on which it did not come up."""
        workspace = self.workspace(uid)
        moves = (*workspace.deployment.moves, move)[-MOVES_KEPT:]
        await self._update_workspace(replace(workspace, deployment=replace(workspace.deployment, moves=moves)))

    def _generations(self, uid: str) -> frozenset[int]:
        """Those that replicas are of."""
        return frozenset(replica.generation for replica in self.replicas_of(uid))

    def _living(self, key: str) -> Workspace:
        workspace = self.workspace(key)
        if workspace.deleted:
            raise NotFound("The workspace was deleted.")
        return workspace

    @_change
    async def publish_route(self, name: str, workspace: str, *, port: int = 0, path: str = "") -> Route:
        """Give a public name, or move it. Port 0: the workspace's first; path "": "/" and the name.

        Raises NotFound, InvalidArgument with every fault.
        """
        target = self._living(workspace)
        admission.admit_route(name, port, path, target.spec.ports)
        if name not in self._routes and len(self._routes) >= ROUTES:
            raise Conflict(f"There are {ROUTES} routes, which is the most: delete one first.")
        route = Route(name, target.uid, port or target.spec.ports[0], path or f"/{name}", self._clock())
        await self._on_disk(self._rows.put_route(census.route_row(route)))
        self._routes[name] = route
        return route

    @_change
    async def delete_route(self, name: str) -> None:
        """Take a public name away. Idempotent."""
        if name in self._routes:
            await self._on_disk(self._rows.delete_route(name))
            del self._routes[name]

    @_change
    async def enroll_node(self, addr: str, name: str, *, token_id: str, ip: str = "") -> Node:
        """Make a node known, and spend its one-time token in the same transaction. No error if it is known already.

        `name` is made fit and unique. Raises NodeRevoked, and Unauthenticated if the token will not do.
        """
        known = self._nodes.get(addr)
        if known is not None:
            if known.revoked:
                raise NodeRevoked
            return known
        if len(self._nodes) >= NODES:
            raise Conflict(f"{NODES} nodes are known, which is the most.")
        node = Node(addr, self._free_name(name), self._clock(), ip=ip, heard_s=self._monotonic())
        await self._on_disk(self._rows.enroll_node(self._node_row(node), token_id))
        return self._show_node(node)

    def _free_name(self, name: str) -> str:
        name = re.sub(r"[^a-z0-9.-]+", "-", name.lower())[:NODE_NAME_LENGTH].strip("-.") or "node"
        free, number = name, 2
        while free in self._addr_of_name:
            suffix = f"-{number}"
            free, number = name[: NODE_NAME_LENGTH - len(suffix)] + suffix, number + 1
        return free

    @_change
    async def set_availability(self, key: str, availability: Availability) -> Node:
        """What it may take. To open it again is the operator's word that its GPUs were tested. Raises NodeUnknown."""
        node = self.node(key)

        def change(now: Node) -> Node:
            tested = _tested(now) if availability is Availability.OPEN else now.memories
            return replace(now, availability=availability, memories=tested)

        if change(node) != node:
            await self._write_node(node.addr, change)
        return self._nodes[node.addr]

    @_change
    async def test_gpus(self, key: str, gpu_ids: Sequence[str]) -> Node:
        """Have GPUs in quarantine after an Xid tested without a wait; all such if none are named.

        Raises NodeUnknown; InvalidArgument for a GPU that is not there, or that a test would do nothing for.
        """
        node = self.node(key)
        for gpu_id in gpu_ids:
            if gpu_id not in node.memories:
                raise InvalidArgument(f"gpu_ids: node {node.name} has no GPU {gpu_id[:80]!r}.")
            if not node.memories[gpu_id].xids:
                raise InvalidArgument(f"gpu_ids: GPU {gpu_id} is not in quarantine after an Xid: no test is needed.")
        named = gpu_ids or [gpu_id for gpu_id, memory in node.memories.items() if memory.xids]
        if not named:
            raise InvalidArgument(f"No GPU of {node.name} is in quarantine after an Xid: no test is needed.")

        def change(now: Node) -> Node:
            hurried = {gpu_id: health.without_wait(now.memories[gpu_id]) for gpu_id in named}
            return replace(now, memories={**now.memories, **hurried})

        if change(node) != node:
            await self._write_node(node.addr, change)
        return self._nodes[node.addr]

    @_change
    async def revoke_node(self, key: str) -> Node:
        """Cut it off for good. Idempotent. Raises NodeUnknown."""
        node = self.node(key)
        if not node.revoked:
            now = self._clock()
            await self._write_node(node.addr, lambda node: replace(node, revoke_time=now))
            self.session_down(node.addr)
        return self._nodes[node.addr]

    async def _write_node(self, addr: str, change: Callable[[Node], Node]) -> None:
        await self._on_disk(self._rows.update_node(self._node_row(change(self._nodes[addr]))))
        # It may have reported meanwhile.
        self._show_node(change(self._nodes[addr]))

    def _node_row(self, node: Node) -> model.Node:
        return census.node_row(node, self._clock(), self._monotonic())

    @_change
    async def save_seen(self) -> None:
        """Write what nodes said of themselves and is not on disk, and when they were seen if that is long ago."""
        recent = self._clock() - timedelta(seconds=SEEN_S)
        due = [node for node in self._nodes.values() if node.addr in self._unsaved or self._long_unsaved(node, recent)]
        # What is said from here on is for the next time.
        self._unsaved.difference_update(node.addr for node in due[:SAVED_AT_ONCE])
        written = [(node, self._rows.update_node(self._node_row(node))) for node in due[:SAVED_AT_ONCE]]
        for node, done in written:
            try:
                await self._on_disk(done)
            except Unavailable:
                self._unsaved.update(node.addr for node, _ in written)
                raise
            self._saved_time[node.addr] = node.last_seen_time or node.enroll_time

    def _long_unsaved(self, node: Node, recent: datetime) -> bool:
        seen = node.last_seen_time
        return seen is not None and self._saved_time.get(node.addr, seen) < min(recent, seen)

    @_change
    async def add_replicas(self, replicas: Sequence[Replica]) -> None:
        """Place them; all or none."""
        await self._on_disk(self._rows.add_replicas([census.replica_row(replica) for replica in replicas]))
        self._show_replicas(replicas)

    @_change
    async def update_replicas(self, replicas: Sequence[Replica]) -> None:
        """Write them as they are to be; all or none. Those with a `gone_time` leave the picture."""
        await self._on_disk(self._rows.update_replicas([census.replica_row(replica) for replica in replicas]))
        self._show_replicas(replicas)

    # How changes are made.

    async def _alone(self, change: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        task = asyncio.create_task(self._locked(change), name="fleet-change")
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _locked(self, change: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with self._lock:
            if self._stale:
                await self._read()
            return await change()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # the caller was told, or has gone away

    async def _on_disk(self, done: Awaitable[None]) -> None:
        try:
            await done
        except Unauthenticated:
            raise  # says nothing of the picture
        except Exception:
            # Whether it was written is open, or the rows are not what the picture says.
            self._stale = True
            raise

    async def _read(self) -> None:
        workspaces, routes = await self._rows.workspaces(), await self._rows.routes()
        nodes, replicas = await self._rows.nodes(), await self._rows.replicas()
        stopped = {replica.id: replica for replica in self._replicas.values() if replica.stop_time is not None}
        for index in (self._uid_of_name, self._replicas, self._replicas_of, self._replicas_on):
            index.clear()
        for workspace in workspaces:
            self._show_workspace(census.workspace_of(workspace))
        self._routes = {row.name: census.route_of(row) for row in routes}
        for row in nodes:
            node = census.node_of(row, self._clock(), self._monotonic())
            known = self._nodes.get(row.addr)
            if known is not None:
                # Of itself it has said more since; and what was not written is to be.
                self._unsaved.add(row.addr)
                node = replace(known, name=node.name, availability=node.availability, revoke_time=node.revoke_time)
            self._show_node(node)
        for replica in map(census.replica_of, replicas):
            before = stopped.get(replica.id)
            stop_report = self._nodes[replica.node_addr].reports if before is None else before.stop_report
            self._show_replicas([replace(replica, stop_report=stop_report)])
        self._trails = {id: trail for id, trail in self._trails.items() if id in self._replicas}
        self._stale = False


def _tested(node: Node) -> dict[str, health.Memory]:
    """What is remembered of its GPUs after an operator's word that they were tested; nothing of those not there."""
    there = {gpu.id for gpu in node.inventory.gpus}
    return {gpu_id: health.after_test(memory) for gpu_id, memory in node.memories.items() if gpu_id in there}
