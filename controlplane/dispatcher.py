"""Brings queued tasks and free slots together: the door through which callers, nodes and the deployer come.

What they say is turned into steps of `lifecycle` here. A node that is not connected keeps what it runs for a grace (it
finishes and spools it); after that its attempts are given up, and whatever is said of them later is acknowledged and
changes nothing. No task of asyncio per request: callers wait on futures, all times are in one heap.
"""

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from math import inf
from typing import Final

import structlog

from controlplane.autoscale import Load
from controlplane.callers import Fleet, refuse
from controlplane.errors import NotFound, Unavailable
from controlplane.explain import Decision
from controlplane.failures import (
    CALLED_OFF,
    CONTAINER_LOST,
    DELETED,
    LOST,
    LOST_AT_START,
    LOST_BEFORE_SENT,
    NOT_ARRIVED,
    NOT_HELD,
    UNSAID,
)
from controlplane.intake import Intake
from controlplane.ledger import Recorder
from controlplane.lifecycle import RUN_GRACE_S, UNREAD_S, Lifecycle, Metrics
from controlplane.model import ENDED, Attempt, Delivery, State
from controlplane.queues import HELD_BYTES, Queues
from controlplane.quotas import ACCOUNT_QUEUE_LENGTH, Quotas
from controlplane.receipts import TermsOf, free_of_charge
from controlplane.recovery import Graces, taken_up
from controlplane.slots import AttemptResult, Link, Response, Slots
from controlplane.store import Store
from controlplane.tasks import UNASSIGNED, Meter, NewTask, OpenAttempt, OpenTask, Phase, TaskView, view_of_row

__all__ = ["Dispatcher", "Graces", "Metrics", "NewTask", "NoMetrics", "TaskView"]

#: An attempt that a connected node does not mention so long after it was given out is lost.
HELD_AFTER_S: Final = 30.0
#: A replica that is gone has so long to have the results of its last tasks come in.
RESULT_GRACE_S: Final = 10.0
#: How long a caller of `cancel` waits for the disk before it is shown the task as it is.
CANCEL_WAIT_S: Final = 30.0
#: How long `stop` waits for ends that are being written, so that their callers get their answers.
STOP_S: Final = 5.0
#: Reads of tasks that go on with a request that is not in memory, at the same time.
READERS: Final = 4

log = structlog.get_logger(__name__)


class NoMetrics:
    """Counts nothing."""

    def task_accepted(self, workspace: str) -> None:
        """See Metrics."""

    def task_started(self, workspace: str, waited_s: float) -> None:
        """See Metrics."""

    def attempt_failed(self, workspace: str, reason: str) -> None:
        """See Metrics."""

    def retry_held(self, workspace: str) -> None:
        """See Metrics."""

    def sent_ahead(self, workspace: str) -> None:
        """See Metrics."""

    def hedged(self, workspace: str, outcome: str) -> None:
        """See Metrics."""

    def task_ended(self, workspace: str, state: State, reason: str, seconds: float) -> None:
        """See Metrics."""


NO_METRICS: Final = NoMetrics()


class NoRecorder:
    """Keeps nothing."""

    slow_s = inf

    def keep(self, row: Attempt, kind: str) -> None:
        """See Recorder."""


NO_RECORDER: Final = NoRecorder()


def utcnow() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


