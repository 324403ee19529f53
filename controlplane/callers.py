"""Who waits for which task, and what they are shown: a futures table, with one timer for a task and all its waiters.

Nobody is shown what is not on disk. A future that its holder cancels is a caller who has hung up.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Final, Protocol

from msgspec import structs

from controlplane import routing, standing
from controlplane.census import Node, Workspace
from controlplane.census import Replica as PlacedReplica
from controlplane.doubts import Doubts
from controlplane.errors import NotFound
from controlplane.model import State
from controlplane.queues import Queue, Queues
from controlplane.recent import Recent
from controlplane.report import ReplicaReport, ReplicaState
from controlplane.slots import Slots
from controlplane.tasks import Answer, OpenTask, Phase, TaskView, Waiter

#: Callers who may wait for one task; a further one is answered at once.
WAITERS: Final = 1000
#: What a replica does on its way to be ready.
_COMING: Final = {
    ReplicaState.ASSIGNED: "is to be begun",
    ReplicaState.PULLING: "pulls its image",
    ReplicaState.STARTING: "starts",
}
#: The words why a queue waits are put together, and when its tasks will start is judged, at most this often.
WORDS_S: Final = 0.5


class Fleet(Protocol):
    """What is asked of the picture of the fleet."""

    def workspace(self, key: str) -> Workspace:
        """By uid. Raises NotFound."""

    def replica(self, replica_id: str) -> PlacedReplica | None:
        """By id."""

    def replicas_of(self, workspace_uid: str) -> Sequence[PlacedReplica]:
        """All not known to be gone."""

    def state_of(self, replica: PlacedReplica) -> ReplicaReport:
        """How it stands."""

    def node(self, key: str) -> Node:
        """By address."""

    def call(self, workspace_uid: str) -> None:
        """A task waits, and no slot is free."""


class Callers:
    """Waits, answers and views.

    `heed` is told of a task that has got a deadline, `hang_up` of one to cancel since its last caller has left.
    """

    def __init__(
        self,
        queues: Queues,
        slots: Slots,
        fleet: Fleet,
        doubts: Doubts,
        *,
        monotonic: Callable[[], float],
        heed: Callable[[OpenTask], None],
        hang_up: Callable[[OpenTask], None],
    ) -> None:
        self._queues = queues
        self._slots = slots
        self._fleet = fleet
        self._doubts = doubts
        self._monotonic = monotonic
        self._heed = heed
        self._hang_up = hang_up
        self.recent = Recent(monotonic)

    def wait(
        self,
        task: OpenTask,
        wait_s: float,
        *,
        cancels: bool = False,
        seen: tuple[int, State] | None = None,
        streamed: bool = False,
    ) -> "asyncio.Future[TaskView]":
        """The task when it has ended, or `wait_s` is over, or it is elsewhere than at `seen` (attempt, state).

        `streamed`: or when its container has begun to answer; the view has the head then.
        """
        future = Answer(loop=asyncio.get_running_loop())
        if len(task.waiters) >= WAITERS:
            wait_s = 0.0
        waiter = Waiter(task, future, self._monotonic() + wait_s, cancels, seen, streamed)
        future.left = partial(self._left, waiter)
        self.add(task, [waiter])
        return future

    def add(self, task: OpenTask, waiters: Iterable[Waiter]) -> None:
        """They wait for this task from now on."""
        for waiter in waiters:
            waiter.task = task
            task.waiters.append(waiter)
        if task.recorded:
            self.answer_due(task)
            self._heed(task)

    def _left(self, waiter: Waiter) -> None:
        with suppress(ValueError):
            waiter.task.waiters.remove(waiter)
        if waiter.cancels and not waiter.task.waiters:
            self._hang_up(waiter.task)

    def answer_due(self, task: OpenTask) -> None:
        """Answer those whose time is over or who have not seen what is now."""
        if not task.waiters or not task.recorded:
            return
        now, at = self._monotonic(), (task.number, task.state)
        head = None if task.attempt is None else task.attempt.head
        if head is not None:
            streamed = [waiter for waiter in task.waiters if waiter.streamed]
            task.waiters = [waiter for waiter in task.waiters if not waiter.streamed]
            answer(streamed, structs.replace(self.view(task), response=head))
        due: list[Waiter] = []
        others: list[Waiter] = []
        for waiter in task.waiters:
            over = waiter.deadline <= now or (waiter.seen is not None and waiter.seen != at)
            (due if over else others).append(waiter)
        if due:
            task.waiters = others
            answer(due, self.view(task))

    def answer_all(self, task: OpenTask) -> None:
        """It has ended."""
        view = task.view()
        self.recent.keep(view)
        answer(task.take_waiters(), view)

    def view(self, task: OpenTask) -> TaskView:
        """The task as it is on disk, with its place in the queue and why it waits."""
        if task.state is not State.QUEUED:
            return task.view()
        queue = self._queues.of(task.workspace_uid)
        position = queue.position(task)
        return task.view(position, self._waiting_for(task, queue), self._expected_wait_s(task, queue, position))

    def _expected_wait_s(self, task: OpenTask, queue: Queue, position: int) -> float:
        now = self._monotonic()
        if now >= queue.outlook_until:
            pool = self._slots.pool(task.workspace_uid)
            queue.outlook = routing.outlook(pool.replicas.values(), mean_s=pool.mean_s, now=now)
            queue.outlook_until = now + WORDS_S
        backoff_s = max(0.0, task.ready_at - now) if task.ready_at < inf else 0.0
        expected_s = queue.outlook.start_s(position)
        return max(expected_s, backoff_s) if expected_s else 0.0

    def _waiting_for(self, task: OpenTask, queue: Queue) -> str:
        if task.phase is Phase.ASSIGNING:
            return "it has a slot; its start is being recorded"
        if not task.ready and task.failure is not None:
            wait_s = max(0.0, task.ready_at - self._monotonic())
            held = " (held back: much of the workspace was run again lately)" if task.held else ""
            when = f"attempt {task.number + 1} begins in {wait_s:.1f} s{held}"
            return f"{when}; the last one failed: {task.failure.message}"
        return self.why(queue)

    def why(self, queue: Queue) -> str:
        """Why no slot is free, in words; up to WORDS_S old."""
        now = self._monotonic()
        if now >= queue.waiting_for_until:
            uid = queue.workspace_uid
            stands = [(self._fleet.state_of(replica), replica) for replica in self._fleet.replicas_of(uid)]
            reports = [report for report, _ in stands]
            replicas, reserved = self._slots.pool(uid).replicas.values(), queue.plan_at < inf
            queue.waiting_for = routing.waiting_for(replicas, reports, reserved=reserved)
            coming = [(r.state, r.progress, replica.id, replica) for r, replica in stands if r.state in _COMING]
            if coming:
                state, progress, _, replica = max(coming)
                where = self._fleet.node(replica.node_addr).name
                queue.waiting_for += f"; next is replica {replica.id} on node {where}, which {_COMING[state]}"
                queue.waiting_for += f", {progress} %" if progress else ""
            if words := standing.doubt(self._doubts.words(uid, now)):
                queue.waiting_for += f". {words}"
            if not reports and (absence := self._absence(uid)):
                queue.waiting_for += f": {absence}"
            queue.waiting_for_until = now + WORDS_S
        return queue.waiting_for

    def _absence(self, workspace_uid: str) -> str:
        try:
            return standing.absence(self._fleet.workspace(workspace_uid))
        except NotFound:
            return ""


def answer(waiters: Iterable[Waiter], view: TaskView) -> None:
    """Show it to them."""
    for waiter in waiters:
        if not waiter.future.done():
            waiter.future.set_result(view)
            # It leads back here: a circle would wait for the garbage collector.
            waiter.future.left = None


def refuse(waiters: Iterable[Waiter], error: BaseException) -> None:
    """Tell them of an error instead."""
    for waiter in waiters:
        if not waiter.future.done():
            waiter.future.set_exception(error)
            waiter.future.left = None
