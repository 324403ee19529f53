"""ListTasks and GetDetail: what is kept of tasks, and who may read it."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import asset_pb2, http_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from tests.wire.house import DEADLINE_S, POOR, RICH, Client, House, refused, request, seconds
from tests.wire.node import Node, answered, hold

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def listed(client: Client, **fields: Any) -> list[pb.ListTasksResponse]:
    call = client.tasks.ListTasks(pb.ListTasksRequest(**fields), metadata=client.auth, timeout=DEADLINE_S)
    return [page async for page in call]


def ids(pages: list[pb.ListTasksResponse]) -> list[str]:
    return [task_id for page in pages for task_id in page.task_ids]


async def detail(client: Client, task_id: str, **fields: Any) -> pb.GetDetailResponse:
    message = pb.GetDetailRequest(task_id=task_id, **fields)
    return await client.tasks.GetDetail(message, metadata=client.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]


def after(stamp: Timestamp) -> Timestamp:
    later = Timestamp()
    later.FromMicroseconds(stamp.ToMicroseconds() + 1)
    return later


async def test_tasks_are_listed_in_order_and_in_pages(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0, limits=workspace_pb2.Limits(queue_length=5000))
    other = await there.operator.workspace("other", replicas=0)
    await there.bridge.schedule(request(other))
    tasks = [answer.task for answer in [await there.bridge.schedule(request(workspace)) for _ in range(30)]]
    every = [task.task_id for task in tasks]
    for client in (there.client(workspace.id), there.bridge, there.operator):
        assert ids(await listed(client, workspace_id=workspace.id)) == every
    me = there.client(workspace.id)
    assert ids(await listed(me)) == every
    first = await listed(me, limit=10)
    assert ids(first) == every[:10]
    assert ids(await listed(me, cursor=first[-1].cursor)) == every[10:]
    assert (await listed(me))[-1].cursor == ""
    assert ids(await listed(me, start_time=tasks[5].create_time)) == every[5:]
    assert ids(await listed(me, end_time=tasks[5].create_time)) == every[:5]
    assert ids(await listed(me, start_time=tasks[3].create_time, end_time=after(tasks[4].create_time))) == every[3:5]
    assert ids(await listed(me, states=[pb.TASK_STATE_COMPLETED])) == []
    assert ids(await listed(me, states=[pb.TASK_STATE_QUEUED, pb.TASK_STATE_FAILED])) == every
    (page,) = await listed(me, limit=2, full=True)
    assert [(task.task_id, task.state) for task in page.tasks] == [(one, pb.TASK_STATE_QUEUED) for one in every[:2]]
    assert page.tasks[1].queue_position == 1


async def test_tasks_of_one_node_can_be_listed(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    done = await there.bridge.schedule(request(workspace, wait_s=10))
    assert ids(await listed(there.bridge, workspace_id=workspace.id, node_addr=node.addr)) == [done.task.task_id]
    lower = await listed(there.bridge, workspace_id=workspace.id, node_addr=node.addr.lower())
    assert ids(lower) == [done.task.task_id]
    assert ids(await listed(there.bridge, workspace_id=workspace.id, node_addr="0x" + "0" * 40)) == []


@pytest.mark.parametrize("fields", [{}, {"cursor": "nonsense"}, {"states": [9]}])
async def test_bad_list_is_refused(there: House, fields: dict[str, Any]) -> None:
    workspace = await there.operator.workspace(replicas=0)
    if fields:
        fields["workspace_id"] = workspace.id
    with refused(*INVALID):
        await listed(there.bridge, **fields)


async def test_others_lists_are_not_found(there: House) -> None:
    mine, other = (
        await there.operator.workspace("mine", replicas=0),
        await there.operator.workspace("other", replicas=0),
    )
    for client, workspace_id in ((there.client(mine.id), other.id), (there.bridge, "0" * 24), (there.bridge, "mine")):
        with refused(*NOT_FOUND):
            await listed(client, workspace_id=workspace_id)


async def test_list_is_complete_while_it_grows(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0, limits=workspace_pb2.Limits(queue_length=5000))
    before = [(await there.bridge.schedule(request(workspace))).task.task_id for _ in range(20)]

    async def more() -> None:
        for _ in range(50):
            await there.bridge.schedule(request(workspace))

    growing = asyncio.create_task(more())
    for _ in range(5):
        assert ids(await listed(there.bridge, workspace_id=workspace.id))[:20] == before
    await growing


async def test_all_that_is_recorded_is_shown_to_the_owner(there: House, node: Node) -> None:
    node.answer = lambda start: answered(start.attempt_id, b"answer", 202, headers={"X-B": "2"})
    node.gpus = 1
    node.say()
    workspace = await there.operator.workspace(ports=[8080, 9090], gpu=workspace_pb2.GpuNeed(count=1))
    await there.operator.ready("echo")
    sent = request(workspace, "/p", b"question", port=9090, btc_address=RICH, wait_s=10)
    sent.request.query = "a=1"
    sent.request.headers.add(name="X-A", value=b"\xff")
    sent.origin.CopyFrom(pb.Origin(user_ip="192.0.2.7", url="/user/x?y=1", operation="schedulingTask"))
    task_id = (await there.bridge.schedule(sent)).task.task_id
    for client, fields in (
        (there.client(workspace.id), {}),
        (there.bridge, {"workspace_id": workspace.id}),
        (there.operator, {}),
    ):
        shown = await detail(client, task_id, **fields)
        assert (shown.task.task_id, shown.task.state) == (task_id, pb.TASK_STATE_COMPLETED)
        assert shown.number == 1
        assert (shown.workspace_id, shown.workspace_name) == (workspace.id, "echo")
        assert (shown.btc_address, shown.port) == (RICH, 9090)
        assert shown.origin == pb.Origin(user_ip="192.0.2.7", url="/user/x?y=1", operation="schedulingTask")
        assert shown.request == http_pb2.HttpRequest(
            method="POST",
            path="/p",
            query="a=1",
            headers=[http_pb2.Header(name="X-A", value=b"\xff")],
            body=http_pb2.Body(inline=b"question", size=8),
        )
        assert shown.response == http_pb2.HttpResponse(
            status=202,
            headers=[http_pb2.Header(name="X-B", value=b"2")],
            body=http_pb2.Body(inline=b"answer", size=6, is_utf8=True),
        )
        (attempt,) = shown.attempts
        assert (attempt.number, attempt.node_addr, attempt.node_ip) == (1, node.addr, "127.0.0.1")
        assert (attempt.delivery, attempt.http_status, attempt.gpu_us) == (pb.DELIVERY_ANSWERED, 202, 20)
        assert list(attempt.gpu_ids) == ["GPU-node-1-0"]
        assert attempt.reason
    # The task's id alone opens its result, not whose it is.
    hidden = await detail(there.bridge, task_id)
    assert (hidden.workspace_id, hidden.origin.user_ip) == ("", "")
    assert hidden.response.body.inline == b"answer"
    cut = await detail(there.bridge, task_id, max_inline_bytes=6)
    assert (cut.request.body, cut.response.body.inline) == (http_pb2.Body(size=8), b"answer")


async def test_attempt_that_runs_is_shown_last(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    task_id = (await there.bridge.schedule(request(workspace))).task.task_id
    await node.started()
    shown = await detail(there.bridge, task_id)
    (attempt,) = shown.attempts
    assert (attempt.number, attempt.node_addr) == (1, node.addr)
    assert not attempt.HasField("end_time")
    assert not shown.HasField("response")


async def test_others_details_are_not_found(there: House) -> None:
    mine, other = (
        await there.operator.workspace("mine", replicas=0),
        await there.operator.workspace("other", replicas=0),
    )
    theirs = (await there.bridge.schedule(request(other))).task.task_id
    for client, fields in (
        (there.client(mine.id), {}),
        (there.client(mine.id), {"workspace_id": mine.id}),
        (there.bridge, {"workspace_id": mine.id}),
    ):
        with refused(*NOT_FOUND):
            await detail(client, theirs, **fields)
    with refused(*NOT_FOUND):
        await detail(there.bridge, "none")


async def test_tasks_outlive_their_workspace(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    task_id = (await there.bridge.schedule(request(workspace))).task.task_id
    await there.operator.workspaces.DeleteWorkspace(
        workspace_pb2.DeleteWorkspaceRequest(workspace="echo"), metadata=there.operator.auth
    )
    me = there.client(workspace.id)
    ended = await me.tasks.Query(
        pb.QueryRequest(task_id=task_id, wait=seconds(10)), metadata=me.auth, timeout=DEADLINE_S
    )
    assert (ended.task.state, ended.task.failure.reason) == (pb.TASK_STATE_FAILED, "WORKSPACE_DELETED")
    assert ids(await listed(me)) == [task_id]
    assert (await detail(me, task_id)).workspace_id == workspace.id


async def test_assets_of_an_address_are_told(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    for client in (there.bridge, there.client(workspace.id)):
        answer = await client.assets.CheckAddress(
            asset_pb2.CheckAddressRequest(address=RICH), metadata=client.auth, timeout=DEADLINE_S
        )
        assert [(held.ticker, held.balance) for held in answer.holdings] == [("AINN", "100.5")]
    answer = await there.bridge.assets.CheckAddress(
        asset_pb2.CheckAddressRequest(address=POOR), metadata=there.bridge.auth
    )
    assert list(answer.holdings) == []
    with refused(*INVALID, "BTC address"):
        await there.bridge.assets.CheckAddress(
            asset_pb2.CheckAddressRequest(address="bc1qnonsense"), metadata=there.bridge.auth
        )
