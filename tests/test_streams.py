"""A stream that is given up leaves no read of gRPC's behind."""

import asyncio
from typing import Any

import grpc
import pytest
from ngpu import streams


class Call:
    """A call as gRPC's: what is read comes when `send` is called; cancelled, a read ends."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[Any] = asyncio.Queue()
        self.reads_under_way = 0
        self.reads_cancelled_from_outside = 0
        self.cancelled = asyncio.Event()

    async def read(self) -> Any:
        self.reads_under_way += 1
        waits = [asyncio.ensure_future(self.news.get()), asyncio.ensure_future(self.cancelled.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.reads_cancelled_from_outside += 1
            raise
        finally:
            self.reads_under_way -= 1
            for wait in waits:
                wait.cancel()
        if self.cancelled.is_set():
            raise asyncio.CancelledError
        return waits[0].result()

    def cancel(self) -> bool:
        self.cancelled.set()
        return True


async def test_messages_are_read_to_the_end() -> None:
    call: Any = Call()
    for message in ("a", "b", grpc.aio.EOF):
        call.news.put_nowait(message)
    assert [message async for message in streams.messages(call)] == ["a", "b"]


async def test_a_reader_who_is_cancelled_cancels_the_call_and_not_the_read() -> None:
    call = Call()
    reader = asyncio.create_task(streams.read(call))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert call.reads_under_way == 1
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert call.cancelled.is_set()
    assert (call.reads_under_way, call.reads_cancelled_from_outside) == (0, 0)
