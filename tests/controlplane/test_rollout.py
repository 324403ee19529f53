"""What a plan does in each situation, as values."""

import itertools
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.census import Deployment, Move, Node, Replica, Version, Workspace
from controlplane.explain import Decision
from controlplane.grade import Grade, Health
from controlplane.model import Availability
from controlplane.report import Gpu, Inventory, ReplicaReport, ReplicaState, Report
from controlplane.rollout import (
    MASS_HOLD_S,
    PLACEMENTS_AT_ONCE,
    Action,
    Good,
    Moved,
    Place,
    TakeBack,
    Unplaced,
    Update,
    World,
    lost_nodes,
    plan,
    we_are_cut_off,
)
from controlplane.room import view_of
from controlplane.sites import Sites
from controlplane.spec import GIB, GpuNeed, Spec

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
NOW_S = 5000.0
BROKEN = Health(Grade.QUARANTINED, "lost", evacuate=True)


def workspace(number: int = 1, *, replicas: int = 1, gpus: int = 1, **values: Any) -> Workspace:
    spec = Spec(name=f"ws{number}", image="x", ports=(80,), replicas=replicas, gpu=GpuNeed(count=gpus))
    made = Workspace(f"w-{number}", str(number) * 24, spec, 1, NOW - timedelta(days=1, seconds=-number))
    return replace(made, **{"deployment": Deployment(good=1), **values})


def node(name: str, *, gpus: int = 2, said: dict[str, ReplicaState] | None = None, **values: Any) -> Node:
    cards = tuple(Gpu(f"{name}{n}", "RTX 4090", 24 * GIB, n) for n in range(gpus))
    inventory = Inventory(gpus=cards, cpus=64, memory_bytes=512 * GIB, disk_free_bytes=500 * GIB, engine="docker")
    made = Node(
        addr=name,
        name=name,
        enroll_time=NOW,
        inventory=inventory,
        connected=True,
        heard_s=NOW_S,
        report=Report(inventory),
        reports=10,
        said={id: ReplicaReport(id, state, capacity=1) for id, state in (said or {}).items()},
        health={card.id: Health() for card in cards},
    )
    return replace(made, **values)


def replica(number: int, on: str, gpu: int = 0, *, of: int = 1, **values: Any) -> Replica:
    made = Replica(f"r-{number}", f"w-{of}", on, 1, (f"{on}{gpu}",), NOW - timedelta(hours=1, seconds=-number))
    return replace(made, **values)


def world(*parts: Workspace | Node | Replica, **values: Any) -> World:
    numbers = itertools.count(100)
    workspaces = {part.uid: part for part in parts if isinstance(part, Workspace)}
    nodes = {part.addr: part for part in parts if isinstance(part, Node)}
    replicas = [part for part in parts if isinstance(part, Replica)]
    on = {addr: [replica for replica in replicas if replica.node_addr == addr] for addr in nodes}
    lost = lost_nodes(nodes.values(), NOW_S, 15.0, -math.inf)
    sites = Sites()
    for one in nodes.values():
        if not one.revoked:
            replicas_on, specs = on[one.addr], lambda replica: spec_of(workspaces, replica)
            sites.put(view_of(one, replicas_on, specs, NOW, lost=one.addr in lost))
    return World(
        time=NOW,
        workspaces=list(workspaces.values()),
        nodes=nodes,
        sites=sites,
        replicas=replicas,
        new_id=lambda: f"r-{next(numbers)}",
        lost=lost,
        **values,
    )


def spec_of(workspaces: dict[str, Workspace], replica: Replica) -> Spec:
    return workspaces[replica.workspace_uid].spec_at(replica.generation)


def in_words(actions: tuple[Action, ...]) -> list[str]:
    """E.g. `place ws1 a0`, `drain r-1`, `stop r-1`, `gone r-1`, `unplaced w-1`, `placed w-1`."""
    words = []
    for action in actions:
        match action:
            case Place(one):
                words.append(f"place {one.workspace_uid} {','.join(one.gpu_ids) or one.node_addr}")
            case Update(one, _):
                step = "gone" if one.gone_time else "stop" if one.stop_time else "drain"
                words.append(f"{step} {one.id}")
            case Good(uid, generation):
                words.append(f"good {uid} {generation}")
            case TakeBack(uid, generation, good, _):
                words.append(f"back {uid} {generation} {good}")
            case Moved(_, id, move, _):
                words.append(f"move {id} {move.node_addr}")
            case Unplaced(uid, decision):
                words.append(f"{'unplaced' if decision else 'placed'} {uid}")
    return words


