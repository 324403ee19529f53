"""What to do so that as many replicas run as are wanted: the deployer's decisions. Pure.

A replica's row is its life: placed, then (drained), stopped, gone. `plan` looks at the whole world each time and says
the next steps only; each is one write, and after any of them, or none, the next plan goes on from what is there.

* A GPU is held by the row until the replica is known to be gone: the node said so, or it was revoked. So a lost node
  that comes back finds its GPUs given to nobody else.
* What a lost node may still run is drained, not stopped: should it come back, it ends what must not be repeated. The
  rest is called off there by the dispatcher, and with that the drain is over.
* What must leave (its node is drained, its GPU is failing) is replaced first and drained when the replacement is ready:
  one more than wanted at most. Where there is no room for a replacement it is drained nevertheless.
* An update goes the same way, one replica after another, but what serves is kept until the new one does, however long
  that takes; and where the new one does not come up, the update is taken back.
* What does not come up where it is is tried elsewhere, a few times.
* More than half of the nodes silent at once means that we are cut off, not they: then nobody is given up for a while.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
from msgspec.structs import replace

from controlplane.census import Move, Node, Replica, Workspace
from controlplane.explain import Decision
from controlplane.model import Availability
from controlplane.report import ReplicaState
from controlplane.room import MISSING, Room
from controlplane.sites import Sites

#: Placements tried in one plan: each costs milliseconds on a large fleet, and the dispatcher runs beside us.
PLACEMENTS_AT_ONCE: Final = 16
#: A stopped replica is gone when so many reports after the stop do not have it: the first may have crossed the order.
GONE_REPORTS: Final = 2
#: From so many nodes that fell silent at once, and more than half of all, it is us who are cut off ...
MASS_NODES: Final = 2
#: ... for so long.
MASS_HOLD_S: Final = 120.0
#: A replica that does not come up is tried on another node, at most so many of a workspace within this time. Until it
#: is over, its replicas rather go elsewhere.
MOVES: Final = 3
MOVES_AT_ONCE: Final = 2
MOVES_WITHIN_S: Final = 3600.0
#: How long what must leave waits for room elsewhere: nodes may be about to come back.
ROOM_WAIT_S: Final = 15.0
#: How old an explanation of missing replicas may get while its reasons stay the same and only numbers change.
EXPLANATION_S: Final = 60.0


class World(msgspec.Struct, frozen=True):
    """All that a plan is made of.

    `sites`: the nodes as placement sees them, those not revoked. `replicas`: all not known to be gone, oldest first.
    `running`: how many attempts a replica has in flight. `failing`: why a replica will not come up by itself.
    `image_bytes`: an image's size by normalised reference. `turn`: counts plans, so that workspaces that find no room
    take turns. `lost`: addresses of nodes that are given up (lost_nodes).
    """

    time: datetime
    workspaces: Sequence[Workspace]
    nodes: Mapping[str, Node]
    sites: Sites
    replicas: Sequence[Replica]
    new_id: Callable[[], str]
    running: Callable[[str], int] = lambda _: 0
    failing: Callable[[Replica], str] = lambda _: ""
    image_bytes: Callable[[str], int | None] = lambda _: None
    turn: int = 0
    lost: frozenset[str] = frozenset()


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


class Moved(msgspec.Struct, frozen=True):
    """A replica does not come up where it is, and another takes its place elsewhere."""

    workspace_uid: str
    replica_id: str
    move: Move
    why: str


Action = Place | Update | Unplaced | Good | TakeBack | Moved


def plan(world: World) -> tuple[Action, ...]:
    """The next steps; none if all is as it should be, or as near to it as can be."""
    actions: list[Action] = []
    active: dict[str, list[Replica]] = {workspace.uid: [] for workspace in world.workspaces}
    for replica in world.replicas:
        ended = _ended(replica, world)
        if ended is not None:
            actions.append(ended)
        elif replica.active:
            active[replica.workspace_uid].append(replica)
    short: list[_Shortage] = []
    returning: set[str] = set()
    for workspace in world.workspaces:
        verdict = _judged(workspace, active[workspace.uid], world)
        if verdict is not None:
            actions.append(verdict)
        if isinstance(verdict, TakeBack):
            returning.add(workspace.uid)
            continue
        drains, shortage = _balanced(workspace, active[workspace.uid], world)
        actions.extend(drains)
        if shortage is not None:
            short.append(shortage)
        elif workspace.unplaced is not None:
            actions.append(Unplaced(workspace.uid, None))
    with Room(world.sites, time=world.time, image_bytes=world.image_bytes) as room:
        actions.extend(_placed(short, world, room))
        ending = {action.replica.id for action in actions if isinstance(action, Update)}
        settled = [
            (workspace, replica)
            for workspace in world.workspaces
            if workspace.uid not in returning
            for replica in active[workspace.uid]
            if replica.generation == workspace.generation
            and replica.id not in ending
            and not _leaves(replica, world.nodes[replica.node_addr])
        ]
        actions.extend(_moved(settled, world, room))
    return tuple(actions)


def lost_nodes(
    nodes: Iterable[Node], now_s: float, lost_after_s: float, cut_off_s: float = -math.inf
) -> frozenset[str]:
    """Addresses of the nodes that are given up: silent too long, unless too many fell silent at once.

    `cut_off_s`: when that was last so. It ends for one node after the other, so they have as long again to come back.
    """
    silent_s = _silent_s(nodes, now_s)
    lost = {addr for addr, so_long_s in silent_s.items() if so_long_s >= lost_after_s}
    if now_s - cut_off_s >= lost_after_s and not _most_are_quiet(silent_s, lost_after_s):
        return frozenset(lost)
    return frozenset(addr for addr in lost if silent_s[addr] >= MASS_HOLD_S)


def we_are_cut_off(nodes: Iterable[Node], now_s: float, lost_after_s: float) -> bool:
    """Whether so many nodes fell silent at once that the fault must be ours."""
    return _most_are_quiet(_silent_s(nodes, now_s), lost_after_s)


def _silent_s(nodes: Iterable[Node], now_s: float) -> dict[str, float]:
    return {node.addr: now_s - node.heard_s for node in nodes if not node.revoked}


def _most_are_quiet(silent_s: dict[str, float], lost_after_s: float) -> bool:
    # Who is cut off with the first that is silent for too long was heard up to a report later. Well ones report three
    # times within that time: by half of it they show.
    quiet = [so_long_s for so_long_s in silent_s.values() if so_long_s >= lost_after_s / 2]
    lately = sum(1 for so_long_s in quiet if so_long_s < MASS_HOLD_S)
    return lately >= MASS_NODES and lately > len(silent_s) - len(quiet)


def _ended(replica: Replica, world: World) -> Update | None:
    """The replica's next step toward its end, if there is reason for one whatever its workspace wants."""
    node = world.nodes[replica.node_addr]
    if node.revoked:
        stop_time = replica.stop_time or world.time
        return Update(replace(replica, stop_time=stop_time, gone_time=world.time), "its node was revoked")
    if replica.stop_time is not None:
        heard = node.connected and node.reports >= replica.stop_report + GONE_REPORTS
        gone = heard and replica.id not in node.said
        return Update(replace(replica, gone_time=world.time), "its node has it no more") if gone else None
    idle = not world.running(replica.id)
    if node.addr in world.lost and idle:
        reason = _LOST
    elif replica.id in node.doomed:
        reason = "its GPU had a contained memory error: its container must start anew"
    elif node.addr in world.lost and replica.drain_time is None:
        return Update(replace(replica, drain_time=world.time), _LOST)
    elif replica.drain_time is not None and idle:
        reason = "it was drained and has ended what it ran"
    else:
        return None
    return Update(replace(replica, stop_time=world.time, stop_report=node.reports), reason)


