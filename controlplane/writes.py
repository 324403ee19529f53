"""The writes of open tasks: each is given to the store until it is on disk, and only then followed by what comes next.

A task has one write under way at most. One that the database did not take is given again, the very same; tasks stand
still meanwhile, and nobody is told of what is not on disk.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Final

import structlog

from controlplane.errors import StaleAttempt, Unavailable
from controlplane.tasks import OpenTask, Phase

#: A write that the store did not take is given to it again after this.
REWRITE_S: Final = 1.0

log = structlog.get_logger(__name__)


class Writes:
    """Gives writes to the store.

    `heed` is told of a task with a new time, `stale` of one that is not on disk as we know it.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float],
        heed: Callable[[OpenTask], None],
        stale: Callable[[OpenTask], None],
    ) -> None:
        self._monotonic = monotonic
        self._heed = heed
        self._stale = stale

    def begin(
        self, task: OpenTask, write: Callable[[], "asyncio.Future[None]"], then: Callable[[OpenTask], None]
    ) -> None:
        """Write, and when that is on disk, do `then`. `write` may be called several times, to the same effect."""
        task.write = write
        task.then = then
        self.try_again(task)

    def begin_later(self, task: OpenTask, write: Callable[[], "asyncio.Future[Any]"]) -> None:
        """`begin`, after the wait of a write that the store did not take; what is then to be done, `write` says."""
        task.write = write
        self._put_off(task)

    def try_again(self, task: OpenTask) -> None:
        """Give the task's write to the store, the first time or anew."""
        assert task.write is not None
        task.write_at = inf
        try:
            task.writing = task.write()
        except Unavailable as error:
            self._failed(task, error)
        else:
            task.writing.add_done_callback(partial(self._done, task))

    def _done(self, task: OpenTask, writing: "asyncio.Future[None]") -> None:
        task.writing = None
        error = error_of(writing)
        if task.phase is Phase.ENDED:
            return
        if error is not None:
            self._failed(task, error)
            return
        then = task.then
        assert then is not None
        task.write = task.then = None
        then(task)

    def _failed(self, task: OpenTask, error: BaseException) -> None:
        # What is being recorded need not be: another task may have its key by now.
        if isinstance(error, StaleAttempt) or (task.phase is Phase.RECORDING and not isinstance(error, Unavailable)):
            if task.recorded:
                log.error("task_not_as_known", task_id=task.id, phase=task.phase.name)
            self._stale(task)
            return
        log.warning("task_write_failed", task_id=task.id, phase=task.phase.name, error=str(error))
        self._put_off(task)

    def _put_off(self, task: OpenTask) -> None:
        task.write_at = self._monotonic() + REWRITE_S
        self._heed(task)


def error_of(future: "asyncio.Future[Any]") -> BaseException | None:
    """The error of a future that is done; one that was cancelled has not reached the disk as far as we know."""
    return Unavailable() if future.cancelled() else future.exception()
