"""Responses on their way from a node to the body store: their heads, and which are complete.

In memory only: after a restart the node says the head again and goes on from the byte that the body store has.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Self

from controlplane.slots import Response

#: Deliveries remembered; past it the oldest is forgotten, which costs its watchers the head until the task's end.
REMEMBERED: Final = 10_000

#: A node is told no more often than so, in seconds, how much it has delivered: each word costs as much as a chunk.
SAID_S: Final = 0.02


class Progress:
    """Tells a node how much of a body is stored: at once, if that was not done just before. A context."""

    def __init__(self, write: Callable[[int], Awaitable[None]]) -> None:
        self._write = write
        self._size = 0
        self._over = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    def tell(self, size: int) -> None:
        """So much is stored."""
        self._size = size
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell(), name="delivery-progress")

    async def _tell(self) -> None:
        said = -1
        while said != self._size and not self._over.is_set():
            said = self._size
            try:
                await self._write(said)
            except Exception:
                # gRPC has several for a node that has gone, which its reader finds as well.
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(SAID_S):
                    await self._over.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # Never cancelled: a write that is under way would be in the way of the next.
        self._over.set()
        if self._telling is not None:
            await asyncio.wait({self._telling})


class Deliveries:
    """By attempt id."""

    def __init__(self) -> None:
        self._heads: OrderedDict[str, Response] = OrderedDict()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._events: dict[str, asyncio.Event] = {}

    def begin(self, attempt_id: str, head: Response) -> None:
        """The node has begun to deliver; said again after each reconnect."""
        self._heads[attempt_id] = head
        if len(self._heads) > REMEMBERED:
            self._heads.popitem(last=False)
        event = self._events.pop(attempt_id, None)
        if event is not None:
            event.set()

    def begun(self, attempt_id: str) -> bool:
        """It has something in the body store, complete or not."""
        return attempt_id in self._heads

    def complete(self, attempt_id: str, size: int) -> None:
        """All of it is on disk: `size` bytes."""
        self._sizes[attempt_id] = size
        if len(self._sizes) > REMEMBERED:
            self._sizes.popitem(last=False)

    def size(self, attempt_id: str) -> int | None:
        """How long the complete response is; None: not complete, or not known here any more."""
        return self._sizes.get(attempt_id)

    def forget(self, attempt_id: str) -> None:
        """The attempt has ended."""
        self._heads.pop(attempt_id, None)
        self._sizes.pop(attempt_id, None)

    async def head(self, attempt_id: str) -> Response:
        """The head, once the delivery has begun. Waits without limit: cancel it."""
        while (head := self._heads.get(attempt_id)) is None:
            await self._events.setdefault(attempt_id, asyncio.Event()).wait()
        return head
