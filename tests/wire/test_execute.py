"""Execute, Fetch and Deliver: attempts reach nodes once, results reach us once, whatever breaks between."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from tests.wire.house import DEADLINE_S, House, house, refused, request, seconds, until
from tests.wire.node import Node, answered, hold

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def query(there: House, task_id: str, wait_s: float = 10.0) -> pb.QueryResponse:
    message = pb.QueryRequest(task_id=task_id, wait=seconds(wait_s))
    return await there.bridge.tasks.Query(message, metadata=there.bridge.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]


async def test_stream_must_begin_with_what_is_held(there: House) -> None:
    node = Node(there)
    await node.join()
    await node.login()
    for first in (node_pb2.ExecuteRequest(), node_pb2.ExecuteRequest(sent=["x.1"]), None):
        call: Any = node.client.nodes.Execute(metadata=node.client.auth, timeout=DEADLINE_S)
        if first is not None:
            await call.write(first)
        await call.done_writing()
        with refused(*INVALID, "resume"):
            await call.read()


async def test_broken_stream_is_resumed_and_the_result_taken_once(there: House) -> None:
    node = Node(there, answer=hold)
    await node.join()
    workspace = await there.operator.workspace()
    async with node.up():
        await there.operator.ready("echo")
        task_id = (await there.bridge.schedule(request(workspace))).task.task_id
        (start,) = await node.started()
    # It went on without us, ended, and says so again and again until it is told to forget.
    node.end(answered(start.attempt_id, b"spooled"))
    async with node.up():
        await until(lambda: node.acked == [start.attempt_id])
        answer = await query(there, task_id)
        assert (answer.response.body.inline, answer.task.attempt) == (b"spooled", 1)
        assert node.running == {}


async def test_attempt_that_never_arrived_is_given_out_anew(there: House) -> None:
    node = Node(there, answer=hold)
    await node.join()
    workspace = await there.operator.workspace()
    async with node.up():
        await there.operator.ready("echo")
        task_id = (await there.bridge.schedule(request(workspace))).task.task_id
        await node.started()
    # As if the daemon had crashed before it wrote the start down.
    node.running.clear()
    async with node.up():
        (start,) = await node.started()
        assert start.attempt_id == f"{task_id}.2"
        node.end(answered(start.attempt_id))
        assert (await query(there, task_id)).task.attempt == 2


async def test_late_result_of_a_lost_attempt_is_acknowledged_and_changes_nothing(tmp_path: Path) -> None:
    async with house(tmp_path, reconnect_grace="100ms", node_timeout="1s", heartbeat_interval="200ms") as there:
        first, second = Node(there, 1, answer=hold), Node(there, 2)
        await first.join()
        await second.join()
        workspace = await there.operator.workspace()
        async with first.up():
            await there.operator.ready("echo")
            call = asyncio.create_task(there.bridge.schedule(request(workspace, body=b"x", wait_s=15)))
            (start,) = await first.started()
        async with second.up():
            answer = await call
            assert (answer.task.attempt, answer.response.body.inline) == (2, b"x")
            first.end(answered(start.attempt_id, b"late"))
            async with first.up():
                await until(lambda: start.attempt_id in first.acked)
            assert (await query(there, answer.task.task_id)).response.body.inline == b"x"


async def test_unknown_results_are_acknowledged_so_that_they_are_forgotten(there: House, node: Node) -> None:
    for attempt_id in ("20260101_00_00_00_00000000000000000000.1", "nonsense", ""):
        node.end(answered(attempt_id, b"x"))
        await until(lambda attempt_id=attempt_id: attempt_id in node.acked)  # type: ignore[misc]


async def test_result_from_the_future_is_refused(there: House, node: Node) -> None:
    node.tell(node_pb2.ExecuteRequest(results=[node_pb2.Result(attempt_id="x.1", delivery=99)]))  # type: ignore[arg-type]
    await until(lambda: len(node.errors) == 1)
    assert node.errors[0].code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_starts_share_frames(there: House, node: Node) -> None:
    workspace = await there.operator.workspace(concurrency=64)
    await there.operator.ready("echo")
    answers = await asyncio.gather(*(there.bridge.schedule(request(workspace, wait_s=15)) for _ in range(200)))
    assert {answer.task.state for answer in answers} == {pb.TASK_STATE_COMPLETED}
    await until(lambda: len(node.acked) == 200)
    assert len(set(node.acked)) == 200


# Bodies on streams of their own.


@pytest.fixture
async def busy(there: House) -> AsyncIterator[tuple[Node, node_pb2.Start, workspace_pb2.Workspace]]:
    """A node with one attempt that runs."""
    node = Node(there, answer=hold)
    await node.join()
    workspace = await there.operator.workspace(limits={"response_body_bytes": MIB})
    async with node.up():
        await there.operator.ready("echo")
        await there.bridge.schedule(request(workspace))
        (start,) = await node.started()
        yield node, start, workspace


def head(status: int = 200) -> http_pb2.HttpResponse:
    return http_pb2.HttpResponse(status=status, headers=[http_pb2.Header(name="Content-Type", value=b"image/png")])


class Delivery:
    """A Deliver stream."""

    def __init__(self, node: Node, attempt_id: str) -> None:
        self.call: Any = node.client.nodes.Deliver(metadata=node.client.auth, timeout=DEADLINE_S)
        self.attempt_id = attempt_id

    async def begin(self) -> node_pb2.DeliverResponse:
        await self.call.write(node_pb2.DeliverRequest(attempt_id=self.attempt_id, head=head()))
        return await self.call.read()  # type: ignore[no-any-return]

    async def send(self, offset: int, data: bytes, *, last: bool = False) -> node_pb2.DeliverResponse:
        await self.call.write(node_pb2.DeliverRequest(offset=offset, data=data, last=last))
        return await self.call.read()  # type: ignore[no-any-return]


MIB = 1024 * 1024
BODY = bytes(range(256)) * 1200


async def test_long_response_is_delivered_beside_and_read_whole(there: House, busy: Any) -> None:
    node, start, _ = busy
    delivery = Delivery(node, start.attempt_id)
    assert (await delivery.begin()).stored_bytes == 0
    assert (await delivery.send(0, BODY[:200_000])).stored_bytes == 200_000
    last = await delivery.send(200_000, BODY[200_000:], last=True)
    assert (last.stored_bytes, last.complete) == (len(BODY), True)
    assert await delivery.call.read() is grpc.aio.EOF
    node.end(answered(start.attempt_id, size=len(BODY), headers={"Content-Type": "image/png"}))
    answer = await query(there, start.attempt_id.rpartition(".")[0])
    assert answer.response.body == http_pb2.Body(inline=BODY, size=len(BODY), is_utf8=True)
    assert answer.response.headers[0].value == b"image/png"


async def test_broken_delivery_goes_on_where_it_was(there: House, busy: Any) -> None:
    node, start, _ = busy
    first = Delivery(node, start.attempt_id)
    await first.begin()
    await first.send(0, BODY[:100])
    first.call.cancel()
    again = Delivery(node, start.attempt_id)
    assert (await again.begin()).stored_bytes == 100
    with refused(grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE", "100"):
        await again.send(50, b"x")
    third = Delivery(node, start.attempt_id)
    await third.begin()
    assert (await third.send(100, BODY[100:200_000], last=True)).complete
    # Said again after it is complete, as after a lost answer.
    fourth = Delivery(node, start.attempt_id)
    assert (await fourth.begin()).complete
    node.end(answered(start.attempt_id, size=200_000))
    answer = await query(there, start.attempt_id.rpartition(".")[0])
    assert answer.response.body.inline == BODY[:200_000]


async def test_empty_response_can_be_delivered(there: House, busy: Any) -> None:
    node, start, _ = busy
    delivery = Delivery(node, start.attempt_id)
    await delivery.begin()
    answer = await delivery.send(0, b"", last=True)
    assert (answer.stored_bytes, answer.complete) == (0, True)


async def test_response_over_the_limit_is_cut_off(there: House, busy: Any) -> None:
    node, start, _ = busy
    delivery = Delivery(node, start.attempt_id)
    await delivery.begin()
    for number in range(4):
        await delivery.send(number * MIB // 4, bytes(MIB // 4))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"):
        await delivery.send(MIB, b"x")


async def test_chunk_that_is_too_long_is_refused(there: House, busy: Any) -> None:
    node, start, _ = busy
    delivery = Delivery(node, start.attempt_id)
    await delivery.begin()
    with refused(*INVALID, "data"):
        await delivery.send(0, bytes(wire.CHUNK_BYTES + 1))


async def test_result_without_its_body_is_the_platforms_fault(there: House, busy: Any) -> None:
    node, start, _ = busy
    node.answer = lambda next_start: answered(next_start.attempt_id, b"second try")
    node.end(answered(start.attempt_id, size=200_000))
    answer = await query(there, start.attempt_id.rpartition(".")[0])
    assert (answer.task.attempt, answer.response.body.inline) == (2, b"second try")


async def test_others_attempts_cannot_be_fetched_or_delivered(there: House, busy: Any) -> None:
    _, start, _ = busy
    other = Node(there, 2)
    await other.join()
    await other.login()
    for attempt_id in (start.attempt_id, "nonsense", "", start.attempt_id + "1", "../../operator.token.1"):
        fetch: Any = other.client.nodes.Fetch(
            node_pb2.FetchRequest(attempt_id=attempt_id), metadata=other.client.auth, timeout=DEADLINE_S
        )
        with refused(*NOT_FOUND):
            await fetch.read()
        with refused(*NOT_FOUND):
            await Delivery(other, attempt_id).begin()


async def test_delivery_of_an_attempt_that_was_given_up_ends(there: House, busy: Any) -> None:
    node, start, _ = busy
    delivery = Delivery(node, start.attempt_id)
    await delivery.begin()
    task_id = start.attempt_id.rpartition(".")[0]
    await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=task_id), metadata=there.bridge.auth)
    with refused(*NOT_FOUND):
        await delivery.send(0, b"x")


async def test_delivery_does_not_wait_for_a_task_that_is_recorded_with_its_end(
    there: House, busy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, start, workspace = busy
    node.end(answered(start.attempt_id))
    await until(lambda: start.attempt_id in node.acked)
    monkeypatch.setattr("controlplane.store_writer.HOLD_S", 2 * DEADLINE_S)
    calling = asyncio.create_task(there.bridge.schedule(request(workspace, wait_s=DEADLINE_S)))
    (start,) = await node.started()
    delivery = Delivery(node, start.attempt_id)
    await delivery.begin()
    await delivery.send(0, BODY[:100_000], last=True)
    node.end(answered(start.attempt_id, size=100_000))
    assert (await calling).response.body.inline == BODY[:100_000]


async def test_fetch_of_what_was_inline_or_past_the_end_is_refused(there: House, busy: Any) -> None:
    node, start, workspace = busy
    fetch: Any = node.client.nodes.Fetch(
        node_pb2.FetchRequest(attempt_id=start.attempt_id), metadata=node.client.auth, timeout=DEADLINE_S
    )
    with refused(*NOT_FOUND):
        await fetch.read()
    node.end(answered(start.attempt_id))
    upload: Any = there.bridge.tasks.Upload(metadata=there.bridge.auth, timeout=DEADLINE_S)
    await upload.write(pb.UploadRequest(workspace_id=workspace.id, data=bytes(100_000)))
    await upload.done_writing()
    sent = request(workspace)
    sent.request.body.upload_id = (await upload).upload_id
    await there.bridge.schedule(sent)
    (start,) = await node.started()
    fetch = node.client.nodes.Fetch(
        node_pb2.FetchRequest(attempt_id=start.attempt_id, offset=100_001), metadata=node.client.auth
    )
    with refused(grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE"):
        await fetch.read()


async def test_everything_survives_a_restart(tmp_path: Path) -> None:
    async with house(tmp_path) as there:
        node = Node(there, answer=hold)
        await node.join()
        workspace = await there.operator.workspace()
        async with node.up():
            await there.operator.ready("echo")
            running = (await there.bridge.schedule(request(workspace))).task.task_id
            queued = (await there.bridge.schedule(request(workspace, body=b"q"))).task.task_id
            (start,) = await node.started()
            delivery = Delivery(node, start.attempt_id)
            await delivery.begin()
            await delivery.send(0, BODY[:100_000])
        operator = there.operator.credential
    async with house(tmp_path) as again:
        assert again.operator.credential == operator
        back = Node(again, answer=lambda start: answered(start.attempt_id, start.request.body.inline))
        back.running = node.running
        async with back.up():
            delivery = Delivery(back, start.attempt_id)
            assert (await delivery.begin()).stored_bytes == 100_000
            await delivery.send(100_000, BODY[100_000:200_000], last=True)
            back.end(answered(start.attempt_id, size=200_000))
            first, second = await query(again, running), await query(again, queued)
            assert (first.task.attempt, first.response.body.inline) == (1, BODY[:200_000])
            assert (second.task.attempt, second.response.body.inline) == (1, b"q")
