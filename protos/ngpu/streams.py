"""Reading a gRPC stream that may be given up at any moment, without leaving anything behind.

Where a task is cancelled within gRPC's own `read`, what arrives for that read is never freed: 60 KiB each time, with
grpcio 1.85. Here it is the call that is cancelled, and the read ends by itself.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol, TypeVar, cast

import grpc

Message = TypeVar("Message")


class Stream(Protocol):
    """A call whose answers are a stream; generic in name only, as grpc's own types are."""

    async def read(self) -> Any:
        """The next message, or grpc.aio.EOF."""

    def cancel(self) -> bool:
        """End it."""


async def read(call: Stream) -> Any:
    """`call.read()`: the next message, or grpc.aio.EOF. A caller who is cancelled has cancelled the call."""
    reading = asyncio.ensure_future(call.read())
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        call.cancel()
        await asyncio.wait([reading])
        if not reading.cancelled():
            reading.exception()  # nobody wants to hear it
        raise


async def messages(call: "grpc.aio.UnaryStreamCall[Any, Message]") -> AsyncGenerator[Message, None]:
    """All messages, to the end. Close it, or cancel the call, to give it up."""
    while (message := await read(call)) is not grpc.aio.EOF:
        yield cast("Message", message)
