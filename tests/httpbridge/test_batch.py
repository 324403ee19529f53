"""The Batch stream: what shares a frame, what becomes of calls when it breaks, and how it comes back."""

import asyncio
from collections.abc import Awaitable

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import task_pb2 as pb

from httpbridge.batch import Batch, Waiting
from httpbridge.errors import Unavailable
from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import Answer, Exchange, FakeControlPlane

REQUEST = pb.ScheduleRequest(workspace_id="1")


class FakeStream:
    """A bidirectional call whose other end is the test."""

    def __init__(self) -> None:
        self.sent: list[pb.BatchRequest] = []
        self.incoming: asyncio.Queue[object] = asyncio.Queue()
        self.writable = asyncio.Event()
        self.writable.set()
        self.broken: Exception | None = None
        self.cancelled = False

    async def read(self) -> object:
        frame = await self.incoming.get()
        if isinstance(frame, BaseException):
            raise frame
        return frame

    async def write(self, request: pb.BatchRequest) -> None:
        if self.broken is not None:
            raise self.broken
        self.sent.append(request)
        await self.writable.wait()

    def cancel(self) -> bool:
        if not self.cancelled:
            self.cancelled = True
            self.incoming.put_nowait(asyncio.CancelledError())
        return True

    def answer(self, *call_ids: int) -> None:
        self.incoming.put_nowait(pb.BatchResponse(answers=[pb.Answer(id=call_id) for call_id in call_ids]))


class Streams:
    """Opens one FakeStream after another."""

    def __init__(self) -> None:
        self.opened: list[FakeStream] = []

    async def open(self) -> FakeStream:
        self.opened.append(FakeStream())
        return self.opened[-1]


def asked(waiting: Waiting) -> "asyncio.Task[pb.Answer]":
    async def wait() -> pb.Answer:
        return await waiting

    return asyncio.create_task(wait())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def running(batch: Batch) -> "asyncio.Task[None]":
    task = asyncio.create_task(batch.run())
    await settle()
    assert batch.is_up
    return task


