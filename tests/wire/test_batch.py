"""Batch: many calls and answers in one frame each way, each with its own fate."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from ngpu import wire
from ngpu.v1 import http_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from tests.wire.house import DEADLINE_S, POOR, RICH, Client, House, check_words, refused, request, seconds, until
from tests.wire.node import Node, answered, hold


class Batch:
    """A Batch stream that is read all the time; answers by the call's id."""

    def __init__(self, client: Client) -> None:
        self.call: Any = client.tasks.Batch(metadata=client.auth, timeout=DEADLINE_S)
        self.answers: dict[int, pb.Answer] = {}
        self.frames: list[int] = []
        self._reader = asyncio.create_task(self._read(), name="batch")

    async def _read(self) -> None:
        while (frame := await self.call.read()) is not grpc.aio.EOF:
            self.frames.append(len(frame.answers))
            for answer in frame.answers:
                assert answer.id not in self.answers, "answered twice"
                self.answers[answer.id] = answer

    async def send(self, *calls: pb.Call, abandoned: list[int] | None = None) -> None:
        await self.call.write(pb.BatchRequest(calls=calls, abandoned=abandoned or []))

    async def answer(self, number: int) -> pb.Answer:
        await until(lambda: number in self.answers or self._reader.done())
        if number not in self.answers:
            self._reader.result()
        return self.answers[number]

    async def ended(self) -> None:
        """Wait until the server has ended the stream; raises its error."""
        await self._reader

    async def close(self) -> None:
        self.call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


@asynccontextmanager
async def batch(client: Client) -> AsyncIterator[Batch]:
    stream = Batch(client)
    try:
        yield stream
    finally:
        await stream.close()


def schedule(number: int, message: pb.ScheduleRequest) -> pb.Call:
    return pb.Call(id=number, schedule=message)


def ask(number: int, task_id: str, wait_s: float = 0.0, **fields: Any) -> pb.Call:
    return pb.Call(id=number, query=pb.QueryRequest(task_id=task_id, wait=seconds(wait_s), **fields))


async def test_many_calls_share_frames(there: House, node: Node) -> None:
    workspace = await there.operator.workspace(concurrency=64)
    await there.operator.ready("echo")
    async with batch(there.bridge) as stream:
        calls = [schedule(n, request(workspace, body=str(n).encode(), wait_s=10)) for n in range(500)]
        for start in range(0, 500, 100):
            await stream.send(*calls[start : start + 100])
        await until(lambda: len(stream.answers) == 500)
        for number, answer in stream.answers.items():
            assert answer.schedule.response.body.inline == str(number).encode()
            assert answer.schedule.task.state == pb.TASK_STATE_COMPLETED
        assert max(stream.frames) <= wire.BATCH_ITEMS
        assert len(stream.frames) < 250
        # The caller has no more to say: with all answers given the stream ends well.
        await stream.call.done_writing()
        await stream.ended()


