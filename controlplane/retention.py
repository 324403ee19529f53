"""Deletes bodies whose time is over: of tasks that ended long ago, uploads no task took, what was only passed on.

And beginnings of responses that there will never be. Mostly they go with their attempt (see api/execute.py); here those
of attempts of which nothing was heard any more, and what a crash left behind.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import Final

import structlog

from controlplane import ids
from controlplane.bodies import Bodies
from controlplane.errors import Unavailable
from controlplane.model import ENDED, EPOCH
from controlplane.store import Store

#: How often, in seconds.
EVERY_S: Final = 60.0
#: The same for bodies that were only passed on, of which there may be many ...
PASSED_ON_EVERY_S: Final = 10.0
#: ... so long after their task's end: by then its caller has them, or is reading them.
PASSED_ON_TIME: Final = timedelta(seconds=30)
#: An unfinished response that nobody has written to for so long is looked at.
UNFINISHED_TIME: Final = timedelta(seconds=60)
#: A body that no row names (a crash between the two) is deleted this long after its time: no task lives so long.
ORPHAN_TIME: Final = timedelta(days=30)

_log = structlog.get_logger(__name__)


class Retention:
    """`bodies_s` after a task's end its bodies go; `uploads_s` after its last byte an upload that no task took.

    Of a streamed task those over `recorded_bytes` go as soon as they have been passed on.
    """

    def __init__(
        self,
        store: Store,
        bodies: Bodies,
        *,
        bodies_s: float,
        uploads_s: float,
        recorded_bytes: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._bodies = bodies
        self._recorded_bytes = recorded_bytes
        # Streamed tasks that ended before this have been seen to; a new process looks at all there are.
        self._passed_on = EPOCH
        self._bodies_time = timedelta(seconds=bodies_s)
        self._uploads_time = timedelta(seconds=uploads_s)
        self._clock = clock

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_again(self.sweep, EVERY_S), name="retention: sweep")
            group.create_task(_again(self.drop_passed_on, PASSED_ON_EVERY_S), name="retention: passed on")

    async def sweep(self) -> None:
        """Delete what is due. Bodies before rows: a crash between the two leaves nothing behind. Raises Unavailable."""
        now = self._clock()
        await self._bodies.sweep(now - self._uploads_time, prefix="upload-")
        await self._bodies.sweep(now - self._bodies_time - ORPHAN_TIME)
        async with aclosing(self._bodies.unfinished(now - UNFINISHED_TIME)) as unfinished:
            async for names in unfinished:
                await self._bodies.delete(*[name for name in names if await self._is_over(name)])
        while due := await self._store.expirable_tasks(now - self._bodies_time):
            names = [f"{task_id}.request" for task_id, _ in due]
            names += [f"{task_id}.{number}.response" for task_id, last in due for number in range(1, last + 1)]
            await self._bodies.delete(*names)
            await self._store.expire_bodies([task_id for task_id, _ in due], now)

    async def _is_over(self, name: str) -> bool:
        """It is the response of an attempt that has ended."""
        attempt_id, _, part = name.rpartition(".")
        try:
            task_id, number = ids.split_attempt_id(attempt_id)
        except ValueError:
            return False
        if part != "response":
            return False
        task = await self._store.task(task_id)
        return task is None or task.state in ENDED or task.attempt != number

    async def drop_passed_on(self) -> None:
        """Delete what streamed tasks have left that is longer than is recorded. Raises Unavailable.

        Their rows stay as they are: a body that they speak of and that is not there is past its retention.
        """
        since, before = self._passed_on, self._clock() - PASSED_ON_TIME
        # The end of the first task whose body is being read: next time it is looked at again, with all after it.
        read: datetime | None = None
        while passed := await self._store.tasks_passed_on(since, before):
            names = []
            for task in passed:
                bodies = (
                    (f"{task.task_id}.request", task.request_size),
                    (f"{task.task_id}.{task.attempt}.response", task.response_size),
                )
                long = [name for name, size in bodies if size > self._recorded_bytes]
                if any(map(self._bodies.is_read, long)):
                    read = read or since
                else:
                    names += long
                since = task.end_time
            await self._bodies.delete(*names)
        self._passed_on = read or since


async def _again(sweep: Callable[[], Awaitable[None]], every_s: float) -> None:
    while True:
        try:
            await sweep()
        except Unavailable as error:
            _log.warning("retention_failed", error=str(error))
        await asyncio.sleep(every_s)