READY, PULLING, BACKOFF = ReplicaState.READY, ReplicaState.PULLING, ReplicaState.BACKOFF
DRAINING = Availability.DRAINING
EARLIER = NOW - timedelta(minutes=1)


def moved(*addrs: str, age_s: float = 60, of: Workspace | None = None) -> Workspace:
    """Its replicas did not come up on those nodes."""
    of = of or workspace()
    moves = tuple(Move(NOW - timedelta(seconds=age_s), addr) for addr in addrs)
    return replace(of, deployment=replace(of.deployment, moves=moves))


#: Two replicas of a generation that serves, and the first of the next.
NEW = workspace(
    replicas=2,
    generation=2,
    deployment=Deployment((Version(1, Spec("ws1", "old", (80,), gpu=GpuNeed(count=1))),), good=1, last=2),
)
OLD = (replica(1, "a"), replica(2, "a", 1))
FIRST = replica(3, "a", 2, generation=2)


@pytest.mark.parametrize(
    ("parts", "values", "actions"),
    [
        pytest.param([workspace(), node("a")], {}, ["place w-1 a0"], id="what is missing is placed"),
        pytest.param([workspace(replicas=0), node("a")], {}, [], id="none are wanted"),
        pytest.param(
            [workspace(replicas=3), node("a"), node("b")],
            {},
            ["place w-1 a0", "place w-1 b0", "place w-1 a1"],
            id="each placement sees those before it",
        ),
        pytest.param(
            [workspace(1, replicas=2), workspace(2, replicas=1), node("a")],
            {},
            ["place w-1 a0", "place w-2 a1", "unplaced w-1"],
            id="every workspace gets its first before any gets its second",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": READY}), replica(1, "a")], {}, [], id="all is as it should be"
        ),
        pytest.param([workspace(), node("a"), replica(1, "a")], {}, [], id="what is placed is waited for"),
        # Scale down.
        pytest.param(
            [workspace(), node("a", said={"r-1": READY, "r-2": PULLING}), replica(1, "a"), replica(2, "a", 1)],
            {},
            ["drain r-2"],
            id="the one that is not ready goes first",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": READY, "r-2": READY}), replica(1, "a"), replica(2, "a", 1)],
            {"running": {"r-2": 1}},
            ["drain r-1"],
            id="then the least busy",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": READY, "r-2": READY}), replica(1, "a"), replica(2, "a", 1)],
            {},
            ["drain r-2"],
            id="then the newest",
        ),
        pytest.param(
            [workspace(delete_time=NOW), node("a", said={"r-1": READY}), replica(1, "a")],
            {},
            ["drain r-1"],
            id="a deleted workspace wants none",
        ),
        # Drained, stopped, gone.
        pytest.param(
            [workspace(replicas=0), node("a", said={"r-1": READY}), replica(1, "a", drain_time=EARLIER)],
            {"running": {"r-1": 1}},
            [],
            id="a drained one ends what it runs",
        ),
        pytest.param(
            [workspace(replicas=0), node("a", said={"r-1": READY}), replica(1, "a", drain_time=EARLIER)],
            {},
            ["stop r-1"],
            id="then it stops",
        ),
        pytest.param(
            [
                workspace(replicas=0),
                node("a", said={"r-1": ReplicaState.STOPPING}),
                replica(1, "a", stop_time=EARLIER, stop_report=1),
            ],
            {},
            [],
            id="a stopped one is there while its node says so",
        ),
        pytest.param(
            [workspace(replicas=0), node("a"), replica(1, "a", stop_time=EARLIER, stop_report=9)],
            {},
            [],
            id="one report without it may have crossed the order",
        ),
        pytest.param(
            [workspace(replicas=0), node("a"), replica(1, "a", stop_time=EARLIER, stop_report=8)],
            {},
            ["gone r-1"],
            id="two have not",
        ),
        pytest.param(
            [workspace(replicas=0), node("a", connected=False), replica(1, "a", stop_time=EARLIER, stop_report=1)],
            {},
            [],
            id="of a node that is away nobody knows",
        ),
        pytest.param(
            [workspace(), node("a", gpus=1), replica(1, "a", stop_time=EARLIER, stop_report=10)],
            {},
            ["unplaced w-1"],
            id="a stopped one holds its GPU until it is gone",
        ),
        # Lost nodes.
        pytest.param(
            [workspace(), node("a", heard_s=NOW_S - 14.9, connected=False), node("b"), replica(1, "a")],
            {},
            [],
            id="a blip costs nothing",
        ),
        pytest.param(
            [workspace(), node("a", heard_s=NOW_S - 15, connected=False), node("b"), replica(1, "a")],
            {},
            ["stop r-1", "place w-1 b0"],
            id="what a lost node had is replaced elsewhere",
        ),
        pytest.param(
            [workspace(), node("a", heard_s=NOW_S - 15, connected=False), node("b"), replica(1, "a")],
            {"running": {"r-1": 1}},
            ["drain r-1", "place w-1 b0"],
            id="what a lost node may still run can come to its end there",
        ),
        pytest.param(
            [
                workspace(),
                node("a", heard_s=NOW_S - 15, connected=False),
                node("b", said={"r-2": READY}),
                replica(1, "a", drain_time=EARLIER),
                replica(2, "b"),
            ],
            {"running": {"r-1": 1}},
            [],
            id="and is waited for, its GPU with it",
        ),
        pytest.param(
            [workspace(), node("a", heard_s=NOW_S - 15), node("b"), replica(1, "a")],
            {},
            ["stop r-1", "place w-1 b0"],
            id="a silent node is lost though its stream stands",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY}),
                replica(1, "a", stop_time=EARLIER),
                replica(2, "b"),
                node("b"),
            ],
            {},
            [],
            id="it comes back with what was replaced: that is only stopped",
        ),
        pytest.param(
            [workspace(), node("a", connected=False, revoke_time=NOW), node("b"), replica(1, "a")],
            {},
            ["gone r-1", "place w-1 b0"],
            id="a revoked node has nothing any more",
        ),
        # Drained nodes and failing GPUs.
        pytest.param(
            [workspace(), node("a", said={"r-1": READY}, availability=DRAINING), node("b"), replica(1, "a")],
            {},
            ["place w-1 b0"],
            id="the replacement comes first",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY}, availability=DRAINING),
                node("b", said={"r-2": PULLING}),
                replica(1, "a"),
                replica(2, "b", create_time=NOW),
            ],
            {},
            [],
            id="and is waited for",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY}, availability=DRAINING),
                node("b", said={"r-2": READY}),
                replica(1, "a"),
                replica(2, "b", create_time=NOW),
            ],
            {},
            ["drain r-1"],
            id="until it is ready",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY}, availability=DRAINING),
                node("b", said={"r-2": PULLING}),
                replica(1, "a"),
                replica(2, "b", create_time=NOW - timedelta(minutes=11)),
            ],
            {},
            ["drain r-1"],
            id="but not for ever",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": READY}, availability=DRAINING), replica(1, "a")],
            {},
            ["unplaced w-1"],
            id="room elsewhere is waited for",
        ),
        pytest.param(
            [
                workspace(unplaced=Decision(NOW - timedelta(seconds=15), "x", refusals={"draining": 1})),
                node("a", said={"r-1": READY}, availability=DRAINING),
                replica(1, "a"),
            ],
            {},
            ["drain r-1"],
            id="a while",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY, "r-2": READY}, availability=DRAINING),
                node("b", said={"r-3": PULLING, "r-4": PULLING}),
                *(replica(1, "a"), replica(2, "a", 1)),
                *(replica(n, "b", n - 3, create_time=NOW) for n in (3, 4)),
            ],
            {},
            ["drain r-3", "drain r-2"],
            id="scaled down meanwhile: what is up still waits for what is not",
        ),
        pytest.param(
            [
                workspace(replicas=2),
                node("a", said={"r-1": READY, "r-2": READY}, availability=DRAINING),
                node("b"),
                replica(1, "a"),
                replica(2, "a", 1),
            ],
            {},
            ["place w-1 b0"],
            id="one more than wanted at most",
        ),
        pytest.param(
            [
                workspace(replicas=2),
                node("a", said={"r-1": READY, "r-2": READY}, availability=DRAINING),
                node("b", said={"r-3": READY}),
                *(replica(1, "a"), replica(2, "a", 1), replica(3, "b")),
            ],
            {"running": {"r-2": 3}},
            ["drain r-1"],
            id="one after another",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": READY}, availability=Availability.CORDONED), replica(1, "a")],
            {},
            [],
            id="a cordoned node keeps what it has",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY}, health={"a0": BROKEN, "a1": Health()}),
                replica(1, "a"),
            ],
            {},
            ["place w-1 a1"],
            id="from a failing GPU it may move within its node",
        ),
        pytest.param(
            [
                workspace(),
                node("a", said={"r-1": READY}, health={"a0": replace(BROKEN, evacuate=False), "a1": Health()}),
                replica(1, "a"),
            ],
            {},
            [],
            id="a first bad sign moves nothing",
        ),
        pytest.param(
            [workspace(), node("a", gpus=1, said={"r-1": READY}), node("b"), replica(1, "a", 1)],
            {},
            ["place w-1 b0"],
            id="a GPU that is not there any more",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": READY}, doomed=frozenset({"r-1"})), replica(1, "a")],
            {},
            ["stop r-1", "place w-1 a1"],
            id="a contained memory error: the container starts anew",
        ),
        # Updates.
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-1": READY, "r-2": READY}), *OLD],
            {},
            ["place w-1 a2"],
            id="an update begins with one more",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-1": READY, "r-2": READY, "r-3": PULLING}), *OLD, FIRST],
            {},
            [],
            id="what serves is kept until the new one does",
        ),
        pytest.param(
            [
                NEW,
                node("a", gpus=3, said={"r-1": READY, "r-2": READY, "r-3": PULLING}),
                *OLD,
                replace(FIRST, create_time=NOW - timedelta(days=9)),
            ],
            {},
            [],
            id="however long that takes",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-1": READY, "r-2": READY, "r-3": READY}), *OLD, FIRST],
            {"running": {"r-2": 1}},
            ["drain r-1"],
            id="then one of the old goes",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-1": READY, "r-2": PULLING, "r-3": PULLING}), *OLD, FIRST],
            {},
            ["drain r-2"],
            id="one that does not serve need not wait",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-2": READY, "r-3": READY}), OLD[1], FIRST],
            {},
            ["place w-1 a0"],
            id="and so on",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-3": READY, "r-4": READY}), FIRST, replica(4, "a", generation=2)],
            {},
            ["good w-1 2"],
            id="until all are new",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, said={"r-1": READY, "r-2": READY, "r-3": ReplicaState.BACKOFF}), *OLD, FIRST],
            {"failing": {"r-3"}},
            ["back w-1 2 1"],
            id="what does not come up is taken back",
        ),
        pytest.param(
            [
                replace(NEW, deployment=replace(NEW.deployment, good=0)),
                node("a", gpus=3, said={"r-3": ReplicaState.BACKOFF}),
                *OLD,
                FIRST,
            ],
            {"failing": {"r-3"}},
            ["drain r-2"],
            id="not to what has never served",
        ),
        pytest.param(
            [NEW, node("a", said={"r-1": READY, "r-2": READY}), *OLD],
            {},
            ["unplaced w-1"],
            id="without room for one more the old go on serving",
        ),
        pytest.param(
            [
                replace(NEW, unplaced=Decision(NOW - timedelta(days=1), "x", refusals={"no": 1})),
                node("a", said={"r-1": READY, "r-2": READY}),
                *OLD,
            ],
            {},
            ["unplaced w-1"],
            id="for as long as it takes",
        ),
        pytest.param(
            [
                replace(NEW, spec=replace(NEW.spec, replicas=1)),
                node("a", gpus=4, said={"r-1": READY, "r-2": READY, "r-3": PULLING, "r-4": PULLING}),
                *(*OLD, FIRST, replica(4, "a", 3, generation=2)),
            ],
            {},
            ["drain r-4", "drain r-2"],
            id="scaled down in mid-update: what serves stays",
        ),
        pytest.param(
            [NEW, node("a", said={"r-1": READY, "r-2": ReplicaState.BACKOFF}), *OLD],
            {},
            ["unplaced w-1", "drain r-2"],
            id="what does not serve makes room",
        ),
        pytest.param(
            [NEW, node("a", gpus=3, report=None, connected=False), *OLD, FIRST],
            {},
            [],
            id="of what nobody has told us since our start nothing is taken away",
        ),
        # What does not come up.
        pytest.param(
            [workspace(), node("a", said={"r-1": BACKOFF}), node("b"), replica(1, "a")],
            {"failing": {"r-1"}},
            ["move r-1 a", "stop r-1", "place w-1 b0"],
            id="what does not come up is tried elsewhere",
        ),
        pytest.param(
            [workspace(), node("a", said={"r-1": BACKOFF}), replica(1, "a")],
            {"failing": {"r-1"}},
            [],
            id="if there is an elsewhere",
        ),
        pytest.param(
            [moved("a"), node("a"), node("b", said={"r-1": BACKOFF}), replica(1, "b")],
            {"failing": {"r-1"}},
            [],
            id="where it did not come up before is no elsewhere",
        ),
        pytest.param(
            [moved("a", age_s=3601), node("a"), node("b", said={"r-1": BACKOFF}), replica(1, "b")],
            {"failing": {"r-1"}},
            ["move r-1 b", "stop r-1", "place w-1 a0"],
            id="after an hour it is",
        ),
        pytest.param(
            [moved("x", "y", "z"), node("a"), node("b", said={"r-1": BACKOFF}), replica(1, "b")],
            {"failing": {"r-1"}},
            [],
            id="three times an hour at most",
        ),
        pytest.param(
            [moved("a"), node("a"), node("b")], {}, ["place w-1 b0"], id="what is missing goes elsewhere, too"
        ),
        pytest.param([moved("a"), node("a")], {}, ["place w-1 a0"], id="if it can"),
        pytest.param(
            [
                NEW,
                node("a", gpus=4, said={"r-1": READY, "r-3": READY, "r-4": BACKOFF}),
                *(node("b"), OLD[0], FIRST, replica(4, "a", 3, generation=2)),
            ],
            {"failing": {"r-4"}},
            ["move r-4 a", "stop r-4", "place w-1 b0"],
            id="in an update, too, once one is ready",
        ),
        pytest.param(
            [
                moved("x", "y", "z", of=NEW),
                node("a", gpus=4, said={"r-1": READY, "r-3": READY, "r-4": BACKOFF}),
                *(node("b"), OLD[0], FIRST, replica(4, "a", 3, generation=2)),
            ],
            {"failing": {"r-4"}},
            ["back w-1 2 1"],
            id="that comes up nowhere else is taken back",
        ),
        # Orphans.
        pytest.param(
            [workspace(), node("a", said={"r-9": READY})],
            {},
            ["unplaced w-1"],
            id="nothing is placed beside a container nobody knows",
        ),
    ],
)
def test_the_next_steps(parts: list[Any], values: dict[str, Any], actions: list[str]) -> None:
    if "running" in values:
        running = values["running"]
        values = {**values, "running": lambda id: running.get(id, 0)}
    if "failing" in values:
        failing = values["failing"]
        values = {**values, "failing": lambda one: "it failed 4 times" if one.id in failing else ""}
    assert in_words(plan(world(*parts, **values))) == actions


