"""Many deadlines and one timer: nearly all of them are removed before their time, and need not have been one."""

import asyncio
import time
from collections.abc import Callable
from math import inf

Call = Callable[[str], None]


class Deadlines:
    """What is to be called when, by key. To be used in the event loop's thread."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[float, Call]] = {}
        self._timer: asyncio.TimerHandle | None = None
        #: When the timer looks; never later than the first deadline.
        self._look_at = inf

    def set(self, key: str, after_s: float, call: Call) -> None:
        """Call, with the key, so many seconds from now, unless the key is removed before."""
        at = time.monotonic() + after_s
        self._calls[key] = at, call
        if at < self._look_at:
            if self._timer is not None:
                self._timer.cancel()
            self._look_at = at
            self._timer = asyncio.get_running_loop().call_later(after_s, self._look)

    def remove(self, key: str) -> None:
        """No error if it is not there."""
        self._calls.pop(key, None)

    def _look(self) -> None:
        now = time.monotonic()
        due = [key for key, (at, _) in self._calls.items() if at <= now]
        calls = [(self._calls.pop(key)[1], key) for key in due]
        self._look_at = min((at for at, _ in self._calls.values()), default=inf)
        self._timer = None
        if self._calls:
            self._timer = asyncio.get_running_loop().call_later(self._look_at - now, self._look)
        for call, key in calls:
            call(key)
