"""Under which ids containers work on tasks, brought to the disk: again and again while the database is away.

What is written of a task after this lies behind it in the store's queue, so that a task that has ended is never without
it; and what a crash loses the task's node says again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import structlog

from controlplane.errors import Unavailable
from controlplane.model import Job
from controlplane.store import Store

#: Longest id; the node takes no longer one for an id.
JOB_ID_CHARS: Final = 256
#: What the store did not take is given to it again after this.
AGAIN_S: Final = 1.0

log = structlog.get_logger(__name__)


class JobWrites:
    """Gives jobs to the store. `later`: takes what is to be done outside the turn of the loop, by a bounded number."""

    def __init__(self, store: Store, later: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        self._store = store
        self._later = later

    def put(self, job: Job) -> None:
        """Remember it. An id that no container may have is not."""
        if len(job.id) > JOB_ID_CHARS or not job.id.isprintable():
            log.warning("job_id_refused", task_id=job.task_id, node=job.node_addr)
            return
        try:
            writing = self._store.put_job(job)
        except Unavailable:
            self._later(partial(self._again, job))
        else:
            writing.add_done_callback(partial(self._done, job))

    def _done(self, job: Job, writing: "asyncio.Future[None]") -> None:
        error = Unavailable() if writing.cancelled() else writing.exception()
        if isinstance(error, Unavailable):
            self._later(partial(self._again, job))
        elif error is not None:
            log.error("job_not_remembered", task_id=job.task_id, job=job.id, error=repr(error))

    async def _again(self, job: Job) -> None:
        await asyncio.sleep(AGAIN_S)
        self.put(job)
