"""Many deadlines and one timer: nearly all of them are removed before their time, and need not have been one."""

import asyncio
from collections.abc import Callable, Hashable
from math import inf

Call = Callable[[], None]


class Deadlines:
    """What is to be called when, by key. To be used in the event loop's thread."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[float, Call]] = {}
        self._timer: asyncio.TimerHandle | None = None
        #: When the timer looks; never later than the first deadline.
        self._look_at = inf

    def set(self, key: Hashable, after_s: float, call: Call) -> None:
        """Call so many seconds from now, unless the key is removed before."""
        loop = asyncio.get_running_loop()
        at = loop.time() + after_s
        self._calls[key] = at, call
        if at < self._look_at:
            if self._timer is not None:
                self._timer.cancel()
            self._look_at = at
            self._timer = loop.call_at(at, self._look)

    def remove(self, key: Hashable) -> None:
        """No error if it is not there."""
        self._calls.pop(key, None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = [key for key, (at, _) in self._calls.items() if at <= now]
        calls = [self._calls.pop(key)[1] for key in due]
        self._look_at = min((at for at, _ in self._calls.values()), default=inf)
        self._timer = None if self._look_at == inf else loop.call_at(self._look_at, self._look)
        for call in calls:
            call()
