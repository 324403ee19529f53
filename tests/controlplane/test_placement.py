"""Where a replica goes and why: every filter, every part of the cost, and the choice of GPUs."""

from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.cards import model_matches
from controlplane.demand import Shape
from controlplane.fragmentation import Fragmentation
from controlplane.grade import Grade
from controlplane.model import Availability
from controlplane.placement import (
    COSTS,
    CROWDED,
    FILTERS,
    GpuView,
    Need,
    NodeView,
    Placement,
    Policy,
    Refusals,
    place,
    with_replica,
)
from controlplane.spec import GIB, GpuNeed

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
IMAGE = "docker.io/library/x:latest"


def gpu(number: int = 0, **values: Any) -> GpuView:
    return replace(GpuView(f"GPU-{number}", "NVIDIA GeForce RTX 4090", 24 * GIB, number), **values)


NODE = NodeView(
    addr="0xa",
    name="a",
    gpus=(gpu(0), gpu(1)),
    cpus=16,
    cpus_free=16,
    memory_free_bytes=64 * GIB,
    disk_free_bytes=100 * GIB,
    images={IMAGE: 5 * GIB},
    uptime_days=100,
)
NEED = Need("w-1", IMAGE, "x", GpuNeed("4090", 1, 20 * GIB), cpus=2, memory_bytes=8 * GIB, image_bytes=5 * GIB)


def put(need: Need, *nodes: NodeView, policy: Policy | None = None) -> Placement | Refusals:
    return place(need, nodes, time=NOW, subject="replica r-1", policy=policy or Policy())


def chosen(need: Need, *nodes: NodeView) -> str:
    found = put(need, *nodes)
    return found.node_addr if isinstance(found, Placement) else ""