async def test_each_call_has_its_own_error(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    bad = {
        1: (schedule(1, request(workspace, "no path")), "INVALID_ARGUMENT", 3),
        2: (schedule(2, request(route="none")), "NOT_FOUND", 5),
        3: (schedule(3, request(workspace, btc_address=POOR)), "ASSET_MISSING", 7),
        4: (ask(4, "none"), "NOT_FOUND", 5),
        5: (ask(5, "none", 5), "NOT_FOUND", 5),
        6: (pb.Call(id=6, cancel=pb.CancelRequest(task_id="none")), "NOT_FOUND", 5),
        7: (pb.Call(id=7), "INVALID_ARGUMENT", 3),
        8: (ask(8, "none", 5000), "INVALID_ARGUMENT", 3),
    }
    async with batch(there.bridge) as stream:
        await stream.send(*(call for call, _, _ in bad.values()), schedule(9, request(workspace, wait_s=10)))
        for number, (_, reason, code) in bad.items():
            error = (await stream.answer(number)).error
            assert (error.reason, error.code) == (reason, code)
            check_words(error)
        assert (await stream.answer(9)).schedule.response.status == 200
        await stream.send(schedule(10, request(workspace, btc_address=RICH, wait_s=10)))
        assert (await stream.answer(10)).schedule.response.status == 200


async def test_query_and_cancel_ride_along(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(concurrency=2)
    await there.operator.ready("echo")
    async with batch(there.bridge) as stream:
        await stream.send(schedule(1, request(workspace)), schedule(2, request(workspace)))
        first = (await stream.answer(1)).schedule.task.task_id
        second = (await stream.answer(2)).schedule.task.task_id
        await stream.send(ask(3, first), ask(4, first, 10), pb.Call(id=5, cancel=pb.CancelRequest(task_id=second)))
        assert (await stream.answer(3)).query.task.state == pb.TASK_STATE_RUNNING
        assert (await stream.answer(5)).cancel.task.state == pb.TASK_STATE_CANCELLED
        assert 4 not in stream.answers
        node.end(answered(f"{first}.1", b"done"))
        assert (await stream.answer(4)).query.response.body.inline == b"done"


async def test_workspace_asks_only_for_its_own(there: House) -> None:
    mine, other = (
        await there.operator.workspace("mine", replicas=0),
        await there.operator.workspace("other", replicas=0),
    )
    async with batch(there.bridge) as stream:
        await stream.send(schedule(1, request(other)))
        theirs = (await stream.answer(1)).schedule.task.task_id
        await stream.send(
            ask(2, theirs, workspace_id=mine.id),
            ask(3, theirs, workspace_id=other.id),
            ask(4, theirs, 5, workspace_id=mine.id),
        )
        assert (await stream.answer(2)).error.reason == "NOT_FOUND"
        assert (await stream.answer(3)).query.task.task_id == theirs
        assert (await stream.answer(4)).error.reason == "NOT_FOUND"
    async with batch(there.client(mine.id)) as stream:
        await stream.send(
            ask(1, theirs),
            ask(2, theirs, 5),
            pb.Call(id=3, cancel=pb.CancelRequest(task_id=theirs)),
            schedule(4, request(other)),
            schedule(5, request()),
        )
        for number in (1, 2, 3, 4):
            assert (await stream.answer(number)).error.reason == "NOT_FOUND"
        assert (await stream.answer(5)).schedule.task.state == pb.TASK_STATE_QUEUED


async def test_end_of_the_stream_cancels_what_should_be(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(concurrency=3)
    await there.operator.ready("echo")
    async with batch(there.bridge) as stream:
        await stream.send(
            schedule(1, request(workspace, "/cancels", wait_s=15, cancel_on_hangup=True)),
            schedule(2, request(workspace, "/goes/on", wait_s=15)),
            schedule(3, request(workspace, "/abandoned", wait_s=15, cancel_on_hangup=True)),
        )
        attempts = {start.request.path: start.attempt_id for start in await node.started(3)}
        await stream.send(abandoned=[3, 99])
        await until(lambda: node.cancelled == [attempts["/abandoned"]])
    await until(lambda: len(node.cancelled) == 2)
    assert node.cancelled[1] == attempts["/cancels"]
    assert 3 not in stream.answers


async def test_half_closed_stream_gets_its_last_answers(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    async with batch(there.bridge) as stream:
        await stream.send(schedule(1, request(workspace, wait_s=15, cancel_on_hangup=True)))
        await stream.call.done_writing()
        (start,) = await node.started()
        node.end(answered(start.attempt_id, b"late"))
        assert (await stream.answer(1)).schedule.response.body.inline == b"late"
        await stream.ended()
    assert node.cancelled == []


async def test_id_in_use_is_refused(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    async with batch(there.bridge) as stream:
        await stream.send(schedule(1, request(workspace, wait_s=15)))
        await node.started()
        await stream.send(schedule(1, request(workspace, wait_s=15)))
        error = (await stream.answer(1)).error
        assert error.reason == "INVALID_ARGUMENT"
        assert "id" in error.message


async def test_bodies_are_cut_at_64_kib_and_frames_kept_small(there: House, node: Node) -> None:
    workspace = await there.operator.workspace(concurrency=16)
    await there.operator.ready("echo")
    big = b"x" * wire.INLINE_BYTES
    async with batch(there.bridge) as stream:
        for number in range(16):
            await stream.send(schedule(number, request(workspace, body=big, wait_s=15, max_inline_bytes=1_000_000)))
        await stream.send(schedule(16, request(workspace, body=big, wait_s=15, max_inline_bytes=10)))
        await until(lambda: len(stream.answers) == 17)
        for number in range(16):
            assert stream.answers[number].schedule.response.body.inline == big
        assert stream.answers[16].schedule.response.body == http_pb2.Body(size=len(big), is_utf8=True)
        # 256 KiB and the item that passed it.
        assert max(stream.frames) <= 5


async def test_flood_of_unanswered_calls_is_taken_slowly_and_wholly(there: House, node: Node) -> None:
    held: list[str] = []
    node.answer = lambda start: held.append(start.attempt_id)
    workspace = await there.operator.workspace(limits={"queue_length": 10_000}, concurrency=64)
    await there.operator.ready("echo")
    number = wire.BATCH_OUTSTANDING + 500
    async with batch(there.bridge) as stream:
        calls = [schedule(n, request(workspace, wait_s=15)) for n in range(number)]
        for start in range(0, number, 256):
            await stream.send(*calls[start : start + 256])
        detail = there.operator.workspaces

        async def accepted() -> int:
            answer = await detail.GetWorkspace(
                workspace_pb2.GetWorkspaceRequest(workspace="echo"), metadata=there.operator.auth
            )
            return int(answer.workspace.queued_tasks + answer.workspace.running_tasks)

        while await accepted() < wire.BATCH_OUTSTANDING:
            await asyncio.sleep(0)
        assert await accepted() == wire.BATCH_OUTSTANDING
        node.answer = lambda start: answered(start.attempt_id)
        for attempt_id in held:
            node.end(answered(attempt_id))
        await until(lambda: len(stream.answers) == number)


async def test_stop_answers_every_call_before_the_stream_ends(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(concurrency=2)
    await there.operator.ready("echo")
    async with batch(there.bridge) as stream:
        await stream.send(*(schedule(n, request(workspace, wait_s=15)) for n in range(5)))
        await node.started(2)
        there.stop.set()
        for number in range(5):
            error = (await stream.answer(number)).error
            assert error.reason == "UNAVAILABLE"
            assert error.retry_after_ms > 0
        with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"):
            await stream.ended()
