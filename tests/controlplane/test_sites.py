"""The index decides as `placement.place` does, whatever happened before; and looks only at nodes that changed."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane import placement, sites
from controlplane.cards import model_matches
from controlplane.demand import Shape
from controlplane.fragmentation import Fragmentation
from controlplane.grade import Grade
from controlplane.model import Availability
from controlplane.placement import GpuView, Need, NodeView, Placement, Policy, Refusals, place, with_replica
from controlplane.sites import Sites
from controlplane.spec import GIB, GpuNeed

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
MODELS = ("RTX 4090", "A100", "T4")


@st.composite
def gpus(draw: st.DrawFn) -> tuple[GpuView, ...]:
    """Of one node: alike but for a few."""
    model, memory = draw(st.sampled_from(MODELS)), draw(st.sampled_from((24, 80))) * GIB
    return tuple(
        GpuView(
            f"GPU-{number}",
            draw(st.sampled_from(MODELS)) if draw(st.integers(0, 5)) == 0 else model,
            memory,
            number,
            draw(st.sampled_from((Grade.OK, Grade.OK, Grade.OK, Grade.DEGRADED, Grade.QUARANTINED))),
            draw(st.integers(0, 4)) > 0,
            draw(st.sampled_from((0, 0, 300, 500))),
        )
        for number in range(draw(st.sampled_from((0, 1, 2, 4))))
    )


IMAGES = ("img-1", "img-2", "dir")
UIDS = ("w-1", "w-2")
VIEWS = st.builds(
    NodeView,
    addr=st.sampled_from([f"0x{number}" for number in range(12)]),
    connected=st.sampled_from((True, True, True, False)),
    availability=st.sampled_from((Availability.OPEN,) * 4 + (Availability.CORDONED, Availability.DRAINING)),
    engine=st.sampled_from(("docker", "docker", "docker", "process", "")),
    gpus=gpus(),
    cpus=st.just(16.0),
    cpus_free=st.sampled_from((0.0, 2.0, 3.5, 16.0)),
    memory_free_bytes=st.sampled_from((4, 64)).map(lambda gib: gib * GIB),
    disk_free_bytes=st.sampled_from((2, 500)).map(lambda gib: gib * GIB),
    images=st.sets(st.sampled_from(IMAGES)).map(lambda names: dict.fromkeys(names, 5 * GIB)),
    load=st.sampled_from((0.0, 0.31, 0.34, 1.0)),
    failures=st.sampled_from((0.0, 2.0)),
    uptime_days=st.sampled_from((0.0, 100.0)),
    orphans=st.sampled_from((0, 0, 0, 1)),
    replicas=st.sampled_from((0, 5, 100)),
    here=st.dictionaries(st.sampled_from(UIDS), st.integers(1, 3)),
    volumes=st.booleans(),
    allowed_images=st.sampled_from(((), (), ("img-1",))),
)
NEEDS = st.builds(
    Need,
    workspace_uid=st.sampled_from(UIDS),
    image=st.sampled_from(IMAGES),
    directory=st.sampled_from(("dir", "elsewhere")),
    gpu=st.one_of(
        st.builds(
            GpuNeed,
            model=st.sampled_from(("", "4090", "A100|T4")),
            count=st.integers(0, 3),
            min_memory_bytes=st.sampled_from((0, 40 * GIB)),
        ),
        st.builds(GpuNeed, model=st.sampled_from(("", "T4")), count=st.just(1), share=st.sampled_from((200, 500, 700))),
    ),
    cpus=st.sampled_from((0.0, 1.0, 3.5)),
    memory_bytes=st.sampled_from((1, 8)).map(lambda gib: gib * GIB),
    replicas=st.integers(1, 4),
    image_bytes=st.sampled_from((None, 1 * GIB, 5 * GIB)),
    volumes=st.booleans(),
)
STEPS = st.lists(
    st.one_of(
        VIEWS,
        st.tuples(NEEDS, st.booleans(), st.sets(st.sampled_from(["0x0", "0x1", "0x99"]))),
        st.sampled_from([f"0x{number}" for number in range(12)]),
    ),
    min_size=10,
    max_size=40,
)


def compare(index: Sites, need: Need, nodes: Iterable[NodeView], without: Iterable[str] = ()) -> Placement | Refusals:
    """Both ways; asserts that they are one."""
    words: dict[str, Any] = {"time": NOW, "subject": "replica r-1", "without": frozenset(without)}
    found = index.place(need, **words)
    wanted = place(need, nodes, demand=index.fragmentation, **words)
    accepted, other = ([one for one in each.decision.candidates if not one.refusal] for each in (found, wanted))
    assert accepted == other
    examples = {(one.id, one.refusal) for one in found.decision.candidates if one.refusal}
    assert examples <= {(one.id, one.refusal) for one in wanted.decision.candidates if one.refusal}
    if isinstance(wanted, Refusals):
        assert isinstance(found, Refusals)
        assert found.decision.refusals == wanted.decision.refusals
        return found
    assert isinstance(found, Placement)
    assert (found.node_addr, found.gpu_ids) == (wanted.node_addr, wanted.gpu_ids)
    assert found.decision.chosen == wanted.decision.chosen
    # Of those that their image keeps out only the ones it came across.
    for reason in found.decision.refusals.keys() | wanted.decision.refusals.keys():
        counted, there = (each.decision.refusals.get(reason, 0) for each in (found, wanted))
        assert counted <= there if "image" in reason else counted == there
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.sampled_from((1, 64)), st.sampled_from((3, 20)))
def test_it_decides_as_looking_at_every_node_does(steps: list[Any], few: int, kept: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "FEW", few)
        patch.setattr(sites, "RANKINGS", kept)
        patch.setattr(sites, "TOUCHES", kept)
        index, nodes = Sites(), dict[str, NodeView]()
        for step in steps:
            match step:
                case NodeView():
                    index.put(step)
                    nodes[step.addr] = step
                case str():
                    index.remove(step)
                    nodes.pop(step, None)
                case need, stays, without:
                    index.observe(need.shape)
                    found = compare(index, need, nodes.values(), without)
                    if isinstance(found, Placement) and stays:
                        changed = with_replica(need, nodes[found.node_addr], found.gpu_ids)
                        index.put(changed)
                        nodes[found.node_addr] = changed
        assert set(index.addrs) == set(nodes)


def node(number: int, **values: Any) -> NodeView:
    made = NodeView(
        addr=f"0x{number:04}",
        gpus=tuple(GpuView(f"{gpu}", "RTX 4090", 24 * GIB, gpu) for gpu in range(4)),
        cpus=64,
        cpus_free=64,
        memory_free_bytes=512 * GIB,
        disk_free_bytes=500 * GIB,
    )
    return replace(made, **values)


NEED = Need("w-1", "img", gpu=GpuNeed(count=1), cpus=4)


def filled(count: int) -> Sites:
    index = Sites()
    for number in range(count):
        index.put(node(number))
    return index


def test_only_touched_nodes_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    cost = placement.shape_cost

    def watched(need: Need, view: NodeView, *others: Any) -> float:
        looked.append(view.addr)
        return cost(need, view, *others)

    monkeypatch.setattr(sites, "shape_cost", watched)
    index = filled(500)
    index.place(NEED, time=NOW, subject="r")
    assert len(looked) == 500
    looked.clear()
    index.put(node(7, cpus_free=32))
    index.put(node(8, uptime_days=0.001, disk_free_bytes=1, load=0.04))
    index.place(NEED, time=NOW, subject="r")
    assert looked == ["0x0007"]


def test_a_request_of_another_workspace_for_another_image_shares_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(5)
    index.place(NEED, time=NOW, subject="r")
    monkeypatch.setattr(sites, "shape_cost", None)
    found = index.place(replace(NEED, workspace_uid="w-2", image="other"), time=NOW, subject="r")
    assert isinstance(found, Placement)


def test_what_was_put_back_is_as_if_nothing_had_been() -> None:
    index = filled(3)
    first = index.place(NEED, time=NOW, subject="r")
    assert isinstance(first, Placement)
    before = index[first.node_addr]
    index.put(with_replica(NEED, before, first.gpu_ids))
    assert index.place(NEED, time=NOW, subject="r") != first
    index.put(before)
    assert index.place(NEED, time=NOW, subject="r") == first


def test_demand_changes_what_is_measured_by() -> None:
    index = filled(1)
    assert not index.fragmentation.of((("RTX 4090", 24 * GIB, 500),), 64)
    index.observe(Shape(count=1))
    assert index.fragmentation.of((("RTX 4090", 24 * GIB, 500),), 64) == 0.5
    whole = index.fragmentation
    index.observe(Shape(count=1), times=100)
    assert index.fragmentation is whole
    index.observe(Shape(count=1, share=500), times=100)
    assert index.fragmentation is not whole
    assert 0.2 < index.fragmentation.of((("RTX 4090", 24 * GIB, 500),), 64) < 0.3


def test_prices_follow_what_is_taken() -> None:
    """A request that takes anything leaves the scarce model to those who must have it."""
    index = Sites(Policy(fragmentation=0, leftover=0))
    scarce = [GpuView(f"{number}", "A100", 80 * GIB, number, free=number > 2) for number in range(4)]
    index.put(node(1, gpus=tuple(scarce)))
    index.put(node(2))
    found = index.place(NEED, time=NOW, subject="r")
    assert isinstance(found, Placement)
    assert found.node_addr == "0x0002"
    index.put(node(2, availability=Availability.CORDONED))
    found = index.place(NEED, time=NOW, subject="r")
    assert isinstance(found, Placement)
    assert found.node_addr == "0x0001"


def test_rankings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "RANKED", 20)
    index = filled(5)
    for cpus in range(1, 20):
        compare(index, replace(NEED, cpus=cpus), (node(number) for number in range(5)))
    assert len(index._rankings) == 4


def test_the_same_again_is_decided_the_same() -> None:
    decisions = []
    for _ in range(2):
        index = filled(20)
        for number in range(30):
            need = replace(NEED, workspace_uid=f"w-{number}", gpu=GpuNeed(count=1, share=(number % 3) * 300))
            index.observe(need.shape)
            found = index.place(need, time=NOW, subject="r")
            assert isinstance(found, Placement)
            index.put(with_replica(need, index[found.node_addr], found.gpu_ids))
            decisions.append((found.node_addr, found.gpu_ids))
    assert decisions[:30] == decisions[30:]


def test_nothing_known_of_the_demand_is_no_fragmentation() -> None:
    assert Fragmentation({}, model_matches).of((("T4", GIB, 300),), 1) == 0