def test_a_placement_says_why_there() -> None:
    (placed,) = plan(world(workspace(), node("a"), node("b", gpus=0)))
    assert isinstance(placed, Place)
    assert b'"subject":"replica r-100"' in placed.replica.explanation
    assert b'"refusals":{"no GPU":1}' in placed.replica.explanation


def test_what_finds_no_room_says_why() -> None:
    (unplaced,) = plan(world(workspace(), node("a", gpus=0), node("b", availability=DRAINING)))
    assert isinstance(unplaced, Unplaced)
    assert unplaced.decision is not None
    assert unplaced.decision.subject == "replica of ws1"
    assert unplaced.decision.refusals == {"no GPU": 1, "draining": 1}


@pytest.mark.parametrize(
    ("before", "news"),
    [
        (None, True),
        ({"no GPU": 1}, False),
        ({"draining": 1}, True),
        # Only the number changed: not worth a write at every plan.
        ({"no GPU": 2}, False),
    ],
)
def test_an_explanation_is_written_when_it_says_something_new(before: dict[str, int] | None, news: bool) -> None:
    known = None if before is None else Decision(NOW - timedelta(seconds=5), "replica of ws1", refusals=before)
    actions = plan(world(workspace(unplaced=known), node("a", gpus=0)))
    assert bool(actions) is news


