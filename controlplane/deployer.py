"""Desired replicas against reported ones: the door for what nodes say and are told, and the loop that applies plans.

What to do is decided in `rollout`. Every step of a plan is one write of the fleet, and only then the dispatcher hears
of it. Between any two of them the process may die: the next plans from the rows and from what the nodes say anew.
"""

import asyncio
import contextlib
import hashlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import msgspec
import structlog

from controlplane import explain, generations, ids, rehearsal, rollout, room, standing
from controlplane.autoscale import Load
from controlplane.errors import NgpuError
from controlplane.explain import Decision
from controlplane.fleet import Fleet, Node, Replica, Workspace
from controlplane.placement import DEFAULT_POLICY, NodeView, Policy
from controlplane.rehearsal import Rehearsal
from controlplane.report import ReplicaState, Report
from controlplane.rollout import Action, Good, Moved, Place, TakeBack, Unplaced, Update, World
from controlplane.scaler import Scaler
from controlplane.sites import Sites
from controlplane.spec import Spec

_log = structlog.get_logger(__name__)

#: A plan is made at latest so long after the last, whether there are news or not.
PLAN_EVERY_S: Final = 5.0
#: How often it is looked for what nobody announces: silence of a node, the end of what a drained replica ran.
LOOK_EVERY_S: Final = 1.0
#: A look that comes later than that by so much says that we were stopped meanwhile.
STALL_S: Final = 2.0
#: Least pause between two plans, so that what happens together is planned together; and the pause in units of how
#: long the last plan took, so that planning never takes more than a tenth of the loop it shares with the dispatcher.
PAUSE_S: Final = 0.05
PAUSE_PER_PLAN: Final = 9.0
#: How long a node that says nothing new is seen as it was: its time of service is worth more as it grows.
VIEW: Final = timedelta(minutes=1)
#: After a failed write.
RETRY_S: Final = 1.0


class Tasks(Protocol):
    """What the deployer tells the dispatcher, and the one thing it asks; see dispatcher.Dispatcher."""

    def set_capacity(
        self, replica_id: str, workspace_uid: str, node_addr: str, capacity: int, *, gpu_ids: Sequence[str] = ()
    ) -> None:
        """How many tasks a replica may run at once; told again with every report."""

    def replica_gone(self, replica_id: str) -> None:
        """Its container is no more."""

    def node_lost(self, node_addr: str) -> None:
        """Do not wait for the node any longer."""

    def workspace_deleted(self, workspace_uid: str) -> None:
        """It takes no more tasks. Told again after a restart."""

    def running_on(self, replica_id: str) -> int:
        """Attempts the replica has in flight: a drained one is stopped at 0."""

    def load(self, workspace_uid: str) -> Load:
        """How a workspace is used; see scaler."""


class Assignment(msgspec.Struct, frozen=True):
    """A replica that should run on a node (node.proto). `spec_hash`: same hash, same container."""

    replica_id: str
    workspace_name: str
    generation: int
    spec: Spec
    gpu_ids: tuple[str, ...]
    spec_hash: str
    draining: bool
    workspace_uid: str = ""


