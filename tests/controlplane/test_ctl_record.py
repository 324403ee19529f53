"""`ngpu task record` against a fake control plane: the whole story, as text and as JSON."""

import json

from ngpu.v1 import flight_pb2
from ngpu.v1 import task_pb2 as pb

from tests.controlplane.ctl_fakes import NODE, TASK, FakeControlPlane, Ngpu, at

FLIGHT = pb.GetFlightsResponse(
    attempt=pb.Attempt(
        number=1,
        node_addr=NODE,
        replica_id="r-1",
        delivery=pb.DELIVERY_SENT,
        assign_time=at(1),
        end_time=at(9),
        failure=pb.Failure(cause=pb.CAUSE_CUSTOMER, reason="CONTAINER_EXITED", message="It exited with code 1."),
        reason="the only free slot",
    ),
    placement="Replica r-1: node-1, the only one that will do.",
    plane=flight_pb2.PlaneFlight(kind="failed", replica_state="ready", silent_since_time=at(8)),
    node=flight_pb2.NodeFlight(
        image_digest="sha256:abc",
        gpu_samples=[flight_pb2.GpuSample(time=at(5), gpu_id="GPU-1", utilization=97, temperature_c=88, xids=[79])],
        events=[flight_pb2.ReplicaEvent(time=at(9), state="backoff", message="the container exited with code 1")],
        log="line one\nline \x1b[31mtwo\n",
    ),
)


def test_the_whole_story_is_told(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetFlights"] = [FLIGHT]
    result = ngpu("task", "record", TASK, "--attempt", "1")
    assert (plane.last().task_id, plane.last().attempt) == (TASK, 1)
    for words in (
        "It exited with code 1. (CONTAINER_EXITED)",
        "the only free slot",
        "node-1, the only one that will do",
        "sha256:abc",
        "97%",
        "88 °C",
        "Xid 79",
        "the container exited with code 1",
        "line one",
        "two",
    ):
        assert words in result.stdout
    assert "\x1b" not in result.stdout


def test_json_is_a_line_an_attempt(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetFlights"] = [FLIGHT, FLIGHT]
    lines = ngpu("task", "record", TASK, "--json").stdout.splitlines()
    assert [json.loads(line)["plane"]["kind"] for line in lines] == ["failed", "failed"]


def test_a_node_that_could_not_tell_is_named(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    lost = pb.GetFlightsResponse()
    lost.CopyFrom(FLIGHT)
    lost.ClearField("node")
    plane.answers["GetFlights"] = [lost]
    assert "it was lost before" in ngpu("task", "record", TASK).stdout


def test_nothing_recorded_is_said(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetFlights"] = []
    assert "Nothing is recorded" in ngpu("task", "record", TASK).stderr