def test_changed_numbers_are_written_after_a_while() -> None:
    known = Decision(NOW - timedelta(seconds=61), "replica of ws1", refusals={"no GPU": 2})
    assert in_words(plan(world(workspace(unplaced=known), node("a", gpus=0)))) == ["unplaced w-1"]


def test_an_explanation_ends_with_its_cause() -> None:
    known = Decision(NOW, "replica of ws1", refusals={"no GPU": 2})
    actions = plan(world(workspace(unplaced=known), node("a", said={"r-1": READY}), replica(1, "a")))
    assert in_words(actions) == ["placed w-1"]


def test_a_plan_places_a_bounded_number() -> None:
    actions = plan(world(workspace(replicas=100), *(node(f"n{n}", gpus=8) for n in range(20))))
    assert len(actions) == PLACEMENTS_AT_ONCE


def test_those_that_find_no_room_take_turns_and_never_keep_others_waiting() -> None:
    known = Decision(NOW, "x", refusals={"no GPU": 1})
    stuck = [workspace(n, gpus=9, unplaced=known) for n in range(10, 10 + 3 * PLACEMENTS_AT_ONCE)]
    fresh = workspace(99)
    tried = set()
    for turn in range(3):
        actions = plan(world(*stuck, fresh, node("a"), turn=turn))
        assert in_words(actions)[0] == "place w-99 a0"
        tried |= {action.workspace_uid for action in actions if isinstance(action, Unplaced)}
    assert len(tried) >= 3 * (PLACEMENTS_AT_ONCE - 1) - 1