def _judged(workspace: Workspace, active: Sequence[Replica], world: World) -> Good | TakeBack | None:
    """Has the workspace's generation come up, or will it not?"""
    if workspace.deleted or workspace.deployment.good == workspace.generation:
        return None
    current = [replica for replica in active if replica.generation == workspace.generation]
    ready = any(_ready(replica, world) for replica in current)
    if ready and len(current) == len(active):
        return Good(workspace.uid, workspace.generation)
    # What runs elsewhere may be moved there.
    if ready and _moves_left(workspace, world):
        return None
    serving = [one.generation for one in active if one.generation != workspace.generation and _ready(one, world)]
    good = workspace.returns_to or max(serving, default=0)
    if not good:
        return None
    for replica in current:
        if why := world.failing(replica):
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
    idle = [replica for replica in _least_missed(former, world) if not _may_serve(replica, world)]
    return drains, _Shortage(workspace, max(0, min(missing, room)), len(active), leaving, idle)


def _outdated(former: Sequence[Replica], staying: Sequence[Replica], surplus: int, world: World) -> list[Replica]:
    """Which of a former generation may go: those that serve only as far as as many others are ready."""
    ranked = _least_missed(former, world)
    idle = [replica for replica in ranked if not _may_serve(replica, world)][:surplus]
    starting = sum(not _ready(replica, world) for replica in staying)
    serving = [replica for replica in ranked if _may_serve(replica, world)]
    return idle + serving[: max(0, surplus - len(idle) - starting)]


