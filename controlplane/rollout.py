"""What to do so that as many replicas run as are wanted: the deployer's decisions. Pure.

A replica's row is its life: placed, then (drained), stopped, gone. `plan` looks at the whole world each time and says
the next steps only; each is one write, and after any of them, or none, the next plan goes on from what is there.

* A GPU is held by the row until the replica is known to be gone: the node said so, or it was revoked. So a lost node
  that comes back finds its GPUs given to nobody else.
* What must leave (its node is drained, its GPU is failing) is replaced first and drained when the replacement is ready:
  one more than wanted at most. Where there is no room for a replacement it is drained nevertheless.
* An update goes the same way, one replica after another, but what serves is kept until the new one does, however long
  that takes; and where the new one does not come up, the update is taken back.
* More than half of the nodes silent at once means that we are cut off, not they: then nobody is given up for a while.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
from msgspec.structs import replace

from controlplane import explain, placement
from controlplane.census import Node, Replica, Workspace
from controlplane.explain import Decision
from controlplane.grade import Grade, Health
from controlplane.image import comparable, directory
from controlplane.model import Availability
from controlplane.placement import GpuView, Need, NodeView, Policy
from controlplane.report import ReplicaState
from controlplane.spec import Spec
from controlplane.trail import Trail, failure

#: Placements tried in one plan: each costs milliseconds on a large fleet, and the dispatcher runs beside us.
PLACEMENTS_AT_ONCE: Final = 8
#: A stopped replica is gone when so many reports after the stop do not have it: the first may have crossed the order.
GONE_REPORTS: Final = 2
#: From so many nodes that fell silent at once, and more than half of all, it is us who are cut off ...
MASS_NODES: Final = 3
#: ... for so long.
MASS_HOLD_S: Final = 120.0
#: How long what must leave waits for room elsewhere: nodes may be about to come back.
ROOM_WAIT_S: Final = 15.0
#: How old an explanation of missing replicas may get while its reasons stay the same and only numbers change.
EXPLANATION_S: Final = 60.0


class World(msgspec.Struct, frozen=True):
    """All that a plan is made of.

    `views`: the nodes as placement sees them, `view_of` each. `replicas`: all not known to be gone, oldest first.
    `running`: how many attempts a replica has in flight.
    `trails`: how replicas have fared, by id. `image_bytes`: an image's size by normalised reference. `turn`: counts plans, so that workspaces that find no room
    take turns. `now_s`: monotonic.
    """

    time: datetime
    now_s: float
    workspaces: Sequence[Workspace]
    nodes: Mapping[str, Node]
    views: Mapping[str, NodeView]
    replicas: Sequence[Replica]
    new_id: Callable[[], str]
    running: Callable[[str], int] = lambda _: 0
    trails: Mapping[str, Trail] = {}
    image_bytes: Callable[[str], int | None] = lambda _: None
    turn: int = 0
    lost_after_s: float = 15.0
    policy: Policy = placement.DEFAULT_POLICY


class Place(msgspec.Struct, frozen=True):
    """A new replica."""

    replica: Replica


class Update(msgspec.Struct, frozen=True):
    """A replica as it is to be: drained, stopped or gone, and why."""

    replica: Replica
    reason: str


class Unplaced(msgspec.Struct, frozen=True):
    """Why replicas of a workspace are missing; None: none are any more."""

    workspace_uid: str
    decision: Decision | None


class Good(msgspec.Struct, frozen=True):
    """The generation serves: no need to return to an earlier one any more."""

    workspace_uid: str
    generation: int


class TakeBack(msgspec.Struct, frozen=True):
    """The generation does not come up: return to `good`."""

    workspace_uid: str
    generation: int
    good: int
    fault: str


Action = Place | Update | Unplaced | Good | TakeBack


def plan(world: World) -> tuple[Action, ...]:
    """The next steps; none if all is as it should be, or as near to it as can be."""
    lost = lost_nodes(world.nodes.values(), world.now_s, world.lost_after_s)
    actions: list[Action] = []
    active: dict[str, list[Replica]] = {workspace.uid: [] for workspace in world.workspaces}
    for replica in world.replicas:
        ended = _ended(replica, world, lost)
        if ended is not None:
            actions.append(ended)
        elif replica.active:
            active[replica.workspace_uid].append(replica)
    short: list[_Shortage] = []
    for workspace in world.workspaces:
        verdict = _judged(workspace, active[workspace.uid], world)
        if verdict is not None:
            actions.append(verdict)
        if isinstance(verdict, TakeBack):
            continue
        drains, shortage = _balanced(workspace, active[workspace.uid], world)
        actions.extend(drains)
        if shortage is not None:
            short.append(shortage)
        elif workspace.unplaced is not None:
            actions.append(Unplaced(workspace.uid, None))
    actions.extend(_placed(short, world, lost))
    return tuple(actions)


def lost_nodes(nodes: Iterable[Node], now_s: float, lost_after_s: float) -> frozenset[str]:
    """Addresses of the nodes that are given up: silent too long, unless too many fell silent at once."""
    silent = {node.addr: now_s - node.heard_s for node in nodes if not node.revoked}
    lost = {addr for addr, silent_s in silent.items() if silent_s >= lost_after_s}
    lately = {addr for addr in lost if silent[addr] < MASS_HOLD_S}
    heard = len(silent) - len(lost)
    return frozenset(lost - lately if len(lately) >= MASS_NODES and len(lately) > heard else lost)


def _ended(replica: Replica, world: World, lost: frozenset[str]) -> Update | None:
    """The replica's next step toward its end, if there is reason for one whatever its workspace wants."""
    node = world.nodes[replica.node_addr]
    if node.revoked:
        stop_time = replica.stop_time or world.time
        return Update(replace(replica, stop_time=stop_time, gone_time=world.time), "its node was revoked")
    if replica.stop_time is not None:
        heard = node.connected and node.reports >= replica.stop_report + GONE_REPORTS
        gone = heard and replica.id not in node.said
        return Update(replace(replica, gone_time=world.time), "its node has it no more") if gone else None
    if node.addr in lost:
        reason = "its node is lost"
    elif replica.id in node.doomed:
        reason = "its GPU had a contained memory error: its container must start anew"
    elif replica.drain_time is not None and not world.running(replica.id):
        reason = "it was drained and has ended what it ran"
    else:
        return None
    return Update(replace(replica, stop_time=world.time, stop_report=node.reports), reason)


