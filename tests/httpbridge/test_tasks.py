"""Tasks are asked after, listed and cancelled; nodes of a workspace."""

import asyncio
import json
import tracemalloc
from datetime import UTC, datetime, timedelta

import aiohttp
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ngpu.v1 import task_pb2 as pb
from ngpu.v1 import workspace_pb2

from httpbridge.answers import seconds_taken
from tests.httpbridge.conftest import BEARER, Bridge
from tests.httpbridge.fake_controlplane import (
    NODE_ADDR,
    OTHER_WORKSPACE,
    Answer,
    Exchange,
    FakeControlPlane,
    Refused,
)

OTHER = {"Authorization": f"Bearer {OTHER_WORKSPACE}"}


async def test_the_life_of_a_task_in_the_documented_numbers(bridge: Bridge, fake: FakeControlPlane) -> None:
    go_on = asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        await go_on.wait()
        return Answer("fertig ✓".encode())

    fake.container = container
    _, accepted, _ = await bridge.post("/user/schedulingTask?paramUrl=x", json={}, headers=BEARER)
    task_id = accepted["taskID"]
    task = fake.tasks[task_id].view
    task.state = pb.TASK_STATE_QUEUED
    _, answer, _ = await bridge.get(f"/user/queryTask?taskID={task_id}")
    assert (answer["result_code"], answer["msg"]) == (
        100, "SUCCESS! The task is currently in the queue waiting to be processed",
    )  # fmt: skip
    task.state = pb.TASK_STATE_RUNNING
    _, answer, headers = await bridge.get(f"/user/queryTask?taskID={task_id}")
    assert (answer["result_code"], answer["msg"]) == (101, "The task is being processed")
    assert (answer["data"], answer["result_size"]) == ("", 0)
    assert headers["X-NGPU-Task-Id"] == task_id
    waiting = asyncio.create_task(bridge.get(f"/user/queryTask?taskID={task_id}&wait=60"))
    go_on.set()
    _, answer, _ = await waiting
    assert answer == {
        "result_code": 200,
        "msg": "success",
        "taskID": task_id,
        "data": "fertig ✓",
        "result_size": 10,
        "task_dursion": 0,
    }


async def test_whole_seconds_since_acceptance(bridge: Bridge, fake: FakeControlPlane) -> None:
    task_id = fake.add_task(state=pb.TASK_STATE_RUNNING)
    view = fake.tasks[task_id].view
    view.create_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=90.5))
    _, answer, _ = await bridge.get(f"/user/queryTask?taskID={task_id}")
    assert answer["task_dursion"] in (90, 91)
    # A node's clock that jumped cannot make it negative.
    view.end_time.FromDatetime(datetime.now(UTC) - timedelta(days=1))
    _, answer, _ = await bridge.get(f"/user/queryTask?taskID={task_id}")
    assert answer["task_dursion"] == 0


async def test_another_workspaces_task_is_not_found(bridge: Bridge, fake: FakeControlPlane) -> None:
    task_id = fake.add_task(state=pb.TASK_STATE_COMPLETED)
    for method, path in (
        ("GET", "/user/queryTask"),
        ("GET", "/user/getDetailed"),
        ("GET", "/user/getTask"),
        ("DELETE", "/user/task"),
    ):
        status, answer, _ = await bridge.call(method, f"{path}?taskID={task_id}", headers=OTHER)
        unknown = await bridge.call(method, f"{path}?taskID=20240415_14_30_09_7", headers=OTHER)
        assert (status, answer) == (404, unknown[1])
        assert answer["result_code"] == 404


