"""The queues: of each workspace the tasks that have no slot, in order of acceptance, those in a backoff included.

A task that returns after a failed attempt returns to its old place. Fairness between callers of one workspace has its
place in `Queue.ready`: the order in which tasks are offered to routing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from math import inf
from typing import Final

from controlplane.tasks import OpenTask

#: Requests of queued tasks kept in memory, over all workspaces; past that they are read from the store at their start.
HELD_BYTES: Final = 64 * 1024 * 1024
#: Counted for a request beside its body.
HEAD_BYTES: Final = 1024


class Queue:
    """The queue of one workspace: tasks by place. Its length is bounded by `queue_length`: see intake."""

    def __init__(self, workspace_uid: str) -> None:
        self.workspace_uid = workspace_uid
        # A sorted list and not a heap: positions are asked for all the time, and taking one out anywhere is a memmove
        # of at most 800 KB (100,000 tasks, the largest queue a workspace may ask for).
        self._places: list[int] = []
        self._tasks: dict[int, OpenTask] = {}
        #: Why no slot is free, in words, and until when that may be said again (monotonic seconds).
        self.waiting_for = ""
        self.waiting_for_until = -inf

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[OpenTask]:
        """All of them, in order. Not to be changed meanwhile."""
        return (self._tasks[place] for place in self._places)

    def add(self, task: OpenTask) -> None:
        """Into its place."""
        if task.place not in self._tasks:
            insort(self._places, task.place)
            self._tasks[task.place] = task

    def remove(self, task: OpenTask) -> None:
        """No error if it is not there."""
        if self._tasks.pop(task.place, None) is not None:
            del self._places[bisect_left(self._places, task.place)]

    def ready(self) -> Iterator[OpenTask]:
        """Those that may start now, in the order in which they should."""
        return (task for task in self if task.ready)

    def position(self, task: OpenTask) -> int:
        """How many are before it."""
        return bisect_left(self._places, task.place)


class Queues:
    """All queues, by workspace, and the memory that their requests take."""

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._queues: dict[str, Queue] = {}
        self._limit = held_bytes
        self._held = 0

    def of(self, workspace_uid: str) -> Queue:
        """The workspace's queue."""
        queue = self._queues.get(workspace_uid)
        if queue is None:
            queue = self._queues[workspace_uid] = Queue(workspace_uid)
        return queue

    def __iter__(self) -> Iterator[Queue]:
        """All of them, empty ones too."""
        return iter(self._queues.values())

    def enter(self, task: OpenTask, now: float) -> None:
        """Into its workspace's queue. Its queue time begins anew."""
        self.of(task.workspace_uid).add(task)
        task.queue_at = now + task.limits.queue_time_s
        if task.request is None:
            return
        size = HEAD_BYTES + len(task.request.body)
        if self._held + size > self._limit:
            task.request = None
        else:
            task.held_bytes = size
            self._held += size

    def leave(self, task: OpenTask) -> None:
        """Out of it, for a slot or for good. No error if it is not there."""
        self.of(task.workspace_uid).remove(task)
        self._held -= task.held_bytes
        task.held_bytes = 0
        task.queue_at = task.ready_at = inf