def _judged(workspace: Workspace, active: Sequence[Replica], world: World) -> Good | TakeBack | None:
    """Has the workspace's generation come up, or will it not?"""
    if workspace.deleted or workspace.deployment.good == workspace.generation:
        return None
    current = [replica for replica in active if replica.generation == workspace.generation]
    if any(_ready(replica, world) for replica in current):
        return Good(workspace.uid, workspace.generation) if len(current) == len(active) else None
    serving = [one.generation for one in active if one.generation != workspace.generation and _ready(one, world)]
    good = workspace.returns_to or max(serving, default=0)
    if not good:
        return None
    limit_s = workspace.spec.readiness.start_limit_s
    for replica in current:
        why = failure(world.trails.get(replica.id), limit_s, world.now_s)
        if why:
            name = world.nodes[replica.node_addr].name
            return TakeBack(workspace.uid, workspace.generation, good, f"on node {name} {why}")
    return None


class _Shortage(msgspec.Struct):
    """A workspace with fewer replicas that stay than wanted: `places` more may be made now; `leaving` are to go.

    `idle`: those of a former generation that do not serve.
    """

    workspace: Workspace
    places: int
    active: int
    leaving: Sequence[Replica]
    idle: Sequence[Replica]


def _balanced(
    workspace: Workspace, active: Sequence[Replica], world: World
) -> tuple[Iterable[Update], _Shortage | None]:
    """What of the active replicas to drain, and whether some are missing."""
    leaving: list[Replica] = []
    staying: list[Replica] = []
    former: list[Replica] = []
    for replica in active:
        kept = staying if replica.generation == workspace.generation else former
        (leaving if _leaves(replica, world.nodes[replica.node_addr]) else kept).append(replica)
    drains: list[Update] = []
    if len(staying) > workspace.wanted:
        ranked = _least_missed(staying, world)
        excess = len(staying) - workspace.wanted
        drains = _drained(ranked[:excess], world, "fewer replicas are wanted")
        staying = ranked[excess:]
    over = surplus = len(staying) + len(leaving) + len(former) - workspace.wanted
    if leaving and over > 0:
        # A replacement that is not up yet keeps one of those that it replaces, but not for ever.
        one = any(_starts(replica, workspace, world) for replica in staying)
        gone = _least_missed(leaving, world)[: surplus - one]
        drains += _drained(gone, world, _LEAVES)
        over -= len(gone)
    if former and over > 0:
        gone = _outdated(former, staying, over, world)
        drains += _drained(gone, world, f"generation {workspace.generation} takes its place")
        over -= len(gone)
        # Scaled down meanwhile: rather than what serves those go that do not yet.
        unready = [replica for replica in _least_missed(staying, world) if not _ready(replica, world)]
        drains += _drained(unready[: max(0, over - 1)], world, "fewer replicas are wanted")
    missing = workspace.wanted - len(staying)
    if missing <= 0:
        return drains, None
    room = (1 if leaving or former else 0) - surplus
    idle = [replica for replica in _least_missed(former, world) if not _ready(replica, world)]
    return drains, _Shortage(workspace, max(0, min(missing, room)), len(active), leaving, idle)


