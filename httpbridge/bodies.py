"""Reading what a caller sends, within limits of size, time and memory.

A body that is small, or has no large string to be passed on as it comes (see `opening`), is held whole, because its
payload has to be taken out of its envelope. What all bodies over 64 KiB may hold together is therefore one number, the
budget; a call that finds it used up is told to come again, its body unread.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from math import inf
from typing import Final

from aiohttp import StreamReader, web
from ngpu import wire

from httpbridge.errors import BadRequest, SlowClient, TooLarge, Unavailable

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Budget:
    """Bytes of bodies that may be held at once."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0

    def hold(self) -> "Hold":
        """Nothing yet; the hold gives back what it took when it is left."""
        return Hold(self)


class Hold:
    """What one call holds of the budget, as a context."""

    __slots__ = ("_budget", "_bytes")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._bytes = 0

    def grow_to(self, size: int) -> None:
        """Hold `size` bytes at least. Raises Unavailable if that is more than is left."""
        budget = self._budget
        more = max(0, size - self._bytes)
        if budget.used_bytes + more > budget.total_bytes:
            raise Unavailable("Too many large bodies are under way; try again soon")
        budget.used_bytes += more
        self._bytes += more

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.used_bytes -= self._bytes
        self._bytes = 0


class BodyReader:
    """Reads bodies of at most `limit_bytes`; gives one up that stalls for `stall_limit_s` or takes `total_limit_s`."""

    def __init__(self, *, limit_bytes: int, stall_limit_s: float, total_limit_s: float) -> None:
        self._limit_bytes = limit_bytes
        self._stall_limit_s = stall_limit_s
        self._total_limit_s = total_limit_s

    async def read(self, request: web.BaseRequest, hold: Hold) -> bytes | bytearray:
        """The whole body, its size taken from `hold` if it is large.

        Raises TooLarge (without reading anything, where Content-Length tells), SlowClient, Unavailable, BadRequest.
        """
        length = request.content_length
        if length is not None:
            self._admit(length, hold)
        content = request.content
        # Often the body came in the packet of its head.
        if content.is_eof():
            body = content.read_nowait(-1)
            self._admit(len(body), hold)
            return body
        await _ask_for(request)
        try:
            async with asyncio.timeout(self._total_limit_s):
                return await self._gather(content, hold)
        except TimeoutError:
            raise SlowClient from None
        except web.RequestPayloadError as error:
            raise BadRequest(f"The body is not valid HTTP: {error}") from None

    async def _gather(self, content: StreamReader, hold: Hold) -> bytearray:
        # Grows in place; a list of chunks would have to be copied to become one, and be held twice for that moment.
        body = bytearray()
        while True:
            async with asyncio.timeout(self._stall_limit_s):
                chunk = await content.readany()
            if not chunk and content.at_eof():
                return body
            self._admit(len(body) + len(chunk), hold)
            body += chunk

    async def pieces(self, request: web.BaseRequest) -> AsyncGenerator[bytes, None]:
        """The body as it comes, in pieces of at most wire.CHUNK_BYTES: for who keeps none of it, so without its limits.

        Raises SlowClient, BadRequest.
        """
        async for piece in self._pieces(request, inf):
            yield piece

    async def limited_pieces(self, request: web.BaseRequest) -> AsyncGenerator[bytes, None]:
        """The same with the limits of size and time. Raises TooLarge, SlowClient, BadRequest."""
        self.check(request.content_length or 0)
        size = 0
        async for piece in self._pieces(request, self._total_limit_s):
            size += len(piece)
            self.check(size)
            yield piece

    async def hold(self, begun: bytes, rest: AsyncIterator[bytes], hold: Hold) -> bytearray:
        """The whole of a body that has begun to come, its size taken from `hold`. Raises Unavailable besides."""
        body = bytearray(begun)
        async for piece in rest:
            self._admit(len(body) + len(piece), hold)
            body += piece
        return body

    async def _pieces(self, request: web.BaseRequest, limit_s: float) -> AsyncGenerator[bytes, None]:
        await _ask_for(request)
        content = request.content
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while True:
            try:
                async with asyncio.timeout_at(min(end, loop.time() + self._stall_limit_s)):
                    chunk = await content.readany()
            except TimeoutError:
                raise SlowClient from None
            except web.RequestPayloadError as error:
                raise BadRequest(f"The body is not valid HTTP: {error}") from None
            if not chunk and content.at_eof():
                return
            for at in range(0, len(chunk), wire.CHUNK_BYTES):
                yield chunk[at : at + wire.CHUNK_BYTES]

    def check(self, size: int) -> None:
        """Raises TooLarge."""
        if size > self._limit_bytes:
            raise TooLarge(f"The body is larger than {self._limit_bytes} bytes, the most that is taken here")

    def _admit(self, size: int, hold: Hold) -> None:
        self.check(size)
        if size > wire.INLINE_BYTES:
            hold.grow_to(size)


async def _ask_for(request: web.BaseRequest) -> None:
    """Let a caller begin who waits to be asked for the body."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(_CONTINUE)
        # aiohttp takes a writer that has written for a response that has begun.
        request.writer.output_size = 0
