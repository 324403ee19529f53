"""What waits for a node leaves in few and small frames, in an order that harms nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from ngpu import wire
from ngpu.v1 import node_pb2

from controlplane.api.execute import Outbox
from controlplane.api.gate import Stream
from controlplane.errors import Unavailable
from controlplane.slots import Request, Start
from tests.wire.house import until


class Reader(Stream[node_pb2.ExecuteRequest, node_pb2.ExecuteResponse]):
    """A node that reads as long as `reads` is set."""

    def __init__(self) -> None:
        super().__init__(None)
        self.frames: list[node_pb2.ExecuteResponse] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def write(self, message: node_pb2.ExecuteResponse) -> None:
        self.frames.append(message)
        await self.reads.wait()


def start(number: int, body: bytes = b"") -> Start:
    return Start(f"t.{number}", "r-1", 80, Request("GET", "/", body=body, size=len(body)), 1.0, 1)


@asynccontextmanager
async def drained(outbox: Outbox) -> AsyncIterator[Reader]:
    reader = Reader()
    writing = asyncio.create_task(outbox.write_all(reader))
    try:
        yield reader
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_whatever_waits_shares_a_frame() -> None:
    outbox = Outbox()
    for number in range(3):
        outbox.start(start(number))
    outbox.cancel("t.9")
    outbox.ack("t.8")
    async with drained(outbox) as reader:
        await until(lambda: len(reader.frames) == 1)
        (frame,) = reader.frames
        assert [one.attempt_id for one in frame.starts] == ["t.0", "t.1", "t.2"]
        assert (list(frame.cancels), list(frame.acks)) == (["t.9"], ["t.8"])


async def test_frames_have_at_most_so_many_items_and_bytes() -> None:
    outbox = Outbox()
    for number in range(300):
        outbox.start(start(number))
        outbox.cancel(f"c.{number}")
        outbox.ack(f"a.{number}")
    async with drained(outbox) as reader:
        await until(lambda: sum(len(frame.acks) for frame in reader.frames) == 300)
        assert all(
            len(frame.starts) + len(frame.cancels) + len(frame.acks) <= wire.BATCH_ITEMS for frame in reader.frames
        )
        # A start is never behind what speaks of it.
        assert [len(frame.starts) for frame in reader.frames][:2] == [256, 44]
        assert not reader.frames[0].cancels
        reader.frames.clear()
        for number in range(9):
            outbox.start(start(number, b"x" * wire.INLINE_BYTES))
        await until(lambda: sum(len(frame.starts) for frame in reader.frames) == 9)
        assert max(frame.ByteSize() for frame in reader.frames) < wire.BATCH_BYTES + wire.INLINE_BYTES


async def test_acknowledgements_ride_with_the_next_start_or_leave_soon() -> None:
    outbox = Outbox()
    async with drained(outbox) as reader:
        outbox.ack("t.1")
        outbox.start(start(2))
        await until(lambda: len(reader.frames) == 1)
        assert list(reader.frames[0].acks) == ["t.1"]
        outbox.ack("t.2")
        outbox.ack("t.3")
        await until(lambda: len(reader.frames) == 2)
        assert list(reader.frames[1].acks) == ["t.2", "t.3"]


async def test_what_a_node_cannot_have_heard_of_is_known() -> None:
    outbox = Outbox()
    async with drained(outbox) as reader:
        reader.reads.clear()
        outbox.start(start(1))
        await until(lambda: len(reader.frames) == 1)
        outbox.start(start(2))
        assert outbox.unsent() == ["t.2"]


async def test_node_that_does_not_read_loses_its_stream() -> None:
    outbox = Outbox(room=10)
    for number in range(11):
        outbox.cancel(f"t.{number}")
    with pytest.raises(Unavailable):
        await outbox.write_all(Reader())