def _outdated(former: Sequence[Replica], staying: Sequence[Replica], surplus: int, world: World) -> list[Replica]:
    """Which of a former generation may go: those that serve only as far as as many others are ready."""
    ranked = _least_missed(former, world)
    idle = [replica for replica in ranked if not _ready(replica, world)][:surplus]
    starting = sum(not _ready(replica, world) for replica in staying)
    serving = [replica for replica in ranked if _ready(replica, world)]
    return idle + serving[: max(0, surplus - len(idle) - starting)]


_LEAVES: Final = "its node is drained, or its GPU fails"


def _leaves(replica: Replica, node: Node) -> bool:
    """Is it to go elsewhere?"""
    if node.availability is Availability.DRAINING:
        return True
    # A GPU that is not even known is missing since before our start.
    known = node.report is not None
    return known and any(node.health.get(gpu_id, _MISSING).evacuate for gpu_id in replica.gpu_ids)


_MISSING: Final = Health(Grade.QUARANTINED, "missing from the node's inventory", evacuate=True)


def _ready(replica: Replica, world: World) -> bool:
    said = world.nodes[replica.node_addr].said.get(replica.id)
    return said is not None and said.state is ReplicaState.READY


def _starts(replica: Replica, workspace: Workspace, world: World) -> bool:
    """Not ready yet, and young enough to become so."""
    limit = timedelta(seconds=workspace.spec.readiness.start_limit_s)
    return not _ready(replica, world) and world.time - replica.create_time < limit


def _least_missed(replicas: Iterable[Replica], world: World) -> list[Replica]:
    """Those first whose going costs least: not ready, least busy, newest."""
    newest = sorted(replicas, key=lambda replica: replica.create_time, reverse=True)
    return sorted(newest, key=lambda replica: (_ready(replica, world), world.running(replica.id)))


def _drained(replicas: Iterable[Replica], world: World, reason: str) -> list[Update]:
    return [Update(replace(replica, drain_time=world.time), reason) for replica in replicas]


def _placed(short: Sequence[_Shortage], world: World, lost: frozenset[str]) -> Iterable[Action]:
    """Places for what is missing: one replica of each workspace in turn, each against what those before it left."""
    waiting = deque(_in_turn([shortage for shortage in short if shortage.places], world.turn))
    if not waiting:
        return
    views = {
        addr: replace(view, connected=False) if addr in lost else view
        for addr, view in world.views.items()
        if not world.nodes[addr].revoked
    }
    for _ in range(PLACEMENTS_AT_ONCE):
        if not waiting:
            return
        shortage = waiting.popleft()
        workspace = shortage.workspace
        need = need_of(workspace, world.image_bytes)
        replica_id = world.new_id()
        found = placement.place(
            need, views.values(), time=world.time, subject=f"replica {replica_id}", policy=world.policy
        )
        if isinstance(found, placement.Refusals):
            decision = replace(found.decision, subject=f"replica of {workspace.name}")
            if _is_news(decision, workspace.unplaced):
                yield Unplaced(workspace.uid, decision)
            if _waited(workspace, world):
                yield from _drained(shortage.leaving, world, _LEAVES)
            # What does not serve must not take the room of what may: the update may be its cure.
            yield from _drained(shortage.idle[:1], world, f"generation {workspace.generation} needs its place")
            continue
        views[found.node_addr] = _taken(views[found.node_addr], need, found.gpu_ids)
        yield Place(
            Replica(
                id=replica_id,
                workspace_uid=workspace.uid,
                node_addr=found.node_addr,
                generation=workspace.generation,
                gpu_ids=found.gpu_ids,
                create_time=world.time,
                explanation=explain.encode(found.decision),
            )
        )
        shortage.places -= 1
        if shortage.places:
            waiting.append(shortage)


