"""Deletes bodies whose time is over: of tasks that ended long ago, and uploads that no task took."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

import structlog

from controlplane.bodies import Bodies
from controlplane.errors import Unavailable
from controlplane.store import Store

#: How often, in seconds.
EVERY_S: Final = 60.0
#: A body that no row names (a crash between the two) is deleted this long after its time: no task lives so long.
ORPHAN_TIME: Final = timedelta(days=30)

_log = structlog.get_logger(__name__)


class Retention:
    """`bodies_s` after a task's end its bodies go; `uploads_s` after its last byte an upload that no task took."""

    def __init__(
        self, store: Store, bodies: Bodies, *, bodies_s: float, uploads_s: float, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._bodies = bodies
        self._bodies_time = timedelta(seconds=bodies_s)
        self._uploads_time = timedelta(seconds=uploads_s)
        self._clock = clock

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            try:
                await self.sweep()
            except Unavailable as error:
                _log.warning("retention_failed", error=str(error))
            await asyncio.sleep(EVERY_S)

    async def sweep(self) -> None:
        """Delete what is due. Bodies before rows: a crash between the two leaves nothing behind. Raises Unavailable."""
        now = self._clock()
        await self._bodies.sweep(now - self._uploads_time, prefix="upload-")
        await self._bodies.sweep(now - self._bodies_time - ORPHAN_TIME)
        while due := await self._store.expirable_tasks(now - self._bodies_time):
            names = [f"{task_id}.request" for task_id, _ in due]
            names += [f"{task_id}.{number}.response" for task_id, last in due for number in range(1, last + 1)]
            await self._bodies.delete(*names)
            await self._store.expire_bodies([task_id for task_id, _ in due], now)