@pytest.mark.parametrize(
    ("wanted", "model", "matches"),
    [
        ("", "anything", True),
        ("4090", "NVIDIA GeForce RTX 4090", True),
        ("rtx 4090", "NVIDIA GeForce RTX 4090", True),
        ("RTX_4090", "NVIDIA GeForce RTX 4090", True),
        ("4090", "NVIDIA GeForce RTX 40900", False),
        ("4090", "NVIDIA GeForce RTX 14090", False),
        ("3090", "NVIDIA GeForce RTX 3090 Ti", True),
        ("3090 Ti", "NVIDIA GeForce RTX 3090", False),
        ("A100", "NVIDIA A100-SXM4-80GB", True),
        ("a100 80gb", "NVIDIA A100-SXM4-80GB", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
    ],
)
def test_models_match_by_words(wanted: str, model: str, matches: bool) -> None:
    assert model_matches(wanted, model) is matches


@pytest.mark.parametrize(
    ("need", "node", "why"),
    [
        ({}, {"connected": False}, "not connected"),
        ({}, {"availability": Availability.CORDONED}, "cordoned"),
        ({}, {"availability": Availability.DRAINING}, "draining"),
        ({}, {"orphans": 1}, "still stops containers that were given up"),
        ({}, {"allowed_images": ("ghcr.io/*",)}, "its operator does not allow the image"),
        ({}, {"allowed_images": ("ghcr.io/*", "*")}, ""),
        ({"volumes": True}, {"volumes": False}, "its operator allows no volumes"),
        ({"volumes": True}, {}, ""),
        ({}, {"volumes": False}, ""),
        ({}, {"replicas": 99}, ""),
        ({}, {"replicas": 100}, "has 100 replicas, which is the most"),
        ({}, {"engine": ""}, "no container engine"),
        ({}, {"engine": "process", "images": {}}, "process engine without a directory for the image"),
        ({}, {"engine": "process"}, "process engine without a directory for the image"),
        ({}, {"engine": "process", "images": {"x": 1}}, ""),
        ({}, {"gpus": ()}, "no GPU of model 4090"),
        ({}, {"gpus": (gpu(model="NVIDIA GeForce RTX 3090"),)}, "no GPU of model 4090"),
        ({"gpu": GpuNeed(count=1)}, {"gpus": ()}, "no GPU"),
        ({"gpu": GpuNeed("4090", 3)}, {}, "fewer than 3 GPUs of model 4090"),
        ({"gpu": GpuNeed("4090", 2)}, {}, ""),
        ({"gpu": GpuNeed("", 1, 40 * GIB)}, {}, "no GPU with enough memory"),
        ({"gpu": GpuNeed("", 2)}, {"gpus": (gpu(), gpu(1, grade=Grade.QUARANTINED))}, "fewer than 2 healthy GPUs"),
        ({"gpu": GpuNeed("", 2)}, {"gpus": (gpu(), gpu(1, grade=Grade.DEGRADED))}, ""),
        ({"gpu": GpuNeed("", 2)}, {"gpus": (gpu(), gpu(1, free=False))}, "fewer than 2 free healthy GPUs"),
        # Free ones and healthy ones enough, but not of the same.
        (
            {"gpu": GpuNeed("", 1)},
            {"gpus": (gpu(free=False), gpu(1, grade=Grade.QUARANTINED))},
            "no free healthy GPU",
        ),
        ({"gpu": GpuNeed()}, {"gpus": ()}, ""),
        # Shares: what is left of one GPU counts, not of all together; and the share of its memory.
        ({"gpu": GpuNeed("", 1, share=600)}, {"gpus": (gpu(shared=400), gpu(1, shared=500))}, ""),
        (
            {"gpu": GpuNeed("", 1, share=600)},
            {"gpus": (gpu(shared=500), gpu(1, shared=500))},
            "no healthy GPU with 600/1000 free",
        ),
        ({"gpu": GpuNeed("", 1, share=100)}, {"gpus": (gpu(free=False),)}, "no healthy GPU with 100/1000 free"),
        ({"gpu": GpuNeed("", 1)}, {"gpus": (gpu(shared=1),)}, "no free healthy GPU"),
        ({"gpu": GpuNeed("", 1, 12 * GIB, share=500)}, {}, ""),
        ({"gpu": GpuNeed("", 1, 13 * GIB, share=500)}, {}, "no GPU with enough memory"),
        ({"gpu": GpuNeed("A100|4090", 1)}, {}, ""),
        ({"gpu": GpuNeed("A100|3090", 1)}, {}, "no GPU of model A100 or 3090"),
        ({"cpus": 17}, {}, "too few free CPU cores"),
        ({"cpus": 0.3}, {"cpus_free": 0.1 + 0.2 - 1e-12}, ""),
        ({"memory_bytes": 65 * GIB}, {}, "too little free memory"),
        ({}, {"images": {}, "disk_free_bytes": 5 * GIB}, "too little disk for the image"),
        ({}, {"disk_free_bytes": 0}, ""),
        ({"image_bytes": None}, {"images": {}, "disk_free_bytes": 0}, ""),
    ],
)
def test_each_filter_says_why_not(need: dict[str, Any], node: dict[str, Any], why: str) -> None:
    found = put(replace(NEED, **need), replace(NODE, **node))
    assert found.decision.refusals == ({why: 1} if why else {})
    assert isinstance(found, Refusals if why else Placement)


def test_every_filter_has_a_case_above() -> None:
    assert len(FILTERS) == 12


def test_refusals_are_counted_over_all_nodes() -> None:
    nodes = [replace(NODE, addr=f"0x{n}", connected=n % 2 == 0, cpus_free=0) for n in range(5)]
    found = put(NEED, *nodes)
    assert found.decision.refusals == {"too few free CPU cores": 3, "not connected": 2}
    assert found.decision.chosen == ""


@pytest.mark.parametrize(
    ("part", "need", "better", "worse"),
    [
        ("leftover", {}, {"gpus": (gpu(0), gpu(1, free=False))}, {}),
        ("leftover", {}, {"cpus_free": 4}, {}),
        ("leftover", {"gpu": GpuNeed()}, {"gpus": ()}, {}),
        ("image", {}, {}, {"images": {}}),
        ("load", {}, {"load": 0.1}, {"load": 0.9}),
        ("degraded", {}, {}, {"gpus": (gpu(0, grade=Grade.DEGRADED), gpu(1, grade=Grade.DEGRADED))}),
        ("unreliable", {}, {}, {"failures": 5}),
        ("unreliable", {}, {}, {"uptime_days": 0}),
        ("crowded", {}, {}, {"here": {"w-1": 1}}),
    ],
)
def test_each_part_of_the_cost_prefers(
    part: str, need: dict[str, Any], better: dict[str, Any], worse: dict[str, Any]
) -> None:
    # The worse one has the lower address: only the cost can be what decides.
    found = put(
        replace(NEED, **need), replace(NODE, addr="0xb", name="b", **better), replace(NODE, addr="0xa", **worse)
    )
    assert isinstance(found, Placement)
    assert found.node_addr == "0xb"
    parts = {candidate.id: candidate.parts for candidate in found.decision.candidates}
    assert parts["0xb"][part] < parts["0xa"][part]
    assert {name for name in parts["0xa"] if parts["0xa"][name] != parts["0xb"][name]} == {part}


def test_fragmentation_prefers_the_node_where_nothing_becomes_useless() -> None:
    """Pairs are asked for: a single one goes where it breaks no pair, a share where a GPU is broken already."""
    pairs = Fragmentation({Shape(count=2): 1.0}, model_matches)
    odd, even = replace(NODE, addr="0xb", gpus=(gpu(0),)), replace(NODE, addr="0xa")
    for need in (NEED, replace(NEED, gpu=GpuNeed(count=1, share=500))):
        found = place(need, [odd, even], time=NOW, subject="r", policy=Policy(leftover=0), demand=pairs)
        assert isinstance(found, Placement)
        assert found.node_addr == "0xb"
        parts = {candidate.id: candidate.parts["fragmentation"] for candidate in found.decision.candidates}
        # One GPU was of no use before and is in use now; two were, and one of them is left over.
        assert parts == {"0xb": -need.gpu_share / 1000, "0xa": 2 - need.gpu_share / 1000}


def test_scarcity_leaves_a_scarce_model_to_those_who_must_have_it() -> None:
    scarce = replace(NODE, addr="0xa", gpus=(gpu(0, model="A100", free=False), gpu(1, model="A100")))
    plenty = replace(NODE, addr="0xb", gpus=(gpu(0), gpu(1)))
    found = put(replace(NEED, gpu=GpuNeed(count=1)), scarce, plenty, policy=Policy(leftover=0))
    assert isinstance(found, Placement)
    assert found.node_addr == "0xb"
    parts = {candidate.id: candidate.parts["scarcity"] for candidate in found.decision.candidates}
    assert parts == {"0xb": 0.0, "0xa": pytest.approx(0.6 * 9 / 99, abs=1e-6)}
    assert chosen(replace(NEED, gpu=GpuNeed("A100", 1)), scarce, plenty) == "0xa"


@pytest.mark.parametrize(
    ("failures", "days", "cost"), [(0, 0, 0.03), (1, 0, 0.18), (1, 10, 0.09), (9, 0, 0.45), (100, 1, 0.45)]
)
def test_unreliable_is_failures_over_time_with_a_limit(failures: float, days: float, cost: float) -> None:
    found = put(NEED, replace(NODE, failures=failures, uptime_days=days))
    assert found.decision.candidates[0].parts["unreliable"] == cost


@pytest.mark.parametrize(("size", "cost"), [(None, 0.04), (0, 0.02), (10 * GIB, 0.06)])
def test_an_image_costs_by_its_size(size: int | None, cost: float) -> None:
    found = put(replace(NEED, image_bytes=size), replace(NODE, images={}))
    assert found.decision.candidates[0].parts["image"] == cost


def test_every_cost_is_explained_and_adds_up() -> None:
    found = put(NEED, NODE)
    (candidate,) = found.decision.candidates
    assert list(candidate.parts) == [cost.__name__ for cost in COSTS]
    assert candidate.cost == pytest.approx(sum(candidate.parts.values()))


def test_weights_are_the_policy() -> None:
    busy, without = replace(NODE, addr="0xb", load=0.9), replace(NODE, addr="0xc", images={})
    for policy, addr in ((Policy(load=0), "0xb"), (Policy(image=0, image_per_gib=0), "0xc")):
        found = put(NEED, busy, without, policy=policy)
        assert isinstance(found, Placement)
        assert found.node_addr == addr


def test_ties_go_by_address_whatever_the_order() -> None:
    nodes = [replace(NODE, addr=f"0x{n}") for n in "cab"]
    assert chosen(NEED, *nodes) == chosen(NEED, *reversed(nodes)) == "0xa"


@pytest.mark.parametrize(
    ("replicas", "here", "wanted"),
    [
        # (replicas in all, replicas on a and b, where the next goes; a is the cheaper one)
        (1, (0, 0), "0xa"),
        (2, (1, 0), "0xb"),
        (4, (2, 0), "0xb"),
        (4, (1, 0), "0xa"),
        (5, (2, 2), "0xa"),
    ],
)
def test_half_of_the_replicas_on_one_node_are_enough(replicas: int, here: tuple[int, int], wanted: str) -> None:
    cheap = Policy(crowded=0)
    a, b = (replace(NODE, addr=addr, here={"w-1": n}) for addr, n in zip(("0xa", "0xb"), here, strict=True))
    found = put(replace(NEED, replicas=replicas), a, replace(b, load=1), policy=cheap)
    assert isinstance(found, Placement)
    assert found.node_addr == wanted


def test_a_lone_node_may_have_all_replicas() -> None:
    full = replace(NODE, addr="0xb", cpus_free=0)
    assert chosen(replace(NEED, replicas=2), replace(NODE, here={"w-1": 1}), full) == NODE.addr


def test_a_crowded_node_is_told_as_such() -> None:
    found = put(replace(NEED, replicas=2), replace(NODE, here={"w-1": 1}), replace(NODE, addr="0xb"))
    assert found.decision.refusals == {CROWDED: 1}


@pytest.mark.parametrize(
    ("need", "gpus", "ids"),
    [
        (GpuNeed(count=1), [gpu(1), gpu(0)], ("GPU-0",)),
        (GpuNeed(count=2), [gpu(2), gpu(0), gpu(1, free=False)], ("GPU-0", "GPU-2")),
        # Least memory that fits.
        (GpuNeed(count=1), [gpu(0, memory_bytes=80 * GIB), gpu(1)], ("GPU-1",)),
        (GpuNeed("", 1, 40 * GIB), [gpu(0), gpu(1, memory_bytes=80 * GIB)], ("GPU-1",)),
        # Best grade before all.
        (GpuNeed(count=1), [gpu(0, grade=Grade.DEGRADED), gpu(1, memory_bytes=80 * GIB)], ("GPU-1",)),
        (GpuNeed("3090", 1), [gpu(0), gpu(1, model="RTX 3090")], ("GPU-1",)),
        (GpuNeed(), [gpu(0)], ()),
        # A share goes where least is left; a whole one to a GPU that nobody has a share of.
        (GpuNeed(count=1, share=300), [gpu(0), gpu(1, shared=500), gpu(2, shared=700)], ("GPU-2",)),
        (GpuNeed(count=1, share=400), [gpu(0), gpu(1, shared=500), gpu(2, shared=700)], ("GPU-1",)),
        (GpuNeed(count=1), [gpu(0, shared=100), gpu(1)], ("GPU-1",)),
    ],
)
def test_the_gpus_chosen(need: GpuNeed, gpus: list[GpuView], ids: tuple[str, ...]) -> None:
    found = put(replace(NEED, gpu=need), replace(NODE, gpus=tuple(gpus)))
    assert isinstance(found, Placement)
    assert found.gpu_ids == ids


def test_a_share_is_taken_until_none_is_left() -> None:
    need, node = replace(NEED, gpu=GpuNeed(count=1, share=400), cpus=0.5), NODE
    taken: list[str] = []
    while isinstance(found := put(need, node), Placement):
        node = with_replica(need, node, found.gpu_ids)
        taken += found.gpu_ids
    assert taken == ["GPU-0", "GPU-0", "GPU-1", "GPU-1"]
    assert [one.shared for one in node.gpus] == [800, 800]
    assert (node.replicas, node.here, node.cpus_free) == (4, {"w-1": 4}, 14)


def test_nodes_that_are_not_considered_are_not_counted_as_refused() -> None:
    other = replace(NODE, addr="0xb", connected=False)
    found = place(NEED, [NODE, other], time=NOW, subject="r", without={"0xa", "0xb"})
    assert isinstance(found, Refusals)
    assert found.decision.refusals == {}


def test_no_nodes_at_all() -> None:
    found = put(NEED)
    assert isinstance(found, Refusals)
    assert found.decision.refusals == {}
