"""The network of a simulated node: it can be cut, and then holds back what is said, both ways, until it stands again.

So does TCP for a while. What is held back is not lost, and may come when nobody waits for it any more.
"""

import asyncio
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import grpc

from nodedaemon.dial import Dialler


class Line:
    """Between one node and the control plane. Stands at first."""

    def __init__(self) -> None:
        self._stands = asyncio.Event()
        self._stands.set()

    @property
    def cut_off(self) -> bool:
        """Nothing gets through."""
        return not self._stands.is_set()

    def cut(self) -> None:
        """From now on nothing gets through."""
        self._stands.clear()

    def mend(self) -> None:
        """It stands again."""
        self._stands.set()

    async def stands(self, over: asyncio.Event) -> None:
        """Returns when it does, or the call that waits for it is `over`."""
        if self._stands.is_set() or over.is_set():
            return
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stands, over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class LineDialler(Dialler):
    """Dials over a line."""

    def __init__(self, targets: str, *, line: Line, tls: bool = False, tls_ca: Path | None = None) -> None:
        super().__init__(targets, tls=tls, tls_ca=tls_ca)
        self.line = line

    def _dial(self, target: str) -> grpc.aio.Channel:
        return cast("grpc.aio.Channel", LineChannel(super()._dial(target), self.line))


class LineChannel:
    """As much of grpc.aio.Channel as the daemon needs."""

    def __init__(self, channel: grpc.aio.Channel, line: Line) -> None:
        self._channel = channel
        self._line = line

    async def __aenter__(self) -> "LineChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As grpc.aio.Channel, and so are the others."""
        await self._channel.close()

    async def channel_ready(self) -> None:
        """Once the line stands."""
        await self._line.stands(asyncio.Event())
        await self._channel.channel_ready()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Of the channel itself."""
        return self._channel.get_state(try_to_connect)

    def unary_unary(self, *args: Any, **options: Any) -> Callable[..., "_Answer"]:
        """One answer to one message."""
        method = self._channel.unary_unary(*args, **options)
        return lambda *asked, **how: _Answer(self._line, lambda: method(*asked, **how))

    def unary_stream(self, *args: Any, **options: Any) -> Callable[..., "_Stream"]:
        """A stream of answers to one message."""
        method = self._channel.unary_stream(*args, **options)
        return lambda *asked, **how: _Stream(self._line, method(*asked, **how))

    def stream_stream(self, *args: Any, **options: Any) -> Callable[..., "_Stream"]:
        """A stream each way."""
        method = self._channel.stream_stream(*args, **options)
        return lambda *asked, **how: _Stream(self._line, method(*asked, **how))


class _Answer:
    """A call with one answer: it goes out when the line stands, and the answer comes when it stands again."""

    def __init__(self, line: Line, call: Callable[[], Any]) -> None:
        self._line = line
        self._call = call

    def __await__(self) -> Generator[Any, None, Any]:
        return self._ask().__await__()

    async def _ask(self) -> Any:
        never = asyncio.Event()
        await self._line.stands(never)
        try:
            answer = await self._call()
        except grpc.aio.AioRpcError:
            await self._line.stands(never)
            raise
        await self._line.stands(never)
        return answer


class _Stream:
    """A call with a stream."""

    def __init__(self, line: Line, call: Any) -> None:
        self._line = line
        self._call = call
        self._over = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def cancel(self) -> bool:
        self._over.set()
        return bool(self._call.cancel())

    async def write(self, message: Any) -> None:
        await self._line.stands(self._over)
        await self._call.write(message)

    async def read(self) -> Any:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError:
            await self._line.stands(self._over)
            raise
        await self._line.stands(self._over)
        return message
