"""A simulated fleet against a real control plane and bridge: workspaces come and go, nodes die, and it all adds up."""

import dataclasses
from pathlib import Path

import pytest
from ngpu.v1 import fleet_pb2, node_pb2, workspace_pb2

from scripts.fleet_suite.__main__ import quick
from scripts.fleet_suite.audit import Has, Held, Stuck, overcommitted, room_for, running_otherwise, unexplained
from scripts.fleet_suite.run import Run

GIB = 1024**3
NODES = {"0xA": Has("a", frozenset({"G-0", "G-1"}), cpus=8, memory_bytes=64 * GIB)}


@pytest.mark.slow
def test_nothing_is_promised_twice_and_nothing_is_stuck(tmp_path: Path) -> None:
    size = dataclasses.replace(quick(seed=5), seconds=9.0)
    findings = Run(tmp_path, size).do()
    assert list(findings.wrong) == []
    # It was no quiet run.
    assert findings.figures["gpus"] == 80
    assert findings.figures["replicas placed"] > 30
    assert findings.most_gpus > 0.4
    assert sum(findings.faults.values()) >= 4
    assert findings.figures["answers"]["answered"] > 10


# The audit itself: each thing that must not be is found.


def held(replica: str, *gpu_ids: str, share: int = 1000, cpus: float = 1.0, memory: int = GIB) -> Held:
    return Held(replica, "0xA", gpu_ids, share, cpus, memory)


@pytest.mark.parametrize(
    ("replicas", "fault"),
    [
        ([held("r-1", "G-0"), held("r-2", "G-1")], ""),
        ([held("r-1", "G-0", share=600), held("r-2", "G-0", share=400)], ""),
        ([held("r-1", "G-0"), held("r-2", "G-0")], "G-0 has 2000 thousandths taken, by r-1, r-2"),
        ([held("r-1", "G-0"), held("r-2", "G-0", share=1)], "G-0 has 1001 thousandths taken, by r-1, r-2"),
        ([held("r-1", "G-9")], "r-1 holds G-9, which is not its node's"),
        ([held("r-1", cpus=4.0), held("r-2", cpus=4.0)], ""),
        ([held("r-1", cpus=4.0), held("r-2", cpus=4.5)], "a has 8 processors, of which 8.5 are promised"),
        ([held("r-1", memory=65 * GIB)], f"a has {64 * GIB} bytes of memory, of which {65 * GIB} are promised"),
    ],
)
def test_too_much_promised_is_found(replicas: list[Held], fault: str) -> None:
    assert overcommitted(replicas, NODES) == ([fault] if fault else [])


def replica(state: workspace_pb2.ReplicaState.ValueType, **fields: object) -> workspace_pb2.Replica:
    return workspace_pb2.Replica(id="r-1", node_addr="0xA", node_name="a", state=state, **fields)  # type: ignore[arg-type]


PULLING, BACKOFF = workspace_pb2.REPLICA_STATE_PULLING, workspace_pb2.REPLICA_STATE_BACKOFF


@pytest.mark.parametrize(
    ("looks", "after_s", "stuck"),
    [
        ([replica(workspace_pb2.REPLICA_STATE_READY)] * 2, 1000, False),
        ([replica(workspace_pb2.REPLICA_STATE_ASSIGNED)] * 2, 9, False),
        ([replica(workspace_pb2.REPLICA_STATE_ASSIGNED)] * 2, 11, True),
        ([replica(PULLING, progress=4)] * 2, 11, True),
        ([replica(PULLING, progress=4, message="pulling")] * 2, 11, False),
        ([replica(PULLING, progress=4, message="pulling")] * 2, 31, True),
        ([replica(PULLING, progress=n) for n in (4, 5)], 1000, False),
        ([replica(BACKOFF, message="it exited with 1")] * 2, 1000, False),
        ([replica(BACKOFF)] * 2, 11, True),
    ],
)
def test_a_replica_that_stands_still_is_found(looks: list[workspace_pb2.Replica], after_s: float, stuck: bool) -> None:
    watch = Stuck(limit_s=10)
    assert watch.seen(0, looks[:1], ["0xA"]) == []
    assert bool(watch.seen(after_s, looks[1:], ["0xA"])) is stuck
    assert watch.seen(after_s + 1, looks[1:], []) == []


def test_what_is_on_no_node_must_say_why() -> None:
    said = fleet_pb2.ExplainResponse(decisions=[fleet_pb2.Decision(refusals={"no such GPU": 3})])
    assert unexplained("w", 2, "none of 3 will do", said) == []
    assert len(unexplained("w", 2, "", said)) == 1
    assert len(unexplained("w", 2, "none of 3 will do", fleet_pb2.ExplainResponse())) == 1


def test_room_that_is_left_is_found() -> None:
    node = fleet_pb2.Node(
        addr="0xA",
        name="a",
        connected=True,
        availability=fleet_pb2.AVAILABILITY_OPEN,
        inventory=node_pb2.Inventory(
            gpus=[node_pb2.Gpu(id=one, model="NVIDIA L4") for one in ("G-0", "G-1")], cpus=8, memory_bytes=64 * GIB
        ),
        gpu_health=[fleet_pb2.GpuHealth(gpu_id=one, grade=fleet_pb2.GRADE_OK) for one in ("G-0", "G-1")],
    )
    spec = workspace_pb2.WorkspaceSpec(name="w", gpu=workspace_pb2.GpuNeed(count=1, model="l4"), cpus=1)
    assert room_for(spec, [node], [held("r-1", "G-0")]) == ["a"]
    assert room_for(spec, [node], [held("r-1", "G-0", "G-1")]) == []
    assert room_for(spec, [node], [held("r-1", "G-0"), held("r-2", cpus=7)]) == []
    node.gpu_health[1].grade = fleet_pb2.GRADE_QUARANTINED
    assert room_for(spec, [node], [held("r-1", "G-0")]) == []


def test_what_runs_and_what_should_are_compared() -> None:
    status = {"nodes": [{"name": "a", "addr": "0xA", "containers": [{"replica": "r-1"}, {"replica": "r-2"}]}]}
    faults = running_otherwise(status, [held("r-2"), held("r-3")])
    assert faults == ["a runs r-1, which nobody wants", "a does not run r-3"]