async def stopped(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_waits_shares_a_frame_and_answers_come_in_any_order() -> None:
    streams = Streams()
    batch = Batch(streams.open)
    run = await running(batch)
    [stream] = streams.opened
    stream.writable.clear()
    calls = [asked(batch.schedule(REQUEST, limit_s=60)) for _ in range(1000)]
    await settle()
    # The first write holds what was there; the rest waits for it, in frames that are full but for the last.
    stream.writable.set()
    await settle()
    assert [len(frame.calls) for frame in stream.sent] in ([256, 256, 256, 232], [1000 - 999, 256, 256, 256, 231])
    assert batch.in_flight == 1000
    ids = [call.id for frame in stream.sent for call in frame.calls]
    assert ids == list(range(1, 1001))
    stream.answer(*reversed(ids))
    assert [answer.id for answer in await asyncio.gather(*calls)] == ids
    assert (batch.in_flight, batch.calls_sent, batch.frames_sent) == (0, 1000, len(stream.sent))
    await stopped(run)


async def test_a_frame_is_full_at_its_bytes_too() -> None:
    streams = Streams()
    batch = Batch(streams.open)
    run = await running(batch)
    request = pb.ScheduleRequest(workspace_id="1")
    request.request.body.inline = b"x" * wire.INLINE_BYTES
    calls = [asked(batch.schedule(request, limit_s=60)) for _ in range(9)]
    await settle()
    sizes = [frame.ByteSize() for frame in streams.opened[0].sent]
    assert sum(len(frame.calls) for frame in streams.opened[0].sent) == 9
    assert max(sizes) < wire.BATCH_BYTES + 2 * wire.INLINE_BYTES < wire.MESSAGE_BYTES
    streams.opened[0].answer(*range(1, 10))
    await asyncio.gather(*calls)
    await stopped(run)


async def test_there_is_an_end_to_calls_without_an_answer() -> None:
    streams = Streams()
    batch = Batch(streams.open, outstanding=2)
    run = await running(batch)
    calls = [asked(batch.schedule(REQUEST, limit_s=60)) for _ in range(2)]
    await settle()
    with pytest.raises(Unavailable, match="Too many calls"):
        await batch.schedule(REQUEST, limit_s=60)
    streams.opened[0].answer(1, 2)
    await asyncio.gather(*calls)
    await stopped(run)


async def test_who_no_longer_waits_is_reported_once() -> None:
    streams = Streams()
    batch = Batch(streams.open)
    run = await running(batch)
    call = asked(batch.query(pb.QueryRequest(task_id="t"), limit_s=60))
    await settle()
    await stopped(call)  # type: ignore[arg-type]
    await settle()
    stream = streams.opened[0]
    assert [list(frame.abandoned) for frame in stream.sent] == [[], [1]]
    # Its answer may already be on the way.
    stream.answer(1)
    await settle()
    assert batch.in_flight == 0
    assert batch.is_up
    await stopped(run)


async def test_caller_of_a_task_who_has_gone_is_told_of_as_such_and_not_as_a_cancel() -> None:
    streams = Streams()
    batch = Batch(streams.open)
    run = await running(batch)
    batch.call_off("t")
    await settle()
    [frame] = streams.opened[0].sent
    assert [call.cancel for call in frame.calls] == [pb.CancelRequest(task_id="t", hangup=True)]
    # Nobody waits for its answer.
    assert batch.in_flight == 0
    streams.opened[0].answer(1)
    await settle()
    assert batch.is_up
    await stopped(run)


async def test_who_goes_before_his_call_is_sent_has_never_called() -> None:
    streams = Streams()
    batch = Batch(streams.open)
    run = await running(batch)
    [stream] = streams.opened
    stream.writable.clear()
    calls = [asked(batch.schedule(REQUEST, limit_s=60)) for _ in range(1)]
    await settle()
    calls += [asked(batch.schedule(REQUEST, limit_s=60)) for _ in range(600)]
    await settle()
    for index in (3, 300, 590):
        await stopped(calls[index])  # type: ignore[arg-type]
    stream.writable.set()
    await settle()
    assert [call.id for frame in stream.sent for call in frame.calls] == sorted({*range(1, 602)} - {4, 301, 591})
    assert [call_id for frame in stream.sent for call_id in frame.abandoned] == []
    stream.answer(*range(1, 602))
    await asyncio.gather(*calls, return_exceptions=True)
    await stopped(run)


async def test_an_answer_that_does_not_come() -> None:
    streams = Streams()
    batch = Batch(streams.open)
    run = await running(batch)
    with pytest.raises(Unavailable, match="did not answer in time"):
        await batch.cancel(pb.CancelRequest(task_id="t"), limit_s=0)
    await settle()
    assert list(streams.opened[0].sent[-1].abandoned) == [1]
    await stopped(run)


@pytest.mark.parametrize(
    "end",
    [grpc.aio.EOF, grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")],
)
async def test_a_broken_stream_ends_its_calls_and_nothing_of_it_reaches_the_next(end: object) -> None:
    streams = Streams()
    batch = Batch(streams.open, chance=lambda: 0.0)
    run = await running(batch)
    first = streams.opened[0]
    first.writable.clear()
    calls = [asked(batch.schedule(REQUEST, limit_s=60)) for _ in range(3)]
    await settle()
    late = asked(batch.schedule(REQUEST, limit_s=60))
    await settle()
    first.incoming.put_nowait(end)
    for call in (*calls, late):
        with pytest.raises(Unavailable, match="Idempotency-Key") as caught:
            await call
        assert caught.value.headers["Retry-After"] == "1"
    assert first.cancelled
    with pytest.raises(Unavailable, match="cannot be reached"):
        await batch.schedule(REQUEST, limit_s=60)
    while not batch.is_up:
        await asyncio.sleep(0.01)
    await settle()
    assert streams.opened[1].sent == []
    call = asked(batch.schedule(REQUEST, limit_s=60))
    await settle()
    assert [call.id for frame in streams.opened[1].sent for call in frame.calls] == [5]
    streams.opened[1].answer(5)
    assert (await call).id == 5
    await stopped(run)


async def test_a_writer_that_dies_takes_the_stream_along() -> None:
    streams = Streams()
    batch = Batch(streams.open, chance=lambda: 0.0)
    run = await running(batch)
    streams.opened[0].broken = ValueError("cannot be serialised")
    with pytest.raises(Unavailable):
        await batch.schedule(REQUEST, limit_s=60)
    while len(streams.opened) < 2:
        await asyncio.sleep(0.01)
    assert not run.done()
    await stopped(run)


async def test_pauses_grow_to_a_limit() -> None:
    attempts = 0
    pauses: list[float] = []

    def refuse() -> Awaitable[FakeStream]:
        nonlocal attempts
        attempts += 1
        metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAUTHENTICATED, metadata, metadata, "unknown token")

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 8:
            raise asyncio.CancelledError

    batch = Batch(refuse, chance=lambda: 1.0, sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        await batch.run()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert attempts == 8


async def test_the_control_plane_goes_and_comes_back(bridge: Bridge, fake: FakeControlPlane) -> None:
    reached = asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    fake.container = container
    call = asyncio.create_task(bridge.post("/user/x", json={}, headers=BEARER))
    await reached.wait()
    assert (await bridge.get("/readyz"))[0] == 200
    await fake.stop()
    status, answer, headers = await call
    assert (status, answer["result_code"], headers["Retry-After"]) == (503, 503, "1")
    for path in ("/readyz", "/user/queryTask?taskID=20240415_14_30_09_1", "/user/queryTaskList", "/user/queryNodes"):
        status, answer, headers = await bridge.get(path, headers=BEARER)
        assert (status, answer["result_code"], headers["Retry-After"]) == (503, 503, "1"), path
        # gRPC's own words are no words for callers.
        assert "errno" not in answer["msg"].lower()
    assert (await bridge.get("/healthz"))[0] == 200
    await fake.start()
    while (await bridge.get("/readyz"))[0] != 200:
        await asyncio.sleep(0.02)
    fake.container = FakeControlPlane().container
    status, answer, _ = await bridge.post("/user/x", json={"data": "again"}, headers=BEARER)
    assert (status, answer["data"]) == (200, "again")
    assert fake.batches == 2


async def test_a_token_that_is_not_accepted(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    fake.token = "another"
    bridge = await start_bridge(connected=False)
    status, answer, _ = await bridge.get("/user/queryNodes", headers=BEARER)
    # Not the caller's fault, so no 401.
    assert (status, answer["result_code"]) == (503, 503)
    assert "token" in answer["msg"]
    fake.token = "bridge-token"
    while (await bridge.get("/user/queryNodes", headers=BEARER))[0] != 200:
        await asyncio.sleep(0.02)
