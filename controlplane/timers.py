"""When something needs attention next: one heap for all, read by one loop; no timer and no task of asyncio per item.

An item has a few entries at most. One that has become superfluous stays until its time, or until there are more of them
than of the living: then the heap is made anew, so that its size is bounded by the number of living items.
"""

from heapq import heapify, heappop, heappush
from math import inf
from typing import Final, Generic, Protocol, TypeVar

#: Do not bother to make the heap anew below this.
SMALL: Final = 1024


class Timed(Protocol):
    """Something that needs attention at times."""

    #: The earliest entry that stands for it; inf: none. Written by Timers only.
    timer: float

    def due(self) -> float:
        """When it needs attention next, in monotonic seconds; inf: never again."""


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """A heap of (when, running number, item)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._number = 0
        self._small = SMALL

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, item: T) -> bool:
        """Heed the item's `due`; to be called whenever that may have become earlier. True if it is now the first.

        A later one needs no call: the old entry finds out by itself.
        """
        when = item.due()
        if when >= item.timer:
            return False
        item.timer = when
        self._number += 1
        heappush(self._heap, (when, self._number, item))
        if len(self._heap) > self._small:
            self._renew()
        return self._heap[0][2] is item

    def pop(self, now: float) -> T | None:
        """An item that is due, or None. Give it its attention, then `set` it."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            when, _, item = heappop(heap)
            if when != item.timer:
                continue  # an earlier entry has been there since
            item.timer = inf
            if item.due() <= now:
                return item
            self.set(item)
        return None

    def next(self) -> float:
        """When to look again; inf: not until something is set."""
        return self._heap[0][0] if self._heap else inf

    def _renew(self) -> None:
        living = []
        for entry in self._heap:
            when, _, item = entry
            if when != item.timer:
                continue
            if item.due() == inf:
                item.timer = inf
            else:
                living.append(entry)
        heapify(living)
        self._heap = living
        self._small = max(SMALL, 2 * len(self._heap))
