"""Pulls in flight: replicas that need the same image at the same time share one."""

import asyncio
from collections.abc import Callable

from nodedaemon.engine import Credentials, Engine

#: Images pulled at the same time; more only share the same bandwidth and disk.
AT_ONCE = 3

Progress = Callable[[int], None]


class _Pull:
    def __init__(self) -> None:
        self.task: asyncio.Task[str]
        self.percent = 0
        self.listeners: list[Progress] = []

    def tell(self, percent: int) -> None:
        """Rising only, whatever the engine says."""
        if percent > self.percent:
            self.percent = percent
            for listener in self.listeners:
                listener(percent)


class Pulls:
    """One pull per image and credentials. It goes on for as long as anybody waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[tuple[str, Credentials | None], _Pull] = {}
        self._room = asyncio.Semaphore(AT_ONCE)

    async def pull(self, image: str, credentials: Credentials | None, progress: Progress) -> str:
        """As Engine.pull."""
        key = (image, credentials)
        shared = self._running.get(key)
        if shared is None:
            shared = self._running[key] = _Pull()
            shared.task = asyncio.create_task(self._do(image, credentials, shared), name=f"pull {image}")
            shared.task.add_done_callback(lambda _: self._forget(key, shared))
        shared.listeners.append(progress)
        progress(shared.percent)
        try:
            # One waiter that gives up must not end it for the others.
            return await asyncio.shield(shared.task)
        finally:
            shared.listeners.remove(progress)
            if not shared.listeners and not shared.task.done():
                # Forgotten first: whoever comes now begins a new one, and is not cancelled with this one.
                self._forget(key, shared)
                shared.task.cancel()
                await asyncio.gather(shared.task, return_exceptions=True)

    def _forget(self, key: tuple[str, Credentials | None], shared: _Pull) -> None:
        if self._running.get(key) is shared:
            del self._running[key]

    async def _do(self, image: str, credentials: Credentials | None, shared: _Pull) -> str:
        async with self._room:
            return await self._engine.pull(image, credentials, shared.tell)
