"""The way in: a new task is recorded, and given to a free slot in the same turn of the loop if there is one.

Such a start does not wait for the disk: as long as the insert is not there nobody has been told of the task, so if it
fails the attempt is called off and it is as if it had never been. A task with an idempotency key does wait for its
insert: it may turn out to be known.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Final

import structlog

from controlplane import routing
from controlplane.callers import Fleet, answer, refuse
from controlplane.errors import Conflict, JobLost, NgpuError, NotFound, QueueFull, StaleAttempt, Unavailable
from controlplane.failures import UNRECORDED
from controlplane.lifecycle import Lifecycle, Metrics
from controlplane.model import State, Task
from controlplane.queues import Queue
from controlplane.quotas import Quotas
from controlplane.sizes import LEAST_MEAN_S
from controlplane.slots import Pool, Replica, Slots
from controlplane.spec import Spec
from controlplane.store import Store
from controlplane.tasks import NewTask, OpenTask, Phase, TaskView, Waiter, caller_of, row_of, view_of_row
from controlplane.writes import error_of

#: Least and most of the advice when to try again with a full queue.
RETRY_AFTER_S: Final = (1.0, 60.0)

#: A queue may become so much longer, by the tasks of callers of whom nothing waits there.
ROOM_FOR_OTHERS: Final = 0.1

#: Questions after jobs that a replica may answer at once beside the tasks that it has slots for.
QUESTIONS: Final = 64

log = structlog.get_logger(__name__)


class Intake:
    """Accepts tasks."""

    def __init__(
        self,
        life: Lifecycle,
        store: Store,
        slots: Slots,
        fleet: Fleet,
        *,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        metrics: Metrics,
        quotas: Quotas,
    ) -> None:
        self._life = life
        self._store = store
        self._slots = slots
        self._fleet = fleet
        self._clock = clock
        self._monotonic = monotonic
        self._metrics = metrics
        self._quotas = quotas
        self._places = 0

    def next_place(self) -> int:
        """The place of the next task in the order of acceptance."""
        self._places += 1
        return self._places

    def accept(self, new: NewTask, wait_s: float, *, cancels: bool) -> "asyncio.Future[TaskView]":
        """See Dispatcher.accept."""
        workspace = self._fleet.workspace(new.workspace_uid)
        if workspace.deleted:
            raise NotFound("The workspace has been deleted.")
        life = self._life
        now = self._monotonic()
        limits = workspace.spec.limits
        queue = life.queues.of(workspace.uid)
        pool = self._slots.pool(workspace.uid)
        caller = caller_of(new.btc_address, new.user_ip)
        if len(queue) >= limits.queue_length and not new.pin and _is_full(queue, limits.queue_length, caller):
            raise QueueFull(retry_after_s=_retry_after_s(queue, pool))
        self._quotas.admit(workspace, queue)
        if new.pin:
            _check_pin(pool.replicas.get(new.pin))
        keyed = new.idempotency_key is not None
        task = OpenTask(
            id=new.task_id,
            workspace_uid=workspace.uid,
            workspace_name=workspace.name,
            place=self.next_place(),
            port=new.port,
            request=new.request,
            repeatable=new.repeatable,
            limits=limits,
            create_time=self._clock(),
            accepted_at=now,
            total_at=now + limits.total_time_s,
            phase=Phase.RECORDING if keyed else Phase.WAITING,
            state=State.QUEUED,
            ready=not keyed,
            streamed=new.streamed,
            jobs=() if new.pin else workspace.spec.jobs,
            pin=new.pin,
            cancel_on_hangup=cancels,
            callback_url=new.callback_url,
            hedge_times=_hedge_times(new, workspace.spec) if workspace.spec.hedge else 0.0,
            caller=caller,
            priority=new.priority,
        )
        if pool.mean_s >= LEAST_MEAN_S and len(pool.replicas) > 1 and not new.pin:
            task.features = pool.sizes.features(new.request.path, new.request.body)
            if task.features is not None:
                task.work = pool.sizes.work(task.features)
        # Who comes while others wait, waits behind them.
        bindings: Sequence[routing.Binding[OpenTask]] = ()
        if new.pin:
            bindings = (routing.Binding(task, new.pin, "the replica of the job that is asked after"),)
        elif not (keyed or queue):
            bindings = routing.plan((task,), pool.replicas.values(), mean_s=pool.mean_s, now=now).bindings
        for _, replica_id, reason in bindings:
            life.place(task, pool.replicas[replica_id], reason)
            life.mark_running(task)
        # Nobody is told of it before its end: a caller who waits, and one who reads along would be told of its head.
        ends_soon = bool(bindings) and wait_s > 0 and not task.streamed
        row = row_of(task, new)
        insert = self._store.add_task(row, ends_soon=ends_soon)
        insert.add_done_callback(partial(self._inserted, task, row))
        life.tasks[task.id] = task
        future = life.callers.wait(task, wait_s, cancels=cancels, streamed=new.streamed)
        if bindings:
            life.send(task)
        else:
            life.enqueue(task)
            life.fill(workspace.uid)
        self._metrics.task_accepted(task.workspace_name)
        return future

    def _inserted(self, task: OpenTask, row: Task, insert: "asyncio.Future[Task | None]") -> None:
        error = error_of(insert)
        if error is None:
            self._recorded(insert, task)
            return
        refuse(task.take_waiters(), error)
        if not isinstance(error, Unavailable):
            if not isinstance(error, Conflict):
                log.error("task_insert_refused", task_id=task.id, error=repr(error))
            self._life.forget(task, error)
            return
        log.warning("task_insert_failed", task_id=task.id, error=str(error))
        # It may be on disk all the same. A caller with a key will come again, and is to find the task under way;
        # without one nobody waits for it, so it is ended, whether it is there or not.
        if task.phase is Phase.RECORDING:
            self._life.record_again(task, partial(self._insert_again, task, row))
        else:
            self._life.end(task, UNRECORDED)

    def _insert_again(self, task: OpenTask, row: Task) -> "asyncio.Future[Task | None]":
        insert = self._store.add_task(row)
        task.then = partial(self._recorded, insert)
        return insert

    def _recorded(self, insert: "asyncio.Future[Task | None]", task: OpenTask) -> None:
        earlier = insert.result()
        if earlier is not None:
            self._join(task, earlier)
            return
        task.recorded = True
        life = self._life
        if task.phase is Phase.RECORDING:
            task.move(Phase.WAITING)
            task.ready = True
            wanted, task.wanted = task.wanted, None
            if wanted is not None:
                life.end(task, wanted)
                return
            life.fill(task.workspace_uid)
        if task.phase is not Phase.ENDED:
            life.callers.answer_due(task)
            life.heed(task)

    def _join(self, task: OpenTask, earlier: Task) -> None:
        """The idempotency key has led to an earlier task: the callers of this one wait for that."""
        waiters = task.take_waiters()
        life = self._life
        life.forget(task, StaleAttempt())
        known = life.tasks.get(earlier.id)
        if known is not None:
            life.callers.add(known, waiters)
        elif earlier.end_time is not None:
            answer(waiters, view_of_row(earlier))
        else:
            # It ended while its row was on the way here.
            life.reads.put_nowait(partial(self._answer_later, earlier.id, waiters))

    async def _answer_later(self, task_id: str, waiters: list[Waiter]) -> None:
        try:
            row = await self._store.task(task_id)
        except NgpuError as error:
            refuse(waiters, error)
        else:
            assert row is not None
            answer(waiters, view_of_row(row))


def _hedge_times(new: NewTask, spec: Spec) -> float:
    """What may have a second attempt: any replica could answer it, twice, and in one piece."""
    return spec.hedge if new.repeatable and not (new.streamed or new.pin or spec.jobs) else 0.0


def _check_pin(replica: Replica | None) -> None:
    """Raises JobLost, Unavailable, QueueFull unless the replica can be asked now."""
    if replica is None:
        raise JobLost
    if replica.node.link is None:
        raise Unavailable("The node that knows this job is not connected; ask again soon.", retry_after_s=2.0)
    if len(replica.in_flight) >= max(replica.capacity, 1) + QUESTIONS:
        raise QueueFull("Too many ask after jobs of this replica at once; ask again soon.", retry_after_s=1.0)


def _is_full(queue: Queue, length: int, caller: str) -> bool:
    """For a caller of whom nothing waits there is a little more room: one must not shut out all others."""
    return queue.has(caller) or len(queue) >= length * (1 + ROOM_FOR_OTHERS)


def _retry_after_s(queue: Queue, pool: Pool) -> float:
    """How long the whole queue takes, as things go."""
    least, most = RETRY_AFTER_S
    capacity = sum(replica.capacity for replica in pool.replicas.values()) or 1
    return min(max(pool.mean_s * len(queue) / capacity, least), most)