def _in_turn(short: Sequence[_Shortage], turn: int) -> list[_Shortage]:
    """Those not refused before come first, with fewest replicas first; the others begin at another each time."""
    ranked = sorted(short, key=lambda s: (s.active, s.workspace.create_time, s.workspace.uid))
    fresh = [shortage for shortage in ranked if shortage.workspace.unplaced is None]
    refused = [shortage for shortage in ranked if shortage.workspace.unplaced is not None]
    first = turn * PLACEMENTS_AT_ONCE % len(refused) if refused else 0
    return [*fresh, *refused[first:], *refused[:first]]


def _waited(workspace: Workspace, world: World) -> bool:
    """Has it found no room for so long that what leaves is not to wait for a replacement any more?"""
    since = workspace.unplaced
    return since is not None and (world.time - since.time).total_seconds() >= ROOM_WAIT_S


def _is_news(decision: Decision, before: Decision | None) -> bool:
    if before is None or before.refusals.keys() != decision.refusals.keys():
        return True
    return before.refusals != decision.refusals and (decision.time - before.time).total_seconds() >= EXPLANATION_S


def need_of(workspace: Workspace, image_bytes: Callable[[str], int | None]) -> Need:
    """What one replica of the workspace needs."""
    spec = workspace.spec
    image = comparable(spec.image)
    return Need(
        workspace_uid=workspace.uid,
        image=image,
        directory=directory(spec.image),
        gpu=spec.gpu,
        cpus=spec.cpus,
        memory_bytes=spec.memory_bytes,
        replicas=workspace.wanted,
        image_bytes=image_bytes(image),
    )


def view_of(node: Node, replicas: Sequence[Replica], spec_of: Callable[[Replica], Spec], time: datetime) -> NodeView:
    """The node as placement sees it: what it has, less what the rows of its replicas hold.

    `spec_of`: what a replica is made of.
    """
    specs = [spec_of(replica) for replica in replicas]
    held = {gpu_id for replica in replicas for gpu_id in replica.gpu_ids}
    rows = {replica.id for replica in replicas}
    slots = sum(said.capacity for said in node.said.values())
    tasks = len(node.report.attempt_ids) if node.report else 0
    return NodeView(
        addr=node.addr,
        name=node.name,
        connected=node.connected and node.report is not None,
        availability=node.availability,
        engine=node.inventory.engine,
        gpus=tuple(
            GpuView(
                id=gpu.id,
                model=gpu.model,
                memory_bytes=gpu.memory_bytes,
                index=gpu.index,
                grade=node.health.get(gpu.id, _MISSING).grade,
                free=gpu.id not in held,
            )
            for gpu in node.inventory.gpus
        ),
        cpus=node.inventory.cpus,
        cpus_free=node.inventory.cpus - sum(spec.cpus for spec in specs),
        memory_free_bytes=node.inventory.memory_bytes - sum(spec.memory_bytes for spec in specs),
        disk_free_bytes=node.inventory.disk_free_bytes,
        images=node.images,
        load=min(1.0, tasks / slots) if slots else 0.0,
        failures=node.failures,
        uptime_days=(time - node.enroll_time).total_seconds() / 86_400,
        replicas=len(replicas),
        orphans=sum(replica_id not in rows for replica_id in node.said),
        here=Counter(replica.workspace_uid for replica in replicas if replica.active),
    )


def _taken(view: NodeView, need: Need, gpu_ids: Sequence[str]) -> NodeView:
    """The node with one more replica."""
    return replace(
        view,
        gpus=tuple(replace(gpu, free=False) if gpu.id in gpu_ids else gpu for gpu in view.gpus),
        cpus_free=view.cpus_free - need.cpus,
        memory_free_bytes=view.memory_free_bytes - need.memory_bytes,
        replicas=view.replicas + 1,
        here={**view.here, need.workspace_uid: view.here.get(need.workspace_uid, 0) + 1},
    )
