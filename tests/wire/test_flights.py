"""The flight recorder: what is kept of attempts that failed or were slow, told by whom, and read by whom."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import flight_pb2, node_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.flights import NODE_BYTES
from tests.wire.house import DEADLINE_S, Client, House, refused, request
from tests.wire.node import Node, answered, hold

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


def exits(start: node_pb2.Start) -> node_pb2.Result:
    """The container ends under every request."""
    result = answered(start.attempt_id)
    result.ClearField("response")
    result.delivery = pb.DELIVERY_SENT
    result.failure.CopyFrom(
        pb.Failure(cause=pb.CAUSE_CUSTOMER, reason="CONTAINER_EXITED", message="It exited with code 1.")
    )
    return result


async def read(client: Client, task_id: str, **fields: Any) -> list[pb.GetFlightsResponse]:
    message = pb.GetFlightsRequest(task_id=task_id, **fields)
    call = client.tasks.GetFlights(message, metadata=client.auth, timeout=DEADLINE_S)
    return [flight async for flight in call]


async def tell(node: Node, attempt_id: str, log: str = "Traceback: out of cheese") -> None:
    """As a node does: again as long as the control plane is not ready for it."""
    flight = flight_pb2.NodeFlight(log=log, image_digest="sha256:abc", end_time=Timestamp(seconds=1))
    message = node_pb2.RecordRequest(attempt_id=attempt_id, flight=flight)
    while True:
        try:
            await node.client.nodes.Record(message, metadata=node.client.auth, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.01)
        else:
            return


async def failed(there: House, node: Node) -> tuple[workspace_pb2.Workspace, str]:
    """A workspace, and a task of it whose one attempt has failed."""
    node.answer = exits
    limits = workspace_pb2.Limits(max_attempts=1)
    workspace = await there.operator.workspace(limits=limits, gpu=workspace_pb2.GpuNeed(count=1))
    await there.operator.ready("echo")
    answer = await there.bridge.schedule(request(workspace, wait_s=10))
    assert answer.task.state == pb.TASK_STATE_FAILED
    return workspace, answer.task.task_id


@pytest.fixture
async def gpu_node(there: House, node: Node) -> Node:
    node.gpus = 1
    node.say()
    return node


async def test_all_that_is_known_of_a_failed_attempt_is_readable_when_its_node_is_gone(
    there: House, gpu_node: Node
) -> None:
    workspace, task_id = await failed(there, gpu_node)
    await tell(gpu_node, f"{task_id}.1")
    await there.operator.workspaces.DeleteWorkspace(
        workspace_pb2.DeleteWorkspaceRequest(workspace="echo"), metadata=there.operator.auth
    )
    for client, fields in (
        (there.operator, {}),
        (there.client(workspace.id), {}),
        (there.bridge, {"workspace_id": workspace.id}),
        (there.operator, {"attempt": 1}),
    ):
        (flight,) = await read(client, task_id, **fields)
        assert flight.attempt.failure.reason == "CONTAINER_EXITED"
        assert flight.attempt.reason
        assert "node-1" in flight.placement
        assert flight.plane.kind == "failed"
        assert flight.plane.replica_state == "ready"
        assert {sample.gpu_id for sample in flight.plane.gpu_samples} == {"GPU-node-1-0"}
        assert (flight.node.log, flight.node.image_digest) == ("Traceback: out of cheese", "sha256:abc")
    assert await read(there.operator, task_id, attempt=2) == []


async def test_what_the_control_plane_knew_is_there_when_the_node_told_nothing(there: House, gpu_node: Node) -> None:
    _, task_id = await failed(there, gpu_node)
    async with asyncio.timeout(DEADLINE_S):
        while not (flight := (await read(there.operator, task_id))[0]).HasField("plane"):
            await asyncio.sleep(0.01)
    assert not flight.HasField("node")
    assert flight.placement


async def test_containers_logs_are_for_their_workspace_alone(there: House, gpu_node: Node) -> None:
    _, task_id = await failed(there, gpu_node)
    other = await there.operator.workspace("other", replicas=0)
    with refused(*NOT_FOUND):
        await read(there.client(other.id), task_id)
    with refused(*NOT_FOUND):
        await read(there.bridge, task_id, workspace_id=other.id)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "workspace_id"):
        await read(there.bridge, task_id)
    with refused(*NOT_FOUND):
        await read(there.operator, "20260131_14_00_09_01234567890123456789")


async def test_a_node_tells_of_its_own_recorded_attempts_alone(there: House, gpu_node: Node) -> None:
    _, task_id = await failed(there, gpu_node)
    stranger = Node(there, 2)
    await stranger.join()
    await stranger.login()
    with refused(*NOT_FOUND):
        await tell(stranger, f"{task_id}.1")
    for attempt_id in (f"{task_id}.2", "nonsense", "../../etc/passwd.1"):
        with refused(*NOT_FOUND):
            await tell(gpu_node, attempt_id)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"):
        await tell(gpu_node, f"{task_id}.1", "x" * NODE_BYTES)
    await tell(gpu_node, f"{task_id}.1", "first")
    await tell(gpu_node, f"{task_id}.1", "second")
    (flight,) = await read(there.operator, task_id)
    assert flight.node.log == "first"


async def test_an_ordinary_attempt_leaves_nothing(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    task_id = (await there.bridge.schedule(request(workspace, wait_s=10))).task.task_id
    assert await read(there.operator, task_id) == []
    with refused(*NOT_FOUND):
        await tell(node, f"{task_id}.1")


async def test_nodes_are_told_from_when_on_an_attempt_is_slow(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    await there.bridge.schedule(request(workspace))
    await node.started()
    (start,) = node.running.values()
    assert start.record_after_ms == 30_000
