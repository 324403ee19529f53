"""What a dry run says in each situation, as values."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from ngpu.image import comparable

from controlplane import placement
from controlplane.census import Deployment, Replica, Workspace
from controlplane.generations import updated
from controlplane.placement import GpuView, NodeView
from controlplane.rehearsal import REPLICAS, Change, Rehearsal, rehearse, words
from controlplane.spec import GIB, GpuNeed, Scale, Spec

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)


def workspace(*, replicas: int = 1, gpus: int = 1, **values: Any) -> Workspace:
    spec = replace(Spec(name="draw", image="x", ports=(80,), replicas=replicas, gpu=GpuNeed(count=gpus)), **values)
    return Workspace("w-1", "1" * 24, spec, 1, NOW, deployment=Deployment(good=1, target=replicas))


def node(name: str, *, gpus: int = 1, held: int = 0, **values: Any) -> NodeView:
    cards = tuple(GpuView(f"{name}{n}", "RTX 4090", 24 * GIB, n, free=n >= held) for n in range(gpus))
    made = NodeView(
        addr=name,
        name=name,
        gpus=cards,
        cpus=64,
        cpus_free=64 - held,
        memory_free_bytes=256 * GIB,
        disk_free_bytes=500 * GIB,
        replicas=held,
        here={"w-1": held},
    )
    return replace(made, **values)


def replica(number: int, on: str, gpu: int = 0, **values: Any) -> Replica:
    made = Replica(f"r-{number}", "w-1", on, 1, (f"{on}{gpu}",), NOW - timedelta(hours=1, seconds=-number))
    return replace(made, **values)


def rehearsed(before: Workspace | None, after: Workspace, *parts: NodeView | Replica) -> Rehearsal:
    return rehearse(
        before,
        after,
        [part for part in parts if isinstance(part, Replica)],
        {part.addr: part for part in parts if isinstance(part, NodeView)},
        image_bytes=lambda _: 4 * GIB,
        time=NOW,
        policy=placement.DEFAULT_POLICY,
        demand=placement.NO_DEMAND,
    )


def test_each_replica_is_placed_against_what_those_before_it_leave() -> None:
    planned = rehearsed(None, workspace(replicas=3), node("a", gpus=2), node("b", images={comparable("x"): 4 * GIB}))
    places = [(step.decision.chosen, step.gpu_ids, step.pulls) for step in planned.steps]
    assert (planned.change, planned.wanted, planned.missing, planned.fits) == (Change.NEW, 3, 3, True)
    assert sorted(places[:2]) == [("a", ("a0",), True), ("b", ("b0",), False)]
    assert places[2] == ("a", ("a1",), True)
    assert words(planned) == "It would be a new workspace. There is room for all 3 replicas."
    refused = planned.steps[2].decision
    assert refused.refusals == {"no free healthy GPU": 1}
    assert all(candidate.parts for candidate in refused.candidates if not candidate.refusal)


def test_steps_end_with_the_first_that_finds_no_room() -> None:
    planned = rehearsed(None, workspace(replicas=4), node("a", gpus=2), node("b", connected=False))
    assert [step.decision.chosen for step in planned.steps] == ["a", "a", ""]
    assert not planned.fits
    said = "There is room for 2 of 4 replicas; for the next: 1 no free healthy GPU, 1 not connected."
    assert words(planned) == f"It would be a new workspace. {said}"


def test_a_great_many_are_not_all_tried() -> None:
    planned = rehearsed(None, workspace(replicas=REPLICAS + 1, gpus=0), node("a", gpus=0))
    assert (len(planned.steps), planned.missing) == (REPLICAS, REPLICAS + 1)
    assert f"(the first {REPLICAS} were tried)" in words(planned)


def test_without_nodes() -> None:
    planned = rehearsed(None, workspace())
    assert words(planned).endswith("There is room for 0 of 1 replicas; for the next: there is no node.")


def test_where_none_is_wanted_one_is_tried() -> None:
    scaled = workspace(replicas=0, scale=Scale(max_replicas=3))
    planned = rehearsed(None, scaled, node("a"))
    assert (planned.idle, planned.wanted, len(planned.steps)) == (True, 0, 1)
    assert words(planned).endswith("No replica is wanted as it stands; the first one would find room now.")


@pytest.mark.parametrize(
    ("spec", "change", "fields", "anew", "said"),
    [
        ({}, Change.NONE, (), (), "It is described so already. No replica has to be placed."),
        (
            {"concurrency": 4},
            Change.IN_PLACE,
            ("concurrency",),
            (),
            "concurrency would change; no container is started anew for that. No replica has to be placed.",
        ),
        (
            {"image": "y", "concurrency": 4},
            Change.GENERATION,
            ("image", "concurrency"),
            ("image",),
            "It would be generation 2, since image cannot change in a container that runs: its replicas are replaced "
            "one by one, each old one kept until a new one is ready. There is room for its replica.",
        ),
    ],
)
def test_what_becomes_of_one_that_lives(
    spec: dict[str, Any], change: Change, fields: tuple[str, ...], anew: tuple[str, ...], said: str
) -> None:
    before = workspace()
    after = updated(before, replace(before.spec, **spec), {1}, serves=True)
    planned = rehearsed(before, after, node("a", gpus=2, held=1), replica(1, "a"))
    assert (planned.change, planned.fields, planned.anew) == (change, fields, anew)
    assert words(planned) == said


def test_update_needs_room_for_one_more_and_then_takes_that_of_the_old() -> None:
    before = workspace(replicas=2)
    after = updated(before, replace(before.spec, image="y"), {1}, serves=True)
    old = replica(1, "a", 0), replica(2, "a", 1)
    planned = rehearsed(before, after, node("a", gpus=3, held=2), *old)
    assert [(step.gpu_ids, step.replaces) for step in planned.steps] == [(("a2",), "r-1"), (("a0",), "r-2")]
    assert planned.fits
    full = rehearsed(before, after, node("a", gpus=2, held=2), *old)
    assert not full.fits


def test_more_replicas_of_the_same_go_beside_those_there_are() -> None:
    before = workspace(replicas=1)
    after = updated(before, replace(before.spec, replicas=3), {1}, serves=True)
    planned = rehearsed(before, after, node("a", gpus=4, held=1), replica(1, "a"))
    assert (planned.kept, planned.missing, [step.replaces for step in planned.steps]) == (1, 2, ["", ""])
