"""What has changed since: a version number per key, and a way to wait for the next one.

Level-triggered: a waiter that misses ten changes sees one, with the last version. So nothing queues up here; there is
one number per living key and at most one event per key that somebody waits for.
"""

import asyncio


class Changes:
    """Versions by key. Bounded by the number of living keys: `forget` those that are gone."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._events: dict[str, asyncio.Event] = {}

    def version(self, key: str) -> int:
        """The key's version now; 0 before its first change."""
        return self._versions.get(key, 0)

    def touch(self, key: str) -> None:
        """The key has changed: wakes all who wait for it."""
        self._versions[key] = self._versions.get(key, 0) + 1
        event = self._events.pop(key, None)
        if event is not None:
            event.set()

    def forget(self, key: str) -> None:
        """The key is gone; who waits for it is woken once more."""
        self.touch(key)
        del self._versions[key]

    async def newer(self, key: str, than: int) -> int:
        """The key's version once it differs from `than`, at once if it does. Waits without limit: cancel it."""
        while self.version(key) == than:
            event = self._events.setdefault(key, asyncio.Event())
            await event.wait()
        return self.version(key)