class Dispatcher:
    """Accepts tasks, gives them out, takes their results. `start` first, then `run`; `stop` before the store is closed.

    `jitter`: random numbers from 0 to 1, for backoffs. `terms`: on which attempts run, for their receipts.
    `held_bytes`: how much of queued requests is kept in memory. `account_queue_length`: how many tasks may wait of one.
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        fleet: Fleet,
        *,
        graces: Graces = Graces(),  # noqa: B008 frozen
        clock: Callable[[], datetime] = utcnow,
        monotonic: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        metrics: Metrics = NO_METRICS,
        terms: TermsOf = free_of_charge,
        recorder: Recorder = NO_RECORDER,
        held_bytes: int = HELD_BYTES,
        account_queue_length: int = ACCOUNT_QUEUE_LENGTH,
    ) -> None:
        self._store = store
        self._slots = slots
        self._fleet = fleet
        self._graces = graces
        self._clock = clock
        self._monotonic = monotonic
        self._life = Lifecycle(
            store,
            slots,
            fleet,
            Queues(held_bytes),
            clock=clock,
            monotonic=monotonic,
            jitter=jitter,
            metrics=metrics,
            terms=terms,
            recorder=recorder,
        )
        self._intake = Intake(
            self._life,
            store,
            slots,
            fleet,
            clock=clock,
            monotonic=monotonic,
            metrics=metrics,
            quotas=Quotas(self._life.queues, fleet, monotonic=monotonic, account_queue_length=account_queue_length),
        )
        self._stopping = False

    # Callers.

    def accept(self, new: NewTask, *, wait_s: float, cancel_on_hangup: bool = False) -> "asyncio.Future[TaskView]":
        """The hot path: no task of asyncio is made. Cancelling the future is the caller's hang-up.

        The future is done when the task's end is on disk or `wait_s` is over, but never before the task itself is on
        disk. Raises NotFound (workspace), QueueFull, RateLimited, Unavailable, at once or through the future, and
        through it Conflict (the idempotency key came with another request).
        """
        if self._stopping:
            raise Unavailable("The control plane is stopping; try again soon.", retry_after_s=1.0)
        return self._intake.accept(new, wait_s, cancels=cancel_on_hangup)

    async def submit(self, new: NewTask, *, wait_s: float, cancel_on_hangup: bool = False) -> TaskView:
        """`accept` for callers that can await; CancelledError in the awaiting caller is the hang-up."""
        return await self.accept(new, wait_s=wait_s, cancel_on_hangup=cancel_on_hangup)

    def ask(
        self, task_id: str, *, wait_s: float = 0.0, seen: tuple[int, State] | None = None
    ) -> "asyncio.Future[TaskView]":
        """The task as it is; with `wait_s`, once it has ended, is elsewhere than at `seen`, or that time is over.

        `seen`: the (attempt, state) of which the caller knows. The future's errors: NotFound, Unavailable.
        """
        task = self._life.tasks.get(task_id)
        if task is not None:
            # Who asks while we stop would keep us from it.
            return self._life.callers.wait(task, 0.0 if self._stopping else wait_s, seen=seen)
        known = self._life.callers.recent.get(task_id)
        if known is None:
            return asyncio.create_task(self._read(task_id), name=f"ask-{task_id}")
        future: asyncio.Future[TaskView] = asyncio.get_running_loop().create_future()
        future.set_result(known)
        return future

    async def query(self, task_id: str, *, wait_s: float = 0.0, seen: tuple[int, State] | None = None) -> TaskView:
        """`ask` for callers that can await."""
        return await self.ask(task_id, wait_s=wait_s, seen=seen)

    async def cancel(self, task_id: str) -> TaskView:
        """End a task that has not ended; returns when that is on disk. One that has is returned as it is.

        Raises NotFound, Unavailable.
        """
        task = self._life.tasks.get(task_id)
        if task is None:
            return await self.ask(task_id)
        future = self._life.callers.wait(task, CANCEL_WAIT_S)
        self._life.end(task, CALLED_OFF)
        return await future

    def hang_up(self, task_id: str) -> None:
        """The one caller that the task is for has gone. Of a task that has ended it changes nothing."""
        task = self._life.tasks.get(task_id)
        # When we stop it is we who go: the task is taken up again.
        if task is not None and not self._stopping:
            self._life.hang_up(task)

    @contextmanager
    def reading(self, task_id: str) -> Iterator[None]:
        """The one caller that the task is for reads its response meanwhile."""
        task = self._life.tasks.get(task_id)
        if task is None:
            yield
            return
        task.readers += 1
        if task.attempt is not None:
            task.attempt.unread_at = inf
        try:
            yield
        finally:
            task.readers -= 1

    async def _read(self, task_id: str) -> TaskView:
        callers = self._life.callers
        row = await self._store.task(task_id)
        if row is None:
            raise NotFound("There is no such task.")
        task = self._life.tasks.get(task_id)
        if task is not None:
            return callers.view(task)
        view = view_of_row(row)
        if view.state in ENDED:
            callers.recent.keep(view)
        return view

    def decision(self, task_id: str) -> Decision | None:
        """Why the task's present attempt is where it is; None: it has none, or there was no choice, or before us."""
        task = self._life.tasks.get(task_id)
        return None if task is None else self._life.ledger.decision(task)

    def waiting(self, task_id: str) -> TaskView | None:
        """The task with its place in the queue and why it waits; None unless it is queued."""
        task = self._life.tasks.get(task_id)
        return None if task is None or task.state is not State.QUEUED else self._life.callers.view(task)

    def workspace_of(self, task_id: str) -> str | None:
        """The uid of the workspace of a task that is open or ended a moment ago; None of others."""
        task = self._life.tasks.get(task_id) or self._life.callers.recent.get(task_id)
        return None if task is None else task.workspace_uid

    def is_open(self, task_id: str) -> bool:
        """It has not ended; it need not be on disk yet."""
        return task_id in self._life.tasks

    @property
    def open_tasks(self) -> int:
        """Tasks that have not ended."""
        return len(self._life.tasks)

    def queued(self, workspace_uid: str) -> int:
        """Tasks of the workspace that have no slot."""
        return len(self._life.queues.of(workspace_uid))

    def running(self, workspace_uid: str) -> int:
        """Attempts that the workspace's replicas have in flight."""
        return sum(len(replica.in_flight) for replica in self._slots.pool(workspace_uid).replicas.values())

    def load(self, workspace_uid: str) -> Load:
        """How the workspace is used now: by this its number of replicas is found."""
        queue, pool = self._life.queues.of(workspace_uid), self._slots.pool(workspace_uid)
        first = queue.oldest
        return Load(
            # Those in a backoff wait for time and not for replicas.
            queued=0 if first is None else len(queue),
            running=self.running(workspace_uid),
            oldest_s=0.0 if first is None else self._monotonic() - first.accepted_at,
            ready=sum(1 for replica in pool.replicas.values() if replica.capacity),
            mean_s=pool.mean_s,
        )

    def doubts(self, workspace_uid: str) -> dict[str, str]:
        """Of the workspace's replicas those that are not fully trusted (see ejection), by id, and why, in words."""
        return self._life.doubts.words(workspace_uid, self._monotonic())

    def ejected(self, workspace_uid: str) -> tuple[int, int]:
        """How many of the workspace's replicas are ejected now; and how often one was, since the start."""
        return self._life.doubts.ejected(workspace_uid)

    def running_on(self, replica_id: str) -> int:
        """Attempts that run there or may, given-up ones included: a drained replica may stop at 0."""
        replica = self._slots.replica(replica_id)
        return 0 if replica is None else len(replica.in_flight)

    # Nodes.

    def attempt_is_current(self, node_addr: str, attempt_id: str) -> bool:
        """May this node fetch the attempt's request and deliver its response? Not any more once it is given up."""
        task = self._life.attempts.get(attempt_id)
        return (
            task is not None
            and task.phase is Phase.RUNNING
            and task.attempt is not None
            and task.attempt.node_addr == node_addr
        )

    def response_limit(self, attempt_id: str) -> int:
        """How long the response of an attempt that is current may be."""
        # Asked of memory: the task itself may be recorded only with its end.
        return self._life.attempts[attempt_id].limits.response_body_bytes

    def node_up(
        self, node_addr: str, link: Link, running: Collection[str], ended: Collection[str], *, node_ip: str = ""
    ) -> None:
        """An Execute stream of the node is there; its Resume was read, its results not yet. A newer one replaces it."""
        now = self._monotonic()
        held = {*running, *ended}
        workspaces = self._slots.connect(node_addr, link, node_ip, set(running), now)
        for task, attempt in self._running_on(node_addr):
            if attempt.id in held:
                attempt.lost_at = inf
                attempt.lost_by = None
                attempt.run_at = now + task.limits.run_time_s + RUN_GRACE_S
                self._life.heed(task)
            else:
                # What a node has begun with it keeps: this it has never got, unless it said otherwise before.
                delivery = Delivery.SENT if attempt.sent else Delivery.NOT_SENT
                self._life.fail(task, delivery, NOT_ARRIVED)
        for attempt_id in running:
            if not self.attempt_is_current(node_addr, attempt_id):
                link.cancel(attempt_id)
        for uid in workspaces:
            self._life.fill(uid)

    def node_down(self, node_addr: str, link: Link, unsent: Collection[str] = ()) -> None:
        """The stream has ended. Nothing happens if a newer one is there.

        `unsent`: attempts whose Start never left the outbox.
        """
        now = self._monotonic()
        if not self._slots.disconnect(node_addr, link, now):
            return
        for task, attempt in self._running_on(node_addr):
            if attempt.id in unsent:
                self._slots.release(attempt.id, node_addr, now)
                self._life.fail(task, Delivery.NOT_SENT, LOST_BEFORE_SENT)
            else:
                # If it is we who leave, it comes back to whoever is started next.
                self._await_node(task, attempt, inf if self._stopping else now + self._graces.reconnect_s)

    def _await_node(self, task: OpenTask, attempt: OpenAttempt, until: float) -> None:
        if not task.repeatable:
            until = max(until, self._monotonic() + self._graces.hold_s)
        attempt.lost_at = until
        attempt.lost_by = LOST
        # Its node enforces the run time; what it says when it comes back is believed.
        attempt.run_at = inf
        self._life.heed(task)

    def node_lost(self, node_addr: str) -> None:
        """Do not wait for the node any longer, except with what may not be repeated or is since a start of ours.

        Nothing happens while it is connected: what it runs there is believed to run. Nor if it has not been since we
        were started: it may not have found us yet.
        """
        if self._slots.link(node_addr) is not None:
            return
        now = self._monotonic()
        for task, attempt in self._running_on(node_addr):
            if task.repeatable and attempt.lost_by is not LOST_AT_START:
                attempt.lost_at = min(attempt.lost_at, now)
                self._life.heed(task)

    def held(self, node_addr: str, attempt_ids: Collection[str]) -> None:
        """What a heartbeat says the node holds. A safety net: what it does not mention for long is lost."""
        now = self._monotonic()
        missing = self._slots.missing(node_addr, set(attempt_ids), now - HELD_AFTER_S)
        for attempt_id in missing:
            freed = self._slots.release(attempt_id, node_addr, now)
            task = self._life.attempts.get(attempt_id)
            if task is not None and task.phase is Phase.RUNNING:
                self._life.fail(task, task.current.delivery, NOT_HELD)
            for uid in freed:
                self._life.fill(uid)

    def sent(self, node_addr: str, attempt_id: str) -> None:
        """The attempt's request has been sent whole to the container."""
        task = self._life.attempts.get(attempt_id)
        if task is not None and task.attempt is not None and task.attempt.node_addr == node_addr:
            task.attempt.sent = True

    def begun(self, node_addr: str, attempt_id: str, job_id: str) -> None:
        """The attempt's container works on it by itself, under that id. Said again it changes nothing."""
        if self.attempt_is_current(node_addr, attempt_id):
            self._life.begun(self._life.attempts[attempt_id], job_id)

    def answering(self, node_addr: str, attempt_id: str, head: Response, meter: Meter | None = None) -> None:
        """The attempt's container has begun a response that is long or streamed. Said again it changes nothing.

        `meter`: counts what goes over the connection, if the container has changed its protocol.
        """
        if self.attempt_is_current(node_addr, attempt_id):
            task = self._life.attempts[attempt_id]
            task.current.head = head
            task.current.meter = meter
            if meter is None and task.streamed and task.cancel_on_hangup and not task.readers:
                task.current.unread_at = self._monotonic() + UNREAD_S
                self._life.heed(task)
            self._life.callers.answer_due(task)

    def result(self, node_addr: str, result: AttemptResult) -> None:
        """An attempt has ended: its slot is free at once.

        It is acknowledged when what follows from it is on disk; if it was given up, at once.
        """
        now = self._monotonic()
        freed = self._slots.release(result.attempt_id, node_addr, now)
        task = self._life.attempts.get(result.attempt_id)
        attempt = None if task is None else task.attempt
        hedged = self._life.hedges.tasks.get(result.attempt_id)
        if hedged is not None and hedged.hedge is not None and hedged.hedge.node_addr == node_addr:
            self._observe(hedged, hedged.hedge, result, now)
            self._life.hedged(hedged, node_addr, result)
        elif task is None or attempt is None or attempt.node_addr != node_addr:
            link = self._slots.link(node_addr)
            if link is not None:
                link.ack(result.attempt_id)
        else:
            attempt.answered = True
            if task.phase is Phase.RUNNING:
                if result.job_id:
                    self._life.begun(task, result.job_id)
                # At work on it since it had a slot.
                attempt.given_at = min(now, attempt.given_at + result.waited_us / 1e6)
                self._take(task, attempt, result, now)
        for uid in freed:
            self._life.fill(uid)

    def _take(self, task: OpenTask, attempt: OpenAttempt, result: AttemptResult, now: float) -> None:
        self._observe(task, attempt, result, now)
        if result.response is not None:
            self._life.complete(task, result)
        else:
            self._life.fail(task, result.delivery, result.failure or UNSAID, result)

    def _observe(self, task: OpenTask, attempt: OpenAttempt, result: AttemptResult, now: float) -> None:
        """What the attempt's end says of its replica."""
        replica = self._slots.replica(attempt.replica_id)
        if replica is None:
            return
        if result.response is None:
            self._life.doubts.failed(replica, result.failure or UNSAID, attempt.given_at, now)
            return
        seconds, status = now - attempt.given_at, result.response.status
        if status < 500:
            # Errors come fast: they must not make a replica look so.
            node_us = result.last_byte_after_us
            trip_s = attempt.written_s + seconds - node_us / 1e6 if node_us else 0.0
            self._slots.observe(replica, seconds, now, task.work, task.features, trip_s=trip_s)
        self._life.doubts.answered(replica, seconds / task.work, status, now)

    # The deployer.

    def set_capacity(
        self, replica_id: str, workspace_uid: str, node_addr: str, capacity: int, *, gpu_ids: Sequence[str] = ()
    ) -> None:
        """How many tasks the replica may run at once; 0 while it is not ready, or draining. Again is no error."""
        replica = self._slots.known(replica_id, workspace_uid, node_addr, self._monotonic())
        replica.capacity = capacity
        self._slots.set_gpus(replica, tuple(gpu_ids))
        if capacity:
            self._life.fill(workspace_uid)

    def replica_gone(self, replica_id: str) -> None:
        """Its container is no more. Results of its last tasks may still be on their way, on another stream."""
        now = self._monotonic()
        for attempt_id in self._slots.remove(replica_id):
            task = self._life.attempts.get(attempt_id)
            attempt = None if task is None else task.attempt
            if task is not None and attempt is not None and task.phase is Phase.RUNNING and attempt.lost_by is None:
                attempt.lost_at = now + RESULT_GRACE_S
                attempt.lost_by = CONTAINER_LOST
                self._life.heed(task)

    def workspace_deleted(self, uid: str) -> None:
        """Its queued tasks fail with WORKSPACE_DELETED, running ones finish."""
        for task in list(self._life.tasks.values()):
            if task.workspace_uid == uid and (task.phase in UNASSIGNED or task.phase is Phase.REQUEUEING):
                self._life.end(task, DELETED)

    def _running_on(self, node_addr: str) -> Iterator[tuple[OpenTask, OpenAttempt]]:
        for task in list(self._life.attempts.values()):
            attempt = task.attempt
            if attempt is not None and attempt.node_addr == node_addr and task.phase is Phase.RUNNING:
                yield task, attempt

    # Life.

    async def start(self) -> None:
        """Take up again what was open when the last process ended; once, after the fleet, before anything else."""
        async for page in self._store.open_tasks():
            for row in page:
                task = await taken_up(
                    row,
                    self._intake.next_place(),
                    self._store,
                    self._fleet,
                    graces=self._graces,
                    clock=self._clock(),
                    now=self._monotonic(),
                )
                self._life.resume(task)
        if self._life.tasks:
            log.info("tasks_taken_up", tasks=len(self._life.tasks), running=len(self._life.attempts))

    async def run(self) -> None:
        """Enforce times and do late reads, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(READERS):
                group.create_task(self._read_late(), name=f"dispatcher-reader-{number}")
            group.create_task(self._keep_time(), name="dispatcher-timer")

    async def _read_late(self) -> None:
        while True:
            read = await self._life.reads.get()
            await read()

    async def _keep_time(self) -> None:
        life = self._life
        while True:
            life.sooner.clear()
            until = life.tick()
            # Not wait_for, which in Python 3.11 may swallow a cancel.
            with suppress(TimeoutError):
                async with asyncio.timeout(None if until == inf else max(0.0, until - self._monotonic())):
                    await life.sooner.wait()

    def tick(self) -> None:
        """Do what is due now. `run` does so in time."""
        self._life.tick()

    async def stop(self) -> None:
        """Refuse new tasks, let ends that are being written reach the disk, answer who still waits with Unavailable.

        Before the callers' streams are closed: a caller whom we leave has not hung up.
        """
        self._stopping = True
        writing = [task.writing for task in self._life.tasks.values() if task.writing is not None]
        if writing:
            await asyncio.wait(writing, timeout=STOP_S)
        for task in self._life.tasks.values():
            refuse(
                task.take_waiters(),
                Unavailable(
                    f"The control plane is stopping; task {task.id} goes on: ask for it again.", retry_after_s=1.0
                ),
            )
