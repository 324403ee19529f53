"""Watch: states, the head, and a body from any byte, as it comes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import node_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.bodies import Bodies
from controlplane.retention import Retention
from controlplane.store import Store
from tests.wire.house import DEADLINE_S, Client, House, refused, request, until
from tests.wire.node import Node, answered, hold
from tests.wire.test_execute import BODY, Delivery

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


def watch(client: Client, task_id: str, **fields: Any) -> Any:
    return client.tasks.Watch(pb.WatchRequest(task_id=task_id, **fields), metadata=client.auth, timeout=DEADLINE_S)


def said(events: list[pb.WatchResponse]) -> list[Any]:
    """States by name, "head", and each run of bytes as its offset and length."""
    told: list[Any] = []
    for event in events:
        if event.HasField("task"):
            told.append(pb.TaskState.Name(event.task.state).removeprefix("TASK_STATE_"))
        if event.HasField("head"):
            told.append("head")
        if event.data:
            told.append((event.offset, len(event.data)))
    return told


async def left(call: Any) -> list[pb.WatchResponse]:
    """What is still to come."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


@pytest.fixture
async def busy(there: House) -> AsyncIterator[tuple[Node, str]]:
    """A node, and a task that runs on it."""
    node = Node(there, answer=hold)
    await node.join()
    workspace = await there.operator.workspace()
    async with node.up():
        await there.operator.ready("echo")
        task = (await there.bridge.schedule(request(workspace, body=b"question"))).task
        await node.started()
        yield node, task.task_id


async def test_every_state_is_told_and_a_short_body_comes_at_the_end(there: House) -> None:
    workspace = await there.operator.workspace()
    task_id = (await there.bridge.schedule(request(workspace))).task.task_id
    events: list[pb.WatchResponse] = []

    async def read() -> None:
        async for event in watch(there.client(workspace.id), task_id):
            events.append(event)  # noqa: PERF401, the test looks while it grows

    reading = asyncio.create_task(read())
    await until(lambda: said(events) == ["QUEUED"])
    node = Node(there, answer=hold)
    await node.join()
    async with node.up():
        await until(lambda: said(events) == ["QUEUED", "RUNNING"])
        (start,) = await node.started()
        node.end(answered(start.attempt_id, b"short", 201, headers={"X-A": "1"}))
        await reading
    assert said(events) == ["QUEUED", "RUNNING", "head", (0, 5), "COMPLETED"]
    assert (events[2].head.status, events[2].head.body.inline, events[3].data) == (201, b"", b"short")


async def test_long_body_comes_while_the_node_still_sends_it(there: House, busy: Any) -> None:
    node, task_id = busy
    call = watch(there.bridge, task_id)
    assert said([await call.read()]) == ["RUNNING"]
    delivery = Delivery(node, f"{task_id}.1")
    await delivery.begin()
    head = await call.read()
    assert (head.head.status, head.head.headers[0].value) == (200, b"image/png")
    for offset in (0, 100):
        await delivery.send(offset, BODY[offset : offset + 100])
        event = await call.read()
        assert (event.offset, event.data) == (offset, BODY[offset : offset + 100])
    await delivery.send(200, BODY[200:150_000], last=True)
    node.end(answered(f"{task_id}.1", size=150_000))
    rest = await left(call)
    assert b"".join(event.data for event in rest) == BODY[200:150_000]
    assert said(rest)[-1] == "COMPLETED"


@pytest.mark.parametrize("offset", [0, 1, wire.CHUNK_BYTES, wire.CHUNK_BYTES + 9_999, wire.CHUNK_BYTES + 10_000])
async def test_stored_body_is_read_from_any_byte(there: House, busy: Any, offset: int) -> None:
    node, task_id = busy
    delivery = Delivery(node, f"{task_id}.1")
    body = (BODY * 4)[: wire.CHUNK_BYTES + 10_000]
    await delivery.begin()
    await delivery.send(0, body[:200_000])
    await delivery.send(200_000, body[200_000:], last=True)
    node.end(answered(f"{task_id}.1", size=len(body)))
    await until(lambda: f"{task_id}.1" in node.acked)
    events = [event async for event in watch(there.bridge, task_id, offset=offset)]
    assert b"".join(event.data for event in events) == body[offset:]
    assert all(len(event.data) <= wire.CHUNK_BYTES for event in events)
    assert said(events)[0] == "head"
    assert said(events)[-1] == "COMPLETED"