class Deployer:
    """Keeps as many replicas of each workspace as are wanted. The fleet must have been loaded."""

    def __init__(
        self,
        fleet: Fleet,
        tasks: Tasks,
        *,
        lost_after_s: float = 15.0,
        policy: Policy = DEFAULT_POLICY,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        random: ids.Random = secrets.token_bytes,
    ) -> None:
        self._fleet = fleet
        self._tasks = tasks
        self._lost_after_s = lost_after_s
        self._cut_off_s = -math.inf
        self._policy = policy
        self._clock = clock
        self._monotonic = monotonic
        self._random = random
        self.scaler = Scaler(fleet, tasks, monotonic=monotonic)
        self._sessions: dict[str, int] = {}
        self._turn = 0
        #: Nodes that the dispatcher was told not to wait for.
        self._given_up: frozenset[str] = frozenset()
        #: Replicas that were there at the last plan.
        self._known: frozenset[str] = frozenset()
        #: Deleted workspaces that the dispatcher knows of.
        self._deleted: set[str] = set()
        self._hashes: dict[str, tuple[Spec, str]] = {}
        #: The nodes as placement sees them, kept for its life: a plan looks at those that changed. The demand is learnt
        #: anew after a start, from what is wanted then.
        self._sites = Sites(policy)
        #: By node: its view, and what it was made of, and when.
        self._views: dict[str, tuple[Node, Sequence[Replica], bool, datetime, NodeView]] = {}
        #: Workspaces as they were when their requests were last counted.
        self._counted: dict[str, Workspace] = {}
        #: How long the last plan took to make.
        self._plan_s = 0.0

    # What nodes say.

    def session_up(self, node_addr: str, ip: str) -> int:
        """A Heartbeat stream has begun; gives its number. Raises NodeUnknown, NodeRevoked."""
        self._fleet.session_up(node_addr, ip)
        self._sessions[node_addr] = self._sessions.get(node_addr, 0) + 1
        return self._sessions[node_addr]

    def session_down(self, node_addr: str, clean: bool, session: int | None = None) -> None:
        """It has ended; `clean`: with a goodbye. Says nothing if a session with a later number is up."""
        if session is not None and session != self._sessions.get(node_addr):
            return
        self._fleet.session_down(node_addr)
        # One that broke may be back in a moment, and its Execute stream may stand; after a goodbye nobody answers.
        if clean:
            for replica in self._fleet.replicas_on(node_addr):
                self._offer(replica, 0)

    def report(self, node_addr: str, report: Report) -> None:
        """All that is on a node: one Heartbeat message."""
        self._fleet.report(node_addr, report)
        for replica in self._fleet.replicas_on(node_addr):
            self._offer(replica, self._capacity(replica))

    def _capacity(self, replica: Replica) -> int:
        node = self._fleet.node(replica.node_addr)
        said = node.said.get(replica.id)
        if said is None or said.state is not ReplicaState.READY or not replica.active or node.revoked:
            return 0
        # A node's word counts up to what the customer allows.
        return min(said.capacity, self._spec_of(replica).concurrency)

    def _spec_of(self, replica: Replica) -> Spec:
        return self._fleet.workspace(replica.workspace_uid).spec_at(replica.generation)

    def _offer(self, replica: Replica, capacity: int) -> None:
        self._tasks.set_capacity(
            replica.id, replica.workspace_uid, replica.node_addr, capacity, gpu_ids=replica.gpu_ids
        )

    # What nodes are told.

    def desired(self, node_addr: str) -> list[Assignment]:
        """All that should be on a node. `fleet.node_changes` tells when it changes."""
        if self._fleet.node(node_addr).revoked:
            return []
        return [
            self._assignment(replica) for replica in self._fleet.replicas_on(node_addr) if replica.stop_time is None
        ]

    def _assignment(self, replica: Replica) -> Assignment:
        spec = self._spec_of(replica)
        hashed, spec_hash = self._hashes.get(replica.id, (None, ""))
        if hashed is not spec:
            spec_hash = hash_of(spec, replica.gpu_ids)
            self._hashes[replica.id] = spec, spec_hash
        return Assignment(
            replica_id=replica.id,
            workspace_name=spec.name,
            generation=replica.generation,
            spec=spec,
            gpu_ids=replica.gpu_ids,
            spec_hash=spec_hash,
            draining=replica.drain_time is not None,
            workspace_uid=replica.workspace_uid,
        )

    # The loop.

    async def run(self) -> None:
        """Plan and apply, and let numbers follow the load, until cancelled; once nodes can reach us."""
        self._fleet.listen()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._plan(), name="deployer-plan")
            group.create_task(self.scaler.run(), name="deployer-scaler")

    async def _plan(self) -> None:
        """Woken by news, and at latest every PLAN_EVERY_S."""
        planned_s = -PLAN_EVERY_S
        while True:
            if self._monotonic() - planned_s >= PLAN_EVERY_S or self._is_due():
                planned_s = self._monotonic()
                pause_s = await self._try_step()
                await asyncio.sleep(pause_s)
            waits_s = self._monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._fleet.news.wait()
            if self._monotonic() - waits_s > LOOK_EVERY_S + STALL_S:
                # It was us who stood still (a machine that slept): what nodes said meanwhile is yet to be read.
                _log.warning("stood_still", seconds=round(self._monotonic() - waits_s, 1))
                self._fleet.listen_again()

    def _is_due(self) -> bool:
        return (
            self._fleet.news.is_set()
            or self._lost() | self._revoked() != self._given_up
            or any(self._is_drained(replica) for replica in self._fleet.replicas())
        )

    def _is_drained(self, replica: Replica) -> bool:
        draining = replica.drain_time is not None and replica.stop_time is None
        return draining and not self._tasks.running_on(replica.id)

    async def _try_step(self) -> float:
        """Gives how long to pause."""
        try:
            await self.step()
            await self._fleet.save_seen()
        except NgpuError as error:
            _log.warning("plan_failed", error=type(error).__name__, reason=str(error))
            self._fleet.news.set()
            return RETRY_S
        return max(PAUSE_S, PAUSE_PER_PLAN * self._plan_s)

    async def step(self) -> int:
        """Make one plan and apply it; gives the number of its actions. Raises as the store does."""
        # After a failed write the picture may lack what is on disk: a plan of it would place it once more.
        await self._fleet.load()
        self._fleet.news.clear()
        self._tell()
        began_s = self._monotonic()
        actions = rollout.plan(self._world())
        self._plan_s = self._monotonic() - began_s
        await self._apply(actions)
        return len(actions)

    def _world(self) -> World:
        fleet = self._fleet
        self._turn += 1
        workspaces = [
            workspace
            for workspace in fleet.workspaces(deleted=True)
            if not workspace.deleted or fleet.replicas_of(workspace.uid)
        ]
        self._count(workspaces)
        lost = self._lost()
        self._survey(lost)
        return World(
            time=self._clock(),
            workspaces=workspaces,
            nodes={node.addr: node for node in fleet.nodes(revoked=True)},
            sites=self._sites,
            replicas=fleet.replicas(),
            new_id=lambda: ids.replica_id(self._random),
            running=self._tasks.running_on,
            failing=fleet.failing,
            image_bytes=fleet.image_bytes,
            turn=self._turn,
            lost=lost,
        )

    def _count(self, workspaces: Sequence[Workspace]) -> None:
        """What is asked for now and was not before: the demand."""
        for workspace in workspaces:
            before = self._counted.get(workspace.uid)
            if before is not workspace and (more := room.newly_wanted(before, workspace)):
                self._sites.observe(room.need_of(workspace, self._fleet.image_bytes).shape, more)
        self._counted = {workspace.uid: workspace for workspace in workspaces}

    def _survey(self, lost: frozenset[str]) -> None:
        """The nodes as they are now."""
        nodes, time = self._fleet.nodes(), self._clock()
        for addr in self._sites.addrs - {node.addr for node in nodes}:
            self._sites.remove(addr)
            self._views.pop(addr, None)
        for node in nodes:
            self._sites.put(self._view(node, time, lost=node.addr in lost))

    def _view(self, node: Node, time: datetime, *, lost: bool) -> NodeView:
        replicas = self._fleet.replicas_on(node.addr)
        known = self._views.get(node.addr)
        if known is not None:
            seen, beside, was_lost, when, view = known
            as_it_was = room.looks_alike(seen, node) and beside is replicas and was_lost is lost
            if as_it_was and abs(time - when) < VIEW:
                return view
        view = room.view_of(node, replicas, self._spec_of, time=time, lost=lost)
        self._views[node.addr] = node, replicas, lost, time, view
        return view

    async def _apply(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Moved):
                await self._fleet.keep_move(action.workspace_uid, action.move)
                _log.warning("replica_moved", replica=action.replica_id, node=action.move.node_addr, reason=action.why)
        updates = [action for action in actions if isinstance(action, Update)]
        if updates:
            await self._fleet.update_replicas([update.replica for update in updates])
            for update in updates:
                self._tell_update(update)
        placed = [action.replica for action in actions if isinstance(action, Place)]
        if placed:
            await self._fleet.add_replicas(placed)
            for replica in placed:
                _log.info("replica_placed", replica=replica.id, workspace=replica.workspace_uid, node=replica.node_addr)
        for action in actions:
            match action:
                case Unplaced(uid, decision):
                    await self._fleet.keep_unplaced(uid, decision)
                case Good(uid, generation):
                    await self._fleet.keep_good(uid, generation)
                case TakeBack(uid, generation, good, fault):
                    await self._fleet.take_back(uid, generation, good, fault)
                    _log.warning("update_taken_back", workspace=uid, generation=generation, reason=fault)

    def _tell_update(self, update: Update) -> None:
        replica = update.replica
        if replica.gone_time is not None:
            event = "replica_gone"
        else:
            event = "replica_drained" if replica.stop_time is None else "replica_stopped"
            self._offer(replica, 0)
        _log.info(event, replica=replica.id, node=replica.node_addr, reason=update.reason)

    def _tell(self) -> None:
        """Tell the dispatcher what is no more: nodes that are given up, replicas that are gone, deleted workspaces.

        By comparison with what it was told, so that a write that was made and answered with an error is not missed.
        """
        given_up = self._lost() | self._revoked()
        for addr in given_up - self._given_up:
            node = self._fleet.node(addr)
            _log.warning("node_given_up", node=addr, name=node.name, revoked=node.revoked)
            for replica in self._fleet.replicas_on(addr):
                self._offer(replica, 0)
            self._tasks.node_lost(addr)
            if node.report is not None:
                self._fleet.count_failure(addr)
        self._given_up = given_up
        replicas = frozenset(replica.id for replica in self._fleet.replicas())
        for replica_id in self._known - replicas:
            self._tasks.replica_gone(replica_id)
            self._hashes.pop(replica_id, None)
        self._known = replicas
        for workspace in self._fleet.workspaces(deleted=True):
            if workspace.deleted and workspace.uid not in self._deleted:
                self._tasks.workspace_deleted(workspace.uid)
                self._deleted.add(workspace.uid)

    def _lost(self) -> frozenset[str]:
        nodes, now_s = self._fleet.every_node(), self._monotonic()
        if rollout.we_are_cut_off(nodes, now_s, self._lost_after_s):
            self._cut_off_s = now_s
        return rollout.lost_nodes(nodes, now_s, self._lost_after_s, self._cut_off_s)

    def _revoked(self) -> frozenset[str]:
        return frozenset(node.addr for node in self._fleet.every_node() if node.revoked)

    # Why, and what if.

    async def rehearse(self, spec: Spec) -> Rehearsal:
        """What would follow if a workspace were described so: a new one, or the one of that name. Changes nothing.

        Raises InvalidArgument, Conflict as the description itself would.
        """
        before, after = self._fleet.described(spec)
        replicas = () if before is None else self._fleet.replicas_of(before.uid)
        lost = self._lost()
        time = self._clock()
        views = {node.addr: self._view(node, time, lost=node.addr in lost) for node in self._fleet.nodes()}
        # Values all, and on a large fleet many: not in the loop that dispatches.
        return await asyncio.to_thread(
            rehearsal.rehearse,
            before,
            after,
            replicas,
            views,
            image_bytes=self._fleet.image_bytes,
            time=time,
            policy=self._policy,
            demand=self._sites.fragmentation,
        )

    def explain(self, workspace: str) -> tuple[str, tuple[Decision, ...]]:
        """How a workspace's replicas stand, in words; and why they are where they are, or nowhere, newest first.

        Raises NotFound.
        """
        of = self._fleet.workspace(workspace)
        replicas = [replica for replica in self._fleet.replicas_of(of.uid) if replica.stop_time is None]
        stand = [(replica, self._fleet.state_of(replica)) for replica in replicas]
        states = Counter(said.state for _, said in stand)
        summary = f"{states.pop(ReplicaState.READY, 0)} of {of.wanted} replicas of {of.name} are ready"
        for state, count in sorted(states.items()):
            summary += f", {count} {state.name.lower()}"
        summary += "; it was deleted." if of.deleted else "."
        decisions = [explain.decode(replica.explanation) for replica in replicas]
        if words := standing.words(of, stand, self._fleet.failing):
            summary += f" {words}"
        if of.unplaced is not None:
            decisions.append(of.unplaced)
        kept = [decision for decision in decisions if decision is not None]
        return summary, tuple(sorted(kept, key=lambda decision: decision.time, reverse=True))


def hash_of(spec: Spec, gpu_ids: Sequence[str]) -> str:
    """Of all that makes a container what it is: 16 hex digits. Not of what may change while it runs."""
    parts = (*generations.made_of(spec), tuple(gpu_ids))
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]
