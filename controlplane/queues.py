"""The queues: of each workspace the tasks that have no slot, in the order in which they will be served.

Fair between callers: each has the tasks that it gave, and as many turns. Turns go in rounds: in each round one of every
caller who waits, so that who gives one task does not wait behind all of who gave a thousand. A caller's first turn
serves its first task; those are in order of age, where a step of priority counts as PRIORITY_S more of it, so that
nothing waits for ever. Priorities order a caller's own tasks and nobody else's: saying "urgent" costs nothing. So each
task has its place; of those who come later only such come before it as have waited for fewer rounds. A task that
returns after a failed attempt returns to its old turn.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from math import inf
from typing import Final

from controlplane.retries import Budget
from controlplane.routing import Outlook
from controlplane.tasks import OpenTask, Turn

#: Requests of queued tasks kept in memory, over all workspaces; past that they are read from the store at their start.
HELD_BYTES: Final = 64 * 1024 * 1024
#: Counted for a request beside its body.
HEAD_BYTES: Final = 1024
#: A task that is one step more urgent is served as if it had come so much earlier.
PRIORITY_S: Final = 60.0


class _Caller:
    """A caller's tasks and turns: sorted lists of equal length."""

    __slots__ = ("tasks", "turns")

    def __init__(self) -> None:
        #: (age, place, task): by the first two, of which the second is unique.
        self.tasks: list[tuple[float, int, OpenTask]] = []
        self.turns: list[Turn] = []

    def index(self, task: OpenTask) -> int:
        """Where it is among `tasks`, or would be."""
        return bisect_left(self.tasks, (_age_at(task), task.place))


def _age_at(task: OpenTask) -> float:
    return task.accepted_at - task.priority * PRIORITY_S


class Queue:
    """The queue of one workspace. Its length is bounded: see intake."""

    def __init__(self, workspace_uid: str) -> None:
        self.workspace_uid = workspace_uid
        # Sorted lists and not heaps: positions are asked for all the time, and taking one out anywhere is a memmove of
        # at most 800 KB (100,000 tasks, the largest queue a workspace may ask for).
        self._turns: list[tuple[int, int, _Caller]] = []
        self._callers: dict[str, _Caller] = {}
        #: By place, in order of arrival.
        self._tasks: OrderedDict[int, OpenTask] = OrderedDict()
        #: The latest round of which a turn was served.
        self._round = 0
        self._number = 0
        #: What may run again because of the platform.
        self.budget = Budget()
        #: When to plan again if nothing has happened by then, in monotonic seconds; see timers.Timed.
        self.plan_at = inf
        self.timer = inf
        #: When its tasks will start, and until when that is believed (monotonic seconds).
        self.outlook = Outlook()
        self.outlook_until = -inf
        #: Why no slot is free, in words, and until when that may be said again (monotonic seconds).
        self.waiting_for = ""
        self.waiting_for_until = -inf

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[OpenTask]:
        """All of them, in order. Not to be changed meanwhile."""
        return self._in_turn(waiting=True)

    def due(self) -> float:
        """See timers.Timed."""
        return self.plan_at if self._turns else inf

    def has(self, caller: str) -> bool:
        """Does a task of that caller wait?"""
        return caller in self._callers

    @property
    def oldest(self) -> OpenTask | None:
        """Of those that may start, the one that came first."""
        return next((task for task in self._tasks.values() if task.ready), None)

    def add(self, task: OpenTask) -> None:
        """Into its place."""
        if task.place in self._tasks:
            return
        self._tasks[task.place] = task
        caller = self._callers.get(task.caller)
        if caller is None:
            caller = self._callers[task.caller] = _Caller()
        turn = task.turn or self._next_turn(caller)
        insort(self._turns, (*turn, caller))
        insort(caller.turns, turn)
        insort(caller.tasks, (_age_at(task), task.place, task))

    def _next_turn(self, caller: _Caller) -> Turn:
        # Behind those of the round that come next, not into the one that is being served: else it might never end.
        now = min(self._round, self._turns[0][0]) if self._turns else self._round
        self._number += 1
        return max(now, caller.turns[-1][0] if caller.turns else 0) + 1, self._number

    def remove(self, task: OpenTask, *, served: bool = False) -> None:
        """For a slot, if `served`: that takes its turn; else its caller's last. No error if it is not there."""
        if self._tasks.pop(task.place, None) is None:
            return
        caller = self._callers[task.caller]
        index = caller.index(task)
        del caller.tasks[index]
        turn = caller.turns.pop(index if served else -1)
        del self._turns[bisect_left(self._turns, turn)]
        if served:
            task.turn = turn
            self._round = max(self._round, turn[0])
        if not caller.turns:
            del self._callers[task.caller]

    def ready(self) -> Iterator[OpenTask]:
        """Those that may start now, in the order in which they should."""
        return self._in_turn(waiting=False)

    def _in_turn(self, *, waiting: bool) -> Iterator[OpenTask]:
        """`waiting`: with those that may not start yet. Who may start takes the turn of who may not."""
        if len(self._callers) == 1:
            # Nobody to be fair to: cheaper, and often so.
            (only,) = self._callers.values()
            for _, _, task in only.tasks:
                if waiting or task.ready:
                    yield task
            return
        served: dict[_Caller, int] = {}
        for _, _, caller in self._turns:
            tasks = caller.tasks
            index = served.get(caller, 0)
            while index < len(tasks) and not (waiting or tasks[index][2].ready):
                index += 1
            served[caller] = index + 1
            if index < len(tasks):
                yield tasks[index][2]

    def position(self, task: OpenTask) -> int:
        """How many are before it."""
        caller = self._callers.get(task.caller)
        if caller is None or task.place not in self._tasks:
            return 0
        return bisect_left(self._turns, caller.turns[caller.index(task)])


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

    def leave(self, task: OpenTask, *, served: bool = False) -> None:
        """Out of it, for a slot (`served`) or for good. No error if it is not there."""
        self.of(task.workspace_uid).remove(task, served=served)
        self._held -= task.held_bytes
        task.held_bytes = 0
        task.queue_at = task.ready_at = inf