async def test_cancel(bridge: Bridge, fake: FakeControlPlane) -> None:
    task_id = fake.add_task(state=pb.TASK_STATE_QUEUED)
    for _ in range(2):
        status, answer, headers = await bridge.call("DELETE", f"/user/task?taskID={task_id}")
        assert (status, answer["result_code"], answer["taskID"], answer["state"]) == (200, 200, task_id, -2)
        assert headers["X-NGPU-Task-Id"] == task_id
    _, asked, _ = await bridge.get(f"/user/queryTask?taskID={task_id}")
    assert (asked["result_code"], asked["msg"]) == (499, "Cancelled by its owner")
    done = fake.add_task(state=pb.TASK_STATE_COMPLETED)
    fake.tasks[done].view.end_time.FromDatetime(datetime.now(UTC))
    _, answer, _ = await bridge.call("DELETE", f"/user/task&taskID={done}")
    assert (answer["state"], answer["msg"]) == (3, "The task had ended before")


async def test_lists_are_whole_and_in_order(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.page_size = 100
    ids = [fake.add_task(state=pb.TASK_STATE_COMPLETED) for _ in range(350)]
    fake.add_task(OTHER_WORKSPACE)
    _, answer, _ = await bridge.get("/user/queryTaskList", headers=BEARER)
    assert answer == {"result_code": 200, "msg": "success", "result_size": 350, "taskIds": ids}
    _, answer, _ = await bridge.get("/user/queryTaskList?startTime=&endTime=", headers=OTHER)
    assert answer["result_size"] == 1
    _, answer, _ = await bridge.get("/user/queryTaskList?endTime=1999-01-01", headers=OTHER)
    assert answer == {"result_code": 200, "msg": "success", "result_size": 0, "taskIds": []}


async def test_a_broken_list_goes_on_after_the_last_page(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.page_size = 100
    ids = [fake.add_task() for _ in range(350)]
    fake.break_after["ListTasks"] = 2
    _, answer, _ = await bridge.get("/user/queryTaskList?limit=320", headers=BEARER)
    assert not fake.break_after
    assert answer["taskIds"] == ids[:320]


async def test_a_list_that_cannot_go_on_is_broken_off(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.page_size = 100
    for _ in range(350):
        fake.add_task()
    fake.break_after["ListTasks"] = 2
    with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012
        async with bridge.client.get(bridge.url + "/user/queryTaskList", headers=BEARER) as response:
            assert response.status == 200
            fake.refuse["ListTasks"] = Refused(grpc.StatusCode.INTERNAL, "INTERNAL", "broken")
            await response.read()


async def test_pages(bridge: Bridge, fake: FakeControlPlane) -> None:
    ids = [fake.add_task() for _ in range(25)]
    got: list[str] = []
    cursor = ""
    sizes = []
    while True:
        _, answer, _ = await bridge.get(f"/user/queryTaskList?limit=10&cursor={cursor}", headers=BEARER)
        got += answer["taskIds"]
        sizes.append(answer["result_size"])
        cursor = answer["nextCursor"]
        if not cursor:
            break
    assert (got, sizes) == (ids, [10, 10, 5])


async def test_memory_does_not_grow_with_the_list(bridge: Bridge, fake: FakeControlPlane) -> None:
    for _ in range(30_000):
        fake.add_task()

    async def peak(limit: int) -> tuple[int, int]:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        length = 0
        async with bridge.client.get(f"{bridge.url}/user/queryTaskList?limit={limit}", headers=BEARER) as response:
            async for piece in response.content.iter_any():
                length += len(piece)
        return tracemalloc.get_traced_memory()[1] - before, length

    tracemalloc.start()
    try:
        await peak(1000)
        (small, small_length), (large, large_length) = await peak(3_000), await peak(30_000)
    finally:
        tracemalloc.stop()
    assert large_length > 9 * small_length
    # The fake's own list of what it found, eight bytes a task, is in this too.
    assert large - small < 2_000_000


async def test_of_one_node(bridge: Bridge, fake: FakeControlPlane) -> None:
    task_id = fake.add_task()
    _, answer, _ = await bridge.get(f"/user/getTasksFromNode?nodeAddr={NODE_ADDR}", headers=BEARER)
    assert answer == {"result_code": 200, "msg": "success", "result_size": 1, "taskIds": [task_id]}
    _, answer, _ = await bridge.get(
        f"/user/getTasksFromNode?nodeAddr=0x{'0' * 40}&startTime=2024-01-01&endTime=2099-01-01", headers=BEARER
    )
    assert answer["result_size"] == 0


async def test_nodes(bridge: Bridge, fake: FakeControlPlane) -> None:
    def replica(node: str, state: "workspace_pb2.ReplicaState.ValueType", progress: int) -> workspace_pb2.Replica:
        return workspace_pb2.Replica(node_addr=node, state=state, progress=progress)

    fake.workspaces[OTHER_WORKSPACE].replicas = [
        replica("0x1", workspace_pb2.REPLICA_STATE_PULLING, 40),
        replica("0x2", workspace_pb2.REPLICA_STATE_READY, 0),
        replica("0x1", workspace_pb2.REPLICA_STATE_STARTING, 90),
        replica("0x3", workspace_pb2.REPLICA_STATE_LOST, 100),
    ]
    _, answer, _ = await bridge.get("/user/queryNodes", headers=OTHER)
    assert answer == {
        "result_code": 200,
        "msg": "success",
        "result_size": 3,
        "nodes": [
            {"nodeAddr": "0x1", "progress": 90, "status": 0},
            {"nodeAddr": "0x2", "progress": 100, "status": 1},
            {"nodeAddr": "0x3", "progress": 100, "status": 0},
        ],
    }


async def test_a_workspaces_name_opens_nothing(bridge: Bridge) -> None:
    # The control plane's GetWorkspace takes names as well as ids.
    for name in ("other", "Bearer other", "Bearer ngpu_other"):
        status, answer, _ = await bridge.get("/user/queryNodes", headers={"Authorization": name})
        assert (status, answer["result_code"]) == (401, 401)


@pytest.mark.parametrize(
    "path", ["/user/queryNodes", "/user/queryTaskList", f"/user/getTasksFromNode?nodeAddr={NODE_ADDR}"]
)
async def test_what_needs_a_header(bridge: Bridge, path: str) -> None:
    for headers in (None, {"Authorization": "Bearer 123"}, {"Authorization": "nonsense"}):
        status, answer, got = await bridge.get(path, headers=headers)
        assert (status, answer["result_code"], got["WWW-Authenticate"]) == (401, 401, "Bearer")


async def test_balances_of_any_size(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.holdings["bc1x"] = {"AINN": "0.99999", "ORDI": "18446744073709551616000.5"}
    _, answer, _ = await bridge.get("/brc20/checkAddress?address=bc1x")
    assert answer["balances"] == [0, 18446744073709551616000]
    assert answer["balancesExact"] == ["0.99999", "18446744073709551616000.5"]
    _, answer, _ = await bridge.get("/brc20/checkAddress?address=bc1y")
    assert answer == {"exists": False, "names": [], "balances": [], "balancesExact": []}


async def test_an_address_that_could_not_be_checked(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.refuse["CheckAddress"] = fake.refuse["Schedule"] = Refused(
        grpc.StatusCode.UNAVAILABLE, "ASSET_UNKNOWN", "no indexer answers", 2500
    )
    for call in (
        bridge.get("/brc20/checkAddress?address=bc1x"),
        bridge.post("/user/img2img", json={"btc_address": "bc1x", "data": ""}),
    ):
        status, answer, headers = await call
        assert (status, answer, headers["Retry-After"]) == (
            503, {"result_code": 503, "msg": "no indexer answers"}, "3",
        )  # fmt: skip
    assert json.dumps(answer)


@given(st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1)), st.integers(-(10**6), 10**13))
def test_seconds_taken_are_those_between_acceptance_and_end(begun: datetime, taken_us: int) -> None:
    end = begun + timedelta(microseconds=taken_us)
    task = pb.Task()
    task.create_time.FromDatetime(begun)
    now = end.replace(tzinfo=UTC)
    expected = max(0.0, (end - begun).total_seconds())
    assert seconds_taken(task, now) == expected
    task.end_time.FromDatetime(end)
    assert seconds_taken(task, now + timedelta(days=1)) == expected