async def test_offset_past_the_end_is_refused(there: House, busy: Any) -> None:
    node, task_id = busy
    node.end(answered(f"{task_id}.1", b"short"))
    await until(lambda: f"{task_id}.1" in node.acked)
    assert said([event async for event in watch(there.bridge, task_id, offset=5)]) == ["head", "COMPLETED"]
    for part, offset in ((pb.WatchRequest.PART_UNSPECIFIED, 6), (pb.WatchRequest.PART_REQUEST, 9)):
        with refused(grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE"):
            async for _ in watch(there.bridge, task_id, part=part, offset=offset):
                pass


async def test_request_and_states_alone_can_be_watched(there: House, busy: Any) -> None:
    node, task_id = busy
    node.end(answered(f"{task_id}.1", b"short"))
    await until(lambda: f"{task_id}.1" in node.acked)
    events = [event async for event in watch(there.bridge, task_id, part=pb.WatchRequest.PART_REQUEST, offset=2)]
    assert said(events) == [(2, 6), "COMPLETED"]
    assert events[0].data == b"estion"
    events = [event async for event in watch(there.bridge, task_id, part=pb.WatchRequest.PART_NONE)]
    assert said(events) == ["COMPLETED"]


async def test_long_request_can_be_watched(there: House, node: Node) -> None:
    workspace = await there.operator.workspace(replicas=0)
    upload: Any = there.bridge.tasks.Upload(metadata=there.bridge.auth, timeout=DEADLINE_S)
    await upload.write(pb.UploadRequest(workspace_id=workspace.id, data=BODY[:200_000]))
    await upload.done_writing()
    sent = request(workspace)
    sent.request.body.upload_id = (await upload).upload_id
    task_id = (await there.bridge.schedule(sent)).task.task_id
    await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=task_id), metadata=there.bridge.auth)
    events = [event async for event in watch(there.bridge, task_id, part=pb.WatchRequest.PART_REQUEST, offset=7)]
    assert b"".join(event.data for event in events) == BODY[7:200_000]
    assert said(events)[-1] == "CANCELLED"


async def test_task_that_fails_ends_the_watch(there: House, busy: Any) -> None:
    node, task_id = busy
    call = watch(there.bridge, task_id)
    assert said([await call.read()]) == ["RUNNING"]
    delivery = Delivery(node, f"{task_id}.1")
    await delivery.begin()
    await delivery.send(0, b"begun")
    assert said([await call.read(), await call.read()]) == ["head", (0, 5)]
    await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=task_id), metadata=there.bridge.auth)
    assert said(await left(call)) == ["CANCELLED"]


async def test_bytes_of_two_attempts_are_never_mixed(there: House, busy: Any) -> None:
    node, task_id = busy
    call = watch(there.bridge, task_id)
    await call.read()
    delivery = Delivery(node, f"{task_id}.1")
    await delivery.begin()
    await delivery.send(0, b"begun")
    assert said([await call.read(), await call.read()]) == ["head", (0, 5)]
    failure = pb.Failure(cause=pb.CAUSE_PLATFORM, reason="CONNECTION_CLOSED", message="It broke.")
    node.answer = lambda start: answered(start.attempt_id, b"anew")
    node.end(node_pb2.Result(attempt_id=f"{task_id}.1", delivery=pb.DELIVERY_SENT, failure=failure))
    with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", "offset 0"):
        await left(call)
    events = [event async for event in watch(there.bridge, task_id)]
    assert b"".join(event.data for event in events) == b"anew"


async def test_others_tasks_cannot_be_watched(there: House, busy: Any) -> None:
    _, task_id = busy
    stranger = await there.operator.workspace("stranger", replicas=0)
    for client, asked in (
        (there.client(stranger.id), {"task_id": task_id}),
        (there.bridge, {"task_id": task_id, "workspace_id": stranger.id}),
        (there.bridge, {"task_id": "none"}),
    ):
        with refused(*NOT_FOUND):
            await watch(client, **asked).read()


async def test_body_past_its_retention_is_said_to_be(there: House, busy: Any) -> None:
    node, task_id = busy
    delivery = Delivery(node, f"{task_id}.1")
    await delivery.begin()
    await delivery.send(0, BODY[:200_000], last=True)
    node.end(answered(f"{task_id}.1", size=200_000))
    await until(lambda: f"{task_id}.1" in node.acked)
    # Its first reader need not open it.
    assert b"".join([event.data async for event in watch(there.bridge, task_id)]) == BODY[:200_000]
    store = await Store.open(f"sqlite:///{there.state_dir / 'ngpu.db'}")
    bodies = await Bodies.open(there.state_dir / "bodies")
    later = datetime.now(UTC) + timedelta(days=8)
    await Retention(store, bodies, bodies_s=7 * 86400, uploads_s=3600, recorded_bytes=0, clock=lambda: later).sweep()
    await bodies.close()
    await store.close()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "EXPIRED"):
        async for _ in watch(there.bridge, task_id):
            pass
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "EXPIRED"):
        async for _ in watch(there.bridge, task_id, part=pb.WatchRequest.PART_REQUEST):
            pass
    # What else is known of it stays.
    answer = await there.bridge.tasks.Query(pb.QueryRequest(task_id=task_id), metadata=there.bridge.auth)
    assert (answer.response.status, answer.response.body.size, answer.response.body.inline) == (200, 200_000, b"")