_LOST: Final = "its node is lost"
_LEAVES: Final = "its node is drained, or its GPU fails"


def _leaves(replica: Replica, node: Node) -> bool:
    """Is it to go elsewhere?"""
    if node.availability is Availability.DRAINING:
        return True
    # A GPU that is not even known is missing since before our start.
    known = node.report is not None
    return known and any(node.health.get(gpu_id, MISSING).evacuate for gpu_id in replica.gpu_ids)


def _ready(replica: Replica, world: World) -> bool:
    said = world.nodes[replica.node_addr].said.get(replica.id)
    return said is not None and said.state is ReplicaState.READY


def _may_serve(replica: Replica, world: World) -> bool:
    """Ready, or nobody has told us since our start."""
    return world.nodes[replica.node_addr].report is None or _ready(replica, world)


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


def _placed(short: Sequence[_Shortage], world: World, room: Room) -> Iterable[Action]:
    """Places for what is missing: one replica of each workspace in turn, each against what those before it left."""
    waiting = deque(_in_turn([shortage for shortage in short if shortage.places], world.turn))
    for _ in range(PLACEMENTS_AT_ONCE):
        if not waiting:
            return
        shortage = waiting.popleft()
        workspace = shortage.workspace
        found = room.find(workspace, world.new_id(), without=_left(workspace, world))
        if isinstance(found, Decision):
            found = room.find(workspace, world.new_id())
        if isinstance(found, Decision):
            if _is_news(found, workspace.unplaced):
                yield Unplaced(workspace.uid, found)
            if _waited(workspace, world):
                yield from _drained(shortage.leaving, world, _LEAVES)
            # What does not serve must not take the room of what may: the update may be its cure.
            yield from _drained(shortage.idle[:1], world, f"generation {workspace.generation} needs its place")
            continue
        yield Place(found)
        shortage.places -= 1
        if shortage.places:
            waiting.append(shortage)


def _moved(staying: Sequence[tuple[Workspace, Replica]], world: World, room: Room) -> Iterable[Action]:
    """Another place for replicas that do not come up where they are; where there is none, they go on trying there."""
    failing = [(workspace, replica) for workspace, replica in staying if world.failing(replica)]
    first = world.turn * MOVES_AT_ONCE % len(failing) if failing else 0
    for workspace, replica in [*failing[first:], *failing[:first]][:MOVES_AT_ONCE]:
        if not _moves_left(workspace, world):
            continue
        here = world.nodes[replica.node_addr]
        found = room.find(workspace, world.new_id(), without={*_left(workspace, world), here.addr})
        if isinstance(found, Decision):
            continue
        why = world.failing(replica)
        yield Moved(workspace.uid, replica.id, Move(world.time, here.addr), why)
        stopped = replace(replica, stop_time=world.time, stop_report=here.reports)
        yield Update(stopped, f"it does not come up there: {why}")
        yield Place(found)


def _left(workspace: Workspace, world: World) -> frozenset[str]:
    """Nodes on which replicas of it did not come up lately."""
    since = world.time - timedelta(seconds=MOVES_WITHIN_S)
    return frozenset(move.node_addr for move in workspace.deployment.moves if move.time > since)


def _moves_left(workspace: Workspace, world: World) -> bool:
    since = world.time - timedelta(seconds=MOVES_WITHIN_S)
    return sum(move.time > since for move in workspace.deployment.moves) < MOVES


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
