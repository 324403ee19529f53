"""What raw pass-through asks of the wire: early answers, hang-ups, uploads that are watched, connections joined."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane import dispatcher
from controlplane.api import tunnels
from controlplane.bodies import Bodies
from controlplane.retention import Retention
from controlplane.store import Store
from tests.wire.house import DEADLINE_S, Client, House, refused, request, until
from tests.wire.node import Node, answered, hold
from tests.wire.test_batch import batch, schedule
from tests.wire.test_execute import BODY, Delivery
from tests.wire.test_watch import left, said, watch

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
TOO_LARGE = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE")
MESSAGE_LOST = pb.Failure(cause=pb.CAUSE_PLATFORM, reason="REPLICA_LOST", message="The replica was stopped.")


@pytest.fixture
async def node(there: House) -> AsyncIterator[Node]:
    """Runs what it is given until the test ends it."""
    node = Node(there, answer=hold)
    await node.join()
    async with node.up():
        yield node


@pytest.fixture
async def workspace(there: House, node: Node) -> workspace_pb2.Workspace:
    workspace = await there.operator.workspace(concurrency=4)
    await there.operator.ready("echo")
    return workspace


def streamed(workspace: workspace_pb2.Workspace, **fields: Any) -> pb.ScheduleRequest:
    return request(workspace, streamed=True, wait_s=10.0, cancel_on_hangup=True, **fields)


@asynccontextmanager
async def called(client: Client, message: pb.ScheduleRequest) -> AsyncIterator["asyncio.Task[pb.ScheduleResponse]"]:
    call = asyncio.create_task(client.schedule(message))
    try:
        yield call
    finally:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


class Promised(Delivery):
    """Delivers a response whose length is told in its head; 0: it is not."""

    def __init__(self, node: Node, attempt_id: str, size: int = 0) -> None:
        super().__init__(node, attempt_id)
        self.size = size

    async def begin(self) -> node_pb2.DeliverResponse:
        head = http_pb2.HttpResponse(status=206, body=http_pb2.Body(size=self.size))
        await self.call.write(node_pb2.DeliverRequest(attempt_id=self.attempt_id, head=head))
        return await self.call.read()  # type: ignore[no-any-return]


async def state(there: House, task_id: str, *, at_end: bool = True) -> str:
    """Its state, once it has ended."""

    async def asked() -> pb.Task:
        answer = await there.bridge.tasks.Query(pb.QueryRequest(task_id=task_id), metadata=there.bridge.auth)
        return answer.task  # type: ignore[no-any-return]

    while at_end and (await asked()).state <= pb.TASK_STATE_RUNNING:
        await asyncio.sleep(0.005)
    return pb.TaskState.Name((await asked()).state).removeprefix("TASK_STATE_")


# Early answers.


async def test_streamed_call_is_answered_with_the_head(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        assert start.streamed
        delivery = Promised(node, start.attempt_id, 300_000)
        await delivery.begin()
        answer = await call
    assert answer.task.state == pb.TASK_STATE_RUNNING
    assert (answer.response.status, answer.response.body.size, answer.response.body.inline) == (206, 300_000, b"")
    # To everybody else it has no response yet.
    asked = await there.bridge.tasks.Query(pb.QueryRequest(task_id=answer.task.task_id), metadata=there.bridge.auth)
    assert not asked.HasField("response")


async def test_call_in_a_batch_is_answered_with_the_head_and_another_is_not(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with batch(there.bridge) as stream:
        await stream.send(schedule(1, streamed(workspace)), schedule(2, request(workspace, wait_s=10.0)))
        for start in await node.started(2):
            await Promised(node, start.attempt_id).begin()
        answer = (await stream.answer(1)).schedule
        assert (answer.task.state, answer.response.status) == (pb.TASK_STATE_RUNNING, 206)
        assert 2 not in stream.answers


async def test_short_answer_to_a_streamed_call_comes_whole(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        node.end(answered(start.attempt_id, b"short", 201))
        answer = await call
    assert (answer.task.state, answer.response.status) == (pb.TASK_STATE_COMPLETED, 201)
    assert answer.response.body.inline == b"short"


async def test_task_whose_answer_has_begun_does_not_begin_anew(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        delivery = Promised(node, start.attempt_id)
        await delivery.begin()
        task_id = (await call).task.task_id
    await delivery.send(0, BODY[:1000])
    lost = node_pb2.Result(attempt_id=start.attempt_id, delivery=pb.DELIVERY_ANSWERED, failure=MESSAGE_LOST)
    node.end(lost)
    assert await state(there, task_id) == "FAILED"
    assert not node.running
    # Nor is what came of it kept.
    assert not list((there.state_dir / "bodies").glob(f"*/{task_id}*"))


@pytest.mark.parametrize("how", ["cancelled", "lost"])
async def test_beginning_of_an_answer_goes_with_its_attempt(
    there: House, node: Node, workspace: workspace_pb2.Workspace, how: str
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        delivery = Promised(node, start.attempt_id)
        await delivery.begin()
        task_id = (await call).task.task_id
    await delivery.send(0, BODY[:1000])
    parts = there.state_dir / "bodies"
    assert len(list(parts.glob(f"*/{task_id}*"))) == 1
    if how == "cancelled":
        # Its node says no more of it than that the stream has ended.
        await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=task_id), metadata=there.bridge.auth)
        await delivery.call.done_writing()
    else:
        failure = pb.Failure(cause=pb.CAUSE_PLATFORM, reason="REPLICA_LOST", message="Gone.")
        node.end(node_pb2.Result(attempt_id=start.attempt_id, delivery=pb.DELIVERY_ANSWERED, failure=failure))
    await until(lambda: not list(parts.glob(f"*/{task_id}*")))


async def test_beginnings_of_answers_that_a_crash_has_left_go_too(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        delivery = Promised(node, start.attempt_id)
        await delivery.begin()
        task_id = (await call).task.task_id
    await delivery.send(0, BODY[:1000])
    ended = (await there.bridge.schedule(request(workspace))).task.task_id
    await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=ended), metadata=there.bridge.auth)
    store = await Store.open(f"sqlite:///{there.state_dir / 'ngpu.db'}")
    bodies = await Bodies.open(there.state_dir / "bodies")
    names = [f"{task_id}.1.response", f"{ended}.1.response", f"{task_id}.2.response", "upload-x"]
    for name in names[1:]:
        await bodies.append(name, 0, b"x", limit_bytes=10)
    later = datetime.now(UTC) + timedelta(minutes=2)
    retention = Retention(store, bodies, bodies_s=7 * 86400, uploads_s=3600, recorded_bytes=0, clock=lambda: later)
    await retention.sweep()
    # What still comes stays.
    assert [await bodies.size(name) for name in names] == [1000, None, None, 1]
    await bodies.close()
    await store.close()


async def test_task_whose_answer_has_not_begun_does(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        node.end(node_pb2.Result(attempt_id=start.attempt_id, delivery=pb.DELIVERY_SENT, failure=MESSAGE_LOST))
        await until(lambda: any(attempt.endswith(".2") for attempt in node.running))
        (again,) = node.running.values()
        assert again.streamed
        node.end(answered(again.attempt_id, b"ok"))
        assert (await call).response.body.inline == b"ok"


# Hang-ups.


@pytest.mark.parametrize("sent", [0, 1000])
async def test_watcher_who_hangs_up_cancels(
    there: House, node: Node, workspace: workspace_pb2.Workspace, sent: int
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        delivery = Promised(node, start.attempt_id, 2000)
        await delivery.begin()
        task_id = (await call).task.task_id
    watching = watch(there.bridge, task_id, cancel_on_hangup=True)
    assert said([await watching.read(), await watching.read()]) == ["RUNNING", "head"]
    if sent:
        await delivery.send(0, BODY[:sent])
        assert (await watching.read()).data == BODY[:sent]
    watching.cancel()
    await until(lambda: node.cancelled == [start.attempt_id])
    assert await state(there, task_id) == "CANCELLED"


async def test_caller_who_never_comes_for_the_answer_has_hung_up(
    there: House, node: Node, workspace: workspace_pb2.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "UNREAD_S", 0.1)
    task_ids: list[str] = []
    for cancels in (True, True, False):
        message = request(workspace, streamed=True, wait_s=10.0, cancel_on_hangup=cancels)
        async with called(there.bridge, message) as call:
            await until(lambda: len(node.running) > len(task_ids))
            start = list(node.running.values())[-1]
            await Promised(node, start.attempt_id).begin()
            task_ids.append((await call).task.task_id)
        if len(task_ids) == 1:
            read = watch(there.bridge, task_ids[0], cancel_on_hangup=True)
            assert said([await read.read(), await read.read()]) == ["RUNNING", "head"]
    assert await state(there, task_ids[1]) == "CANCELLED"
    # One is read, of the other nobody has said that it is for somebody who may go.
    assert node.cancelled == [f"{task_ids[1]}.1"]
    assert [await state(there, task_id, at_end=False) for task_id in task_ids[::2]] == ["RUNNING", "RUNNING"]


@pytest.mark.parametrize("when", ["before the answer", "in a batch", "during the answer", "never came", "told"])
async def test_workspace_may_say_that_hanging_up_does_not_cancel(
    there: House, node: Node, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(dispatcher, "UNREAD_S", 0.01)
    workspace = await there.operator.workspace("patient", cancel_on_hangup=False)
    await there.operator.ready("patient")
    if when == "in a batch":
        async with batch(there.bridge) as stream:
            await stream.send(schedule(1, streamed(workspace)))
            (start,) = await node.started()
    else:
        async with called(there.bridge, streamed(workspace)) as call:
            (start,) = await node.started()
            if when != "before the answer":
                await Promised(node, start.attempt_id).begin()
                await call
    task_id = start.attempt_id.rpartition(".")[0]
    if when == "during the answer":
        watching = watch(there.bridge, task_id, cancel_on_hangup=True)
        assert said([await watching.read(), await watching.read()]) == ["RUNNING", "head"]
        watching.cancel()
    if when == "told":
        hangup = pb.CancelRequest(task_id=task_id, hangup=True)
        answer = await there.bridge.tasks.Cancel(hangup, metadata=there.bridge.auth)
        assert answer.task.state == pb.TASK_STATE_RUNNING
    # Time enough for a cancel to come.
    await asyncio.sleep(0.1)
    node.end(answered(start.attempt_id, b"done"))
    assert await state(there, task_id) == "COMPLETED"
    assert not node.cancelled


async def test_watcher_who_has_all_that_was_promised_may_go(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        delivery = Promised(node, start.attempt_id, 1000)
        await delivery.begin()
        task_id = (await call).task.task_id
    watching = watch(there.bridge, task_id, cancel_on_hangup=True)
    while not (event := await watching.read()).data:
        if event.HasField("head"):
            await delivery.send(0, BODY[:1000])
    watching.cancel()
    await delivery.send(1000, b"", last=True)
    node.end(answered(start.attempt_id, size=1000))
    assert await state(there, task_id) == "COMPLETED"
    assert not node.cancelled


async def test_other_watchers_may_come_and_go(there: House, node: Node, workspace: workspace_pb2.Workspace) -> None:
    async with called(there.bridge, streamed(workspace)) as call:
        (start,) = await node.started()
        await Promised(node, start.attempt_id).begin()
        task_id = (await call).task.task_id
    watching = watch(there.bridge, task_id)
    assert said([await watching.read(), await watching.read()]) == ["RUNNING", "head"]
    watching.cancel()
    node.end(answered(start.attempt_id, b"x"))
    assert await state(there, task_id) == "COMPLETED"


# Uploads.


async def upload(client: Client, *messages: pb.UploadRequest, end: bool = True) -> Any:
    call = client.tasks.Upload(metadata=client.auth, timeout=DEADLINE_S)
    for message in messages:
        await call.write(message)
    if end:
        await call.done_writing()
    return call


def stored(there: House) -> list[str]:
    return [path.name for path in (there.state_dir / "bodies").glob("*/upload-*")]


async def test_upload_is_agreed_to_before_it_is_sent(there: House) -> None:
    workspace = await there.operator.workspace()
    first = pb.UploadRequest(workspace_id=workspace.id, size=3)
    call = await upload(there.bridge, first, end=False)
    agreed = dict(await call.initial_metadata())
    await call.write(pb.UploadRequest(data=b"abc"))
    await call.done_writing()
    answer = await call
    assert (answer.upload_id, answer.size) == (agreed[wire.UPLOAD_ID], 3)
    assert int(agreed[wire.UPLOAD_LIMIT]) == workspace.spec.limits.request_body_bytes == 64 * 1024 * 1024
    # It is what a broken one is taken up again with.
    again = pb.UploadRequest(workspace_id=workspace.id, upload_id=answer.upload_id, offset=3, data=b"d")
    assert (await (await upload(there.bridge, again))).size == 4


async def test_upload_that_says_it_is_too_large_is_refused_at_once(there: House) -> None:
    limits = workspace_pb2.Limits(request_body_bytes=100)
    workspace = await there.operator.workspace(limits=limits)
    call = await upload(there.bridge, pb.UploadRequest(workspace_id=workspace.id, size=101), end=False)
    assert wire.UPLOAD_ID not in dict(await call.initial_metadata())
    with refused(*TOO_LARGE):
        await call
    assert not stored(there)


async def test_upload_that_breaks_is_deleted_if_nobody_will_go_on_with_it(there: House) -> None:
    workspace = await there.operator.workspace()
    for discard, cancelled, last in (
        (True, True, False),
        (True, False, False),
        (True, False, True),
        (False, True, False),
    ):
        first = pb.UploadRequest(workspace_id=workspace.id, discard=discard, data=b"x")
        call = await upload(there.bridge, first, pb.UploadRequest(data=b"y", last=last), end=not cancelled)
        if cancelled:
            await call.initial_metadata()
            await until(lambda: len(stored(there)) == 1)
            call.cancel()
        else:
            await call
        kept = int(last or not discard)
        await until(lambda kept=kept: len(stored(there)) == kept)  # type: ignore[misc]
        for path in (there.state_dir / "bodies").glob("*/upload-*"):
            path.unlink()


# A change of protocol.


@pytest.mark.parametrize(
    ("fields", "method", "value", "travels"),
    [
        ({"streamed": True}, "GET", b"WebSocket", True),
        ({}, "GET", b"websocket", False),
        ({"streamed": True}, "POST", b"websocket", False),
        ({"streamed": True}, "GET", b"h2c", False),
    ],
)
async def test_only_a_streamed_get_may_ask_for_it(
    there: House,
    node: Node,
    workspace: workspace_pb2.Workspace,
    fields: dict[str, Any],
    method: str,
    value: bytes,
    travels: bool,
) -> None:
    message = request(workspace, **fields)
    message.request.method = method
    message.request.headers.add(name="Upgrade", value=value)
    message.request.headers.add(name="Connection", value=b"Upgrade, X-A")
    message.request.headers.add(name="X-A", value=b"1")
    await there.bridge.schedule(message)
    (start,) = await node.started()
    assert [(h.name, h.value) for h in start.request.headers] == ([("Upgrade", value)] if travels else [])


class Ends:
    """Both ends of a connection that has changed its protocol."""

    def __init__(self, there: House, node: Node, task_id: str) -> None:
        self.node: Any = node.client.nodes.Tunnel(metadata=node.client.auth, timeout=DEADLINE_S)
        self.caller: Any = there.bridge.tasks.Connect(metadata=there.bridge.auth, timeout=DEADLINE_S)
        self.task_id = task_id

    async def open(self) -> None:
        head = http_pb2.HttpResponse(status=101, headers=[http_pb2.Header(name="Upgrade", value=b"websocket")])
        await self.node.write(node_pb2.TunnelRequest(attempt_id=f"{self.task_id}.1", head=head))

    async def take(self) -> None:
        await self.caller.write(pb.ConnectRequest(task_id=self.task_id))

    async def say(self, data: bytes) -> bytes:
        """To the container; gives what came back to the caller."""
        await self.caller.write(pb.ConnectRequest(data=data))
        assert (await self.node.read()).data == data
        await self.node.write(node_pb2.TunnelRequest(data=data.upper()))
        return (await self.caller.read()).data  # type: ignore[no-any-return]


@pytest.fixture
async def ends(there: House, node: Node, workspace: workspace_pb2.Workspace) -> Ends:
    """A task whose container has answered 101, and whose caller has been told."""
    message = streamed(workspace)
    async with called(there.bridge, message) as call:
        (start,) = await node.started()
        ends = Ends(there, node, start.attempt_id.rpartition(".")[0])
        await ends.open()
        answer = await call
    assert (answer.task.state, answer.response.status) == (pb.TASK_STATE_RUNNING, 101)
    return ends


async def test_bytes_go_both_ways(ends: Ends) -> None:
    await ends.take()
    for data in (b"hello", b"x" * wire.CHUNK_BYTES, b"bye"):
        assert await ends.say(data) == data.upper()


async def test_caller_who_closes_has_his_bytes_delivered_first(ends: Ends) -> None:
    await ends.take()
    await ends.say(b"x")
    for _ in range(20):
        await ends.caller.write(pb.ConnectRequest(data=b"z" * 100_000))
    await ends.caller.done_writing()
    size = 0
    while (message := await ends.node.read()) is not grpc.aio.EOF:
        size += len(message.data)
    assert size == 2_000_000
    assert await ends.caller.read() is grpc.aio.EOF


async def test_container_that_closes_has_its_bytes_delivered_first(ends: Ends) -> None:
    await ends.take()
    await ends.say(b"x")
    for _ in range(5):
        await ends.node.write(node_pb2.TunnelRequest(data=b"z" * 100_000))
    await ends.node.done_writing()
    size = 0
    while (message := await ends.caller.read()) is not grpc.aio.EOF:
        size += len(message.data)
    assert size == 500_000
    assert await ends.node.read() is grpc.aio.EOF


@pytest.mark.parametrize("side", ["caller", "node"])
async def test_side_that_breaks_off_takes_the_other_along(ends: Ends, side: str) -> None:
    await ends.take()
    await ends.say(b"x")
    broken, other = (ends.caller, ends.node) if side == "caller" else (ends.node, ends.caller)
    broken.cancel()
    assert await other.read() is grpc.aio.EOF


async def test_connection_is_taken_once_and_by_its_owner(there: House, ends: Ends) -> None:
    stranger = await there.operator.workspace("other")
    for client, task_id in (
        (there.client(stranger.id), ends.task_id),
        (there.bridge, "20240101_00_00_00_00000000000000000000"),
    ):
        call: Any = client.tasks.Connect(metadata=client.auth, timeout=DEADLINE_S)
        await call.write(pb.ConnectRequest(task_id=task_id))
        with refused(*NOT_FOUND):
            await call.read()
    await ends.take()
    await ends.say(b"x")
    call = there.bridge.tasks.Connect(metadata=there.bridge.auth, timeout=DEADLINE_S)
    await call.write(pb.ConnectRequest(task_id=ends.task_id))
    with refused(*NOT_FOUND):
        await call.read()
    assert await ends.say(b"still") == b"STILL"


async def sizes(there: House, task_id: str) -> tuple[int, int]:
    """What is recorded of its two bodies."""
    detail = await there.bridge.tasks.GetDetail(pb.GetDetailRequest(task_id=task_id), metadata=there.bridge.auth)
    assert not detail.request.body.inline
    assert not detail.response.body.inline
    return detail.request.body.size, detail.response.body.size


async def test_bytes_both_ways_are_counted_and_not_kept(there: House, node: Node, ends: Ends) -> None:
    await ends.take()
    for data in (b"hello", b"x" * wire.CHUNK_BYTES):
        await ends.say(data)
    await ends.node.write(node_pb2.TunnelRequest(data=b"and more"))
    assert (await ends.caller.read()).data == b"and more"
    await ends.caller.done_writing()
    node.end(answered(f"{ends.task_id}.1", status=101))
    assert await state(there, ends.task_id) == "COMPLETED"
    sent = 5 + wire.CHUNK_BYTES
    assert await sizes(there, ends.task_id) == (sent, sent + 8)
    assert said(await left(watch(there.bridge, ends.task_id))) == ["head", "COMPLETED"]
    assert not list((there.state_dir / "bodies").glob("*/*"))


async def test_bytes_of_a_connection_that_was_cancelled_are_counted(there: House, node: Node, ends: Ends) -> None:
    await ends.take()
    await ends.say(b"hello")
    await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=ends.task_id), metadata=there.bridge.auth)
    assert await state(there, ends.task_id) == "CANCELLED"
    detail = await there.bridge.tasks.GetDetail(pb.GetDetailRequest(task_id=ends.task_id), metadata=there.bridge.auth)
    assert detail.request.body.size == 5


async def test_cancel_ends_a_connection(there: House, node: Node, ends: Ends) -> None:
    await ends.take()
    await ends.say(b"x")
    await there.bridge.tasks.Cancel(pb.CancelRequest(task_id=ends.task_id), metadata=there.bridge.auth)
    # The node ends its own side, as it is told on Execute.
    await until(lambda: node.cancelled == [f"{ends.task_id}.1"])
    ends.node.cancel()
    assert await ends.caller.read() is grpc.aio.EOF


async def test_node_does_not_wait_long_for_a_caller_who_has_gone(
    there: House, node: Node, workspace: workspace_pb2.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnels, "CONNECT_LIMIT_S", 0.05)
    await there.bridge.schedule(request(workspace, streamed=True))
    (start,) = await node.started()
    ends = Ends(there, node, start.attempt_id.rpartition(".")[0])
    await ends.open()
    with refused(*NOT_FOUND, "has gone"):
        await ends.node.read()


async def test_attempt_that_was_given_up_has_no_connection(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    ends = Ends(there, node, "20240101_00_00_00_00000000000000000000")
    await ends.open()
    with refused(*NOT_FOUND, "given up"):
        await ends.node.read()


# What is kept.


async def test_long_bodies_are_kept_until_they_have_been_passed_on(
    there: House, node: Node, workspace: workspace_pb2.Workspace
) -> None:
    task_ids = []
    for size, said_streamed in ((100_000, True), (200_000, True), (200_001, True), (300_000, False)):
        task_id = (await there.bridge.schedule(request(workspace, streamed=said_streamed))).task.task_id
        (start,) = await node.started()
        delivery = Delivery(node, start.attempt_id)
        await delivery.begin()
        for at in range(0, size, 200_000):
            await delivery.send(at, BODY[at : min(size, at + 200_000)], last=at + 200_000 >= size)
        node.end(answered(start.attempt_id, size=size))
        assert await state(there, task_id) == "COMPLETED"
        await until(lambda: not node.ended)
        task_ids.append(task_id)

    store = await Store.open(f"sqlite:///{there.state_dir / 'ngpu.db'}")
    bodies = await Bodies.open(there.state_dir / "bodies")
    now = datetime.now(UTC)
    retention = Retention(store, bodies, bodies_s=7 * 86400, uploads_s=3600, recorded_bytes=150_000, clock=lambda: now)

    async def kept() -> list[bool]:
        await retention.drop_passed_on()
        return [await bodies.size(f"{task_id}.1.response") is not None for task_id in task_ids]

    assert await kept() == [True, True, True, True]
    now += timedelta(minutes=1)
    reading = bodies.follow(f"{task_ids[1]}.1.response")
    await anext(reading)
    assert await kept() == [True, True, False, True]
    await reading.aclose()
    assert await kept() == [True, False, False, True]
    await bodies.close()
    await store.close()

    with refused(grpc.StatusCode.FAILED_PRECONDITION, "EXPIRED"):
        await left(watch(there.bridge, task_ids[1]))
    assert said(await left(watch(there.bridge, task_ids[0])))[-1] == "COMPLETED"
