"""Responses on their way from a node to the body store: their heads, and which are complete.

In memory only: after a restart the node says the head again and goes on from the byte that the body store has.
"""

import asyncio
from collections import OrderedDict
from typing import Final

from controlplane.slots import Response

#: Deliveries remembered; past it the oldest is forgotten, which costs its watchers the head until the task's end.
REMEMBERED: Final = 10_000


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
