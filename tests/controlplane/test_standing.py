"""What the owner of a workspace reads first, as values."""

from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.census import Deployment, Move, Replica, Version, Workspace
from controlplane.explain import Decision
from controlplane.report import ReplicaReport, ReplicaState
from controlplane.spec import Scale, Spec
from controlplane.standing import absence, words

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
SPEC = Spec("demo", "demo:2", (80,), replicas=2)
GOOD = Workspace("w-1", "4" * 24, SPEC, 2, NOW, deployment=Deployment(good=2, last=2))
UNPLACED = Decision(NOW, "replica of demo", refusals={"no GPU": 3})
UPDATING = Deployment((Version(1, SPEC),), good=1, last=2)
READY, BACKOFF = ReplicaState.READY, ReplicaState.BACKOFF


def stand(number: int, generation: int, state: ReplicaState, **values: Any) -> tuple[Replica, ReplicaReport]:
    id = f"r-{number}"
    return Replica(id, "w-1", "a", generation, (), NOW, **values), ReplicaReport(id, state)


@pytest.mark.parametrize(
    ("changes", "replicas", "failing", "said"),
    [
        pytest.param({}, [stand(1, 2, READY), stand(2, 2, READY)], {}, "", id="all is well"),
        pytest.param({}, [], {}, "", id="nothing is there yet"),
        pytest.param(
            {"unplaced": UNPLACED}, [], {}, "Replica of demo: none of 3 will do: 3 no GPU.", id="there is no room"
        ),
        pytest.param(
            {"deployment": UPDATING},
            [stand(1, 1, READY), stand(2, 1, READY), stand(3, 2, BACKOFF)],
            {},
            "Updating to generation 2: 0 of 2 replicas are ready, 2 of an earlier generation serve until they are.",
            id="an update begins",
        ),
        pytest.param(
            {"deployment": UPDATING},
            [stand(1, 1, READY, drain_time=NOW), stand(2, 2, READY), stand(3, 2, BACKOFF)],
            {},
            "Updating to generation 2: 1 of 2 replicas are ready.",
            id="an update ends",
        ),
        pytest.param(
            {"deployment": replace(GOOD.deployment, fault="Generation 3 was taken back: it failed.")},
            [stand(1, 2, READY), stand(2, 2, READY)],
            {},
            "Generation 3 was taken back: it failed.",
            id="an update was taken back",
        ),
        pytest.param(
            {},
            [stand(1, 2, READY), stand(2, 2, BACKOFF)],
            {"r-2": "it failed 4 times, the last time: exited with 1"},
            "Replica r-2 does not come up: it failed 4 times, the last time: exited with 1.",
            id="one does not come up",
        ),
        pytest.param(
            {"deployment": replace(GOOD.deployment, moves=(Move(NOW, "a"), Move(NOW, "b")))},
            [stand(1, 2, BACKOFF), stand(2, 2, BACKOFF)],
            {"r-1": "it failed", "r-2": "it failed"},
            "Replica r-1 and 1 more do not come up: it failed. Nor did it on 1 other node.",
            id="all do not, anywhere",
        ),
        pytest.param(
            {"spec": replace(SPEC, scale=Scale(0, 3))},
            [],
            {},
            "It is idle: the next call brings up a replica.",
            id="it sleeps",
        ),
        pytest.param({"spec": replace(SPEC, replicas=0), "delete_time": NOW}, [], {}, "", id="it is deleted"),
    ],
)
def test_what_is_said(changes: dict[str, Any], replicas: list[Any], failing: dict[str, str], said: str) -> None:
    assert words(replace(GOOD, **changes), replicas, lambda replica: failing.get(replica.id, "")) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"unplaced": UNPLACED}, "Replica of demo: none of 3 will do: 3 no GPU."),
        ({"spec": replace(SPEC, replicas=0)}, "none is wanted: `ngpu workspace scale demo 1`"),
        ({"spec": replace(SPEC, scale=Scale(0, 3))}, "the workspace was idle; one is being called for"),
    ],
)
def test_why_there_is_none_to_wait_for(changes: dict[str, Any], said: str) -> None:
    assert absence(replace(GOOD, **changes)) == said