def ages(*silent_s: float) -> list[Node]:
    return [node(f"n{n}", heard_s=NOW_S - silent, connected=False) for n, silent in enumerate(silent_s)]


@pytest.mark.parametrize(
    ("silent_s", "lost"),
    [
        ([0, 0, 0], 0),
        ([14.9, 0], 0),
        ([15, 0], 1),
        ([15], 1),
        # Two that are all, or two of three, as for attempts (slots.most_are_silent); one is not.
        ([20, 20], 0),
        ([20, 20, 0], 0),
        ([20, 20, 0, 0, 0], 2),
        # More than half at once: we are cut off.
        ([20, 20, 20], 0),
        ([20, 20, 20, 0, 0], 0),
        ([20, 20, 20, 0, 0, 0], 3),
        # Not for ever.
        ([MASS_HOLD_S] * 3, 3),
        # Those long lost are not counted as fallen silent now.
        ([9999, 9999, 9999, 20, 0, 0], 4),
        ([9999, 20, 20, 20, 0], 1),
        # The first of those cut off at once: the others were heard a little later, and as little as it since.
        ([15, 13, 11, 10, 0], 0),
        ([15, 5, 4, 0], 1),
    ],
)
def test_who_is_lost(silent_s: list[float], lost: int) -> None:
    assert len(lost_nodes(ages(*silent_s), NOW_S, 15.0)) == lost


def test_after_a_mass_silence_all_have_as_long_again_to_come_back() -> None:
    nodes = ages(20, 20, 0, 0)
    assert we_are_cut_off(ages(20, 20, 20, 0), NOW_S, 15.0)
    assert not we_are_cut_off(nodes, NOW_S, 15.0)
    assert lost_nodes(nodes, NOW_S, 15.0, cut_off_s=NOW_S - 14) == set()
    assert lost_nodes(nodes, NOW_S, 15.0, cut_off_s=NOW_S - 15) == {"n0", "n1"}


def test_a_revoked_node_is_not_counted() -> None:
    revoked = [replace(one, revoke_time=NOW) for one in ages(20, 20, 20)]
    assert lost_nodes([*revoked, *ages(20)], NOW_S, 15.0) == {"n0"}


@pytest.mark.parametrize("part", [lambda: workspace(replicas=40), lambda: workspace(gpus=0, replicas=40)])
def test_the_order_of_nodes_changes_nothing(part: Callable[[], Workspace]) -> None:
    nodes = [node(f"n{n}", gpus=n % 4) for n in range(12)]
    assert in_words(plan(world(part(), *nodes))) == in_words(plan(world(part(), *reversed(nodes))))
