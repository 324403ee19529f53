"""Usage and prices: what was used is counted from receipts, at the price of its time, and shown to whose it is."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import node_pb2, task_pb2, workspace_pb2
from ngpu.v1 import usage_pb2 as pb

from tests.wire.house import DEADLINE_S, Client, House, house, refused, request
from tests.wire.node import Node, answered

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
FORBIDDEN = (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")
#: What each attempt here says it held its GPU.
GPU_US = 20


def stamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def past(**fields: Any) -> pb.ReceiptFilter:
    return pb.ReceiptFilter(start_time=stamp(datetime.now(UTC) - timedelta(hours=1)), **fields)


async def used(client: Client, *by: int, **fields: Any) -> list[pb.Usage]:
    message = pb.GetUsageRequest(filter=past(**fields), by=by)  # type: ignore[arg-type]
    call = client.usage.GetUsage(message, metadata=client.auth, timeout=DEADLINE_S)
    return [row async for page in call for row in page.rows]


async def receipts(client: Client, **fields: Any) -> list[pb.Receipt]:
    message = pb.ListReceiptsRequest(filter=past(**fields))
    call = client.usage.ListReceipts(message, metadata=client.auth, timeout=DEADLINE_S)
    return [row async for page in call for row in page.receipts]


async def set_price(client: Client, price: str, words: str = "", at: datetime | None = None) -> pb.Price:
    message = pb.Price(gpu_model=words, price=price, effective_time=None if at is None else stamp(at))
    call = client.usage.SetPrice(pb.SetPriceRequest(price=message), metadata=client.auth, timeout=DEADLINE_S)
    return (await call).price  # type: ignore[no-any-return]


async def prices(client: Client) -> list[tuple[str, str]]:
    answer = await client.usage.ListPrices(pb.ListPricesRequest(), metadata=client.auth, timeout=DEADLINE_S)
    return [(price.gpu_model, price.price) for price in answer.prices]


async def run(there: House, workspace: workspace_pb2.Workspace, times: int = 1) -> list[str]:
    return [(await there.bridge.schedule(request(workspace, wait_s=10))).task.task_id for _ in range(times)]


@pytest.fixture
async def gpu_node(there: House) -> AsyncIterator[Node]:
    """A node with a GPU for each of two workspaces."""
    node = Node(there, gpus=2)
    await node.join()
    async with node.up():
        yield node


async def a_workspace(there: House, name: str, account: str = "") -> workspace_pb2.Workspace:
    workspace = await there.operator.workspace(name, account=account, gpu=workspace_pb2.GpuNeed(count=1))
    await there.operator.ready(name)
    return workspace


async def test_usage_is_the_sum_of_receipts(there: House, gpu_node: Node) -> None:
    await set_price(there.operator, "0.5", "A100")
    first, second = await a_workspace(there, "first", "acme"), await a_workspace(there, "second", "acme")
    await run(there, first, 3)
    await run(there, second)
    (total,) = await used(there.operator)
    assert (total.attempts, total.free_attempts, total.gpu_us, total.billed_gpu_us) == (4, 0, 4 * GPU_US, 4 * GPU_US)
    # 20 us at 0.5 a second, four times.
    assert total.cost == "0.000040000"
    listed = await receipts(there.operator)
    assert sorted(one.workspace for one in listed) == ["first"] * 3 + ["second"]
    assert {(one.account, one.attempt.gpu_model, one.attempt.price, one.attempt.cost) for one in listed} == {
        ("acme", "NVIDIA A100", "0.500000000", "0.000010000")
    }
    by_workspace = await used(there.operator, pb.USAGE_KEY_WORKSPACE, pb.USAGE_KEY_NODE)
    assert {(row.workspace, row.node_name, row.attempts) for row in by_workspace} == {
        ("first", "node-1", 3),
        ("second", "node-1", 1),
    }
    (by_account,) = await used(there.operator, pb.USAGE_KEY_ACCOUNT, pb.USAGE_KEY_GPU_MODEL)
    assert (by_account.account, by_account.gpu_model, by_account.attempts) == ("acme", "NVIDIA A100", 4)
    by_day = await used(there.operator, pb.USAGE_KEY_DAY)
    assert sum(row.attempts for row in by_day) == 4
    assert all(row.start_time.seconds % 86400 == 0 for row in by_day)


async def test_usage_can_be_asked_for_one_workspace_account_or_node(there: House, gpu_node: Node) -> None:
    first, second = await a_workspace(there, "first", "acme"), await a_workspace(there, "second")
    await run(there, first, 2)
    await run(there, second)
    for fields, attempts in (
        ({"workspace": "first"}, 2),
        ({"workspace": second.id}, 1),
        ({"account": "acme"}, 2),
        ({"account": ""}, 1),
        ({"account": "other"}, 0),
        ({"node": "node-1"}, 3),
        ({"node": gpu_node.addr, "account": "acme"}, 2),
        ({"end_time": stamp(datetime.now(UTC) - timedelta(minutes=30))}, 0),
    ):
        (row,) = await used(there.operator, **fields)
        assert row.attempts == attempts, fields


async def test_a_workspace_sees_its_own_usage_and_no_others(there: House, gpu_node: Node) -> None:
    mine, other = await a_workspace(there, "mine"), await a_workspace(there, "other")
    (task_id,) = await run(there, mine)
    await run(there, other)
    me = there.client(mine.id)
    (row,) = await used(me)
    assert row.attempts == 1
    assert [one.task_id for one in await receipts(me, workspace="mine")] == [task_id]
    assert await prices(me) == []
    for workspace in (other.id, "other", "none"):
        with refused(*NOT_FOUND):
            await used(me, workspace=workspace)
        with refused(*NOT_FOUND):
            await receipts(me, workspace=workspace)
    with refused(*FORBIDDEN):
        await set_price(me, "0")
    for call in (used(there.bridge), receipts(there.bridge), prices(there.bridge)):
        with refused(*FORBIDDEN):
            await call


async def test_what_the_platform_caused_is_shown_and_costs_nothing(there: House, gpu_node: Node) -> None:
    await set_price(there.operator, "1000")

    def broken_first(start: node_pb2.Start) -> node_pb2.Result:
        result = answered(start.attempt_id)
        if start.attempt_id.endswith(".1"):
            result.ClearField("response")
            result.delivery = task_pb2.DELIVERY_NOT_SENT
            result.failure.CopyFrom(
                task_pb2.Failure(cause=task_pb2.CAUSE_PLATFORM, reason="CONNECT_FAILED", message="Not reached.")
            )
        return result

    gpu_node.answer = broken_first
    await run(there, await a_workspace(there, "echo"))
    (row,) = await used(there.operator)
    assert (row.attempts, row.free_attempts) == (2, 1)
    assert (row.gpu_us, row.billed_gpu_us, row.cost) == (2 * GPU_US, GPU_US, "0.020000000")
    first, second = await receipts(there.operator)
    assert (first.attempt.failure.reason, first.attempt.cost) == ("CONNECT_FAILED", "0.000000000")
    assert second.attempt.cost == "0.020000000"
    # Queued, assigned, recorded: each after the one before.
    times = [
        moment.ToMicroseconds()
        for one in (first.attempt, second.attempt)
        for moment in (one.queue_time, one.assign_time, one.end_time)
    ]
    assert times == sorted(times)
    assert first.attempt.end_time == second.attempt.queue_time


async def test_prices_survive_a_restart_and_change_nothing_that_was(tmp_path: Path) -> None:
    async with house(tmp_path) as there:
        node = Node(there, gpus=1)
        await node.join()
        async with node.up():
            await set_price(there.operator, "0.1")
            workspace = await a_workspace(there, "echo")
            await run(there, workspace)
            await set_price(there.operator, "0.2", "a100")
            await run(there, workspace)
            later = await set_price(there.operator, "9", "a100", datetime.now(UTC) + timedelta(days=1))
            await run(there, workspace)
        costs = [one.attempt.cost for one in await receipts(there.operator)]
        assert costs == ["0.000002000", "0.000004000", "0.000004000"]
    async with house(tmp_path) as there:
        assert await prices(there.operator) == [("", "0.100000000"), ("a100", "0.200000000"), ("a100", "9.000000000")]
        assert later.effective_time.ToDatetime(UTC) > datetime.now(UTC)
        assert [one.attempt.cost for one in await receipts(there.operator)] == costs


@pytest.mark.parametrize(
    ("price", "words", "after", "says"),
    [
        ("", "", None, "0.000125"),
        ("1e-3", "", None, "0.000125"),
        ("0.0000000001", "", None, "9 decimals"),
        ("1000.000000001", "", None, "1000.000000000"),
        ("1", "x" * 201, None, "200 characters"),
        ("1", "\x1b[31m", None, "words"),
        ("1", "", -60, "past"),
    ],
)
async def test_a_price_that_is_none_is_refused(
    there: House, price: str, words: str, after: int | None, says: str
) -> None:
    at = None if after is None else datetime.now(UTC) + timedelta(seconds=after)
    with refused(*INVALID, says):
        await set_price(there.operator, price, words, at)
    assert await prices(there.operator) == []


async def test_a_bad_question_is_refused(there: House) -> None:
    with refused(*INVALID, "start_time"):
        call = there.operator.usage.GetUsage(pb.GetUsageRequest(), metadata=there.operator.auth, timeout=DEADLINE_S)
        await asyncio.wait_for(anext(aiter(call)), DEADLINE_S)
    for by in ([pb.USAGE_KEY_DAY, pb.USAGE_KEY_HOUR], [0], [99]):
        with refused(*INVALID, "by"):
            await used(there.operator, *by)
    with refused(*NOT_FOUND, "no node"):
        await used(there.operator, node="nowhere")
