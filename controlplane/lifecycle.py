"""Moves each task from phase to phase: what follows when a write is on disk, an attempt has failed or a time is over.

Rule of this file: what a caller or a node is told was on disk before. A slot is reserved, then the start written, then
the node told; an end is written, then callers are answered and the node may forget. The one exception makes the hot
path: a new task that finds a free slot at once (see intake).
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from math import inf
from typing import Any, Final, Protocol

from msgspec import structs

from controlplane import routing
from controlplane.callers import Callers, Fleet, refuse
from controlplane.doubts import Doubts
from controlplane.errors import NgpuError, NotFound, Unavailable
from controlplane.failures import (
    BUSY,
    DELETED,
    HUNG_UP,
    LOST_BEFORE_SENT,
    NODE_LOST,
    OVERTAKEN,
    queue_time,
    run_time,
    state_of,
    total_time,
)
from controlplane.hedging import Hedges
from controlplane.job_writes import JobWrites
from controlplane.jobs import begun_by
from controlplane.ledger import Ledger, Recorder
from controlplane.model import Cause, Delivery, Job, State
from controlplane.queues import Queue, Queues
from controlplane.receipts import TermsOf
from controlplane.retries import after, backoff_s, judge
from controlplane.slots import AttemptResult, Failure, Replica, Slots, Start
from controlplane.store import Store
from controlplane.tasks import (
    UNASSIGNED,
    OpenAttempt,
    OpenTask,
    Phase,
    end_of,
    request_of_row,
    webhook_of,
)
from controlplane.timers import Timers
from controlplane.writes import REWRITE_S, Writes

#: The node enforces the run time; the control plane steps in this much later.
RUN_GRACE_S: Final = 30.0
#: A response that is passed on as it comes waits so long for its caller, whose bridge may have died between its head
#: and its body. Longer than a bridge takes to find a control plane that was away (30 s, httpbridge/calls.py).
UNREAD_S: Final = 45.0
#: Where a task waits for a slot that is late although others are free, they are looked at again at most this often.
PLAN_S: Final = 0.05
#: What was sent ahead of its slot comes back unsent if that is not free within so many times what was expected, and at
#: least so long.
WAIT_TIMES: Final = 4
LEAST_WAIT_S: Final = 1.0
#: How often it is looked whether the silence of most nodes is over.
SILENCE_LOOK_S: Final = 1.0


class Metrics(Protocol):
    """Who counts."""

    def task_accepted(self, workspace: str) -> None:
        """A task is on its way to the disk."""

    def task_started(self, workspace: str, waited_s: float) -> None:
        """The first attempt was given to a node, so long after the task's acceptance."""

    def attempt_failed(self, workspace: str, reason: str) -> None:
        """An attempt ended without an answer of the container."""

    def retry_held(self, workspace: str) -> None:
        """An attempt that is to run again is held back: its workspace has run too much again lately."""

    def sent_ahead(self, workspace: str) -> None:
        """A task was sent to its node ahead of its slot."""

    def hedged(self, workspace: str, outcome: str) -> None:
        """Of a task's second attempt: `begun`, or `won`, if its answer was taken."""

    def task_ended(self, workspace: str, state: State, reason: str, seconds: float) -> None:
        """A task's end is on disk, so long after its acceptance. `reason`: of the failure, or empty."""


class Lifecycle:
    """All open tasks, and the steps they take. Methods are called in the event loop's thread; none waits."""

    def __init__(
        self,
        store: Store,
        slots: Slots,
        fleet: Fleet,
        queues: Queues,
        *,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        jitter: Callable[[], float],
        metrics: Metrics,
        terms: TermsOf,
        recorder: Recorder,
    ) -> None:
        self._store = store
        self._slots = slots
        self._fleet = fleet
        self._clock = clock
        self._monotonic = monotonic
        self._jitter = jitter
        self._metrics = metrics
        self.ledger = Ledger(slots, fleet, clock=clock, monotonic=monotonic, terms=terms, recorder=recorder)
        self.tasks: dict[str, OpenTask] = {}
        #: By attempt, from when its node is told until what came of it is on disk.
        self.attempts: dict[str, OpenTask] = {}
        self.queues = queues
        #: Set when the first timer has become earlier.
        self.sooner = asyncio.Event()
        self.doubts = Doubts(slots, wake=self.sooner.set)
        self.callers = Callers(
            self.queues, slots, fleet, self.doubts, monotonic=monotonic, heed=self.heed, hang_up=self.hang_up
        )
        #: What must be read from the store before a task goes on. Bounded by slots, and by callers with a key.
        self.reads: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._jobs = JobWrites(store, self.reads.put_nowait)
        self.hedges = Hedges(
            store,
            slots,
            queues,
            monotonic=monotonic,
            later=self.reads.put_nowait,
            fill=self.fill,
            ledger=self.ledger,
            begun=lambda task: metrics.hedged(task.workspace_name, "begun"),
        )
        self._writes = Writes(monotonic=monotonic, heed=self.heed, stale=self._stale)
        self._timers: Timers[OpenTask | Queue] = Timers()
        #: Whether most nodes are silent, if that has been asked in this tick.
        self._silence: bool | None = None

    # -- from the queue to a slot

    def record_again(self, task: OpenTask, write: "Callable[[], asyncio.Future[Any]]") -> None:
        """Its insert, with an idempotency key, may be on disk or not: give it to the store anew."""
        self._writes.begin_later(task, write)

    def enqueue(self, task: OpenTask) -> None:
        """Into its queue."""
        self.queues.enter(task, self._monotonic())
        self.heed(task)

    def fill(self, workspace_uid: str) -> None:
        """Give the free slots of a workspace to its waiting tasks."""
        queue = self.queues.of(workspace_uid)
        if not queue:
            return
        pool = self._slots.pool(workspace_uid)
        if not pool.replicas:
            self._fleet.call(workspace_uid)
            return
        now = self._monotonic()
        plan = routing.plan(queue.ready(), pool.replicas.values(), mean_s=pool.mean_s, now=now)
        if not plan.bindings:
            # Those that are left may be on their way out.
            self._fleet.call(workspace_uid)
        for task, replica_id, reason in plan.bindings:
            self._assign(task, pool.replicas[replica_id], reason)
        for task, replica_id, wait_s in routing.ahead(
            queue.ready(), pool.replicas.values(), mean_s=pool.mean_s, now=now
        ):
            reason = f"ahead of a slot that should be free in {wait_s:.3g} s"
            self._assign(task, pool.replicas[replica_id], reason, _wait_limit_s(wait_s))
        queue.plan_at = now + max(plan.again_s, PLAN_S)
        if plan.again_s < inf:
            self.heed(queue)

    def place(self, task: OpenTask, replica: Replica, reason: str) -> OpenAttempt:
        """The task's next attempt, on that replica."""
        task.attempt = self.ledger.begin(task, replica, reason, task.number + 1)
        return task.attempt

    def _assign(self, task: OpenTask, replica: Replica, reason: str, wait_limit_s: float = 0.0) -> None:
        self.queues.leave(task, served=True)
        task.move(Phase.ASSIGNING)
        attempt = self.place(task, replica, reason)
        attempt.wait_limit_s = wait_limit_s
        self._slots.reserve(attempt.id, replica)
        write = partial(
            self._store.assign,
            task.id,
            attempt.number,
            replica_id=attempt.replica_id,
            node_addr=attempt.node_addr,
            assign_time=attempt.assign_time,
            reason=reason,
        )
        self._writes.begin(task, write, self._assigned)

    def _assigned(self, task: OpenTask) -> None:
        self.mark_running(task)
        self.callers.answer_due(task)
        if task.request is None and task.wanted is None:
            self.reads.put_nowait(partial(self._load, task))
        else:
            self.send(task)

    async def _load(self, task: OpenTask) -> None:
        """Read its request, which is not held in memory, and send it."""
        try:
            row = await self._store.task(task.id)
        except Unavailable:
            await asyncio.sleep(REWRITE_S)
            self.reads.put_nowait(partial(self._load, task))
            return
        assert row is not None
        task.request = request_of_row(row)
        self.send(task)

    def mark_running(self, task: OpenTask) -> None:
        """Its row says so, or its insert will."""
        attempt = task.current
        task.state = State.RUNNING
        task.number = attempt.number
        if task.start_time is None:
            task.start_time = attempt.assign_time

    def send(self, task: OpenTask) -> None:
        """Tell the node of the attempt."""
        attempt, request = task.attempt, task.request
        assert attempt is not None
        now = self._monotonic()
        link = self._slots.link(attempt.node_addr)
        replica = self._slots.replica(attempt.replica_id)
        if task.wanted is not None:
            self._slots.release(attempt.id, attempt.node_addr, now)
            self._finish(task, Delivery.NOT_SENT, task.wanted)
        elif link is None or replica is None or request is None:
            self._slots.release(attempt.id, attempt.node_addr, now)
            self.fail(task, Delivery.NOT_SENT, LOST_BEFORE_SENT)
        else:
            task.move(Phase.RUNNING)
            limits = task.limits
            attempt.written_s = now - attempt.given_at
            attempt.given_at = now
            if replica.has_room:
                # It has a slot by now.
                attempt.wait_limit_s = 0.0
            elif not (attempt.wait_limit_s or task.pin):
                # One sent ahead of its slot was there before it, since its own request had to be read first.
                attempt.wait_limit_s = _wait_limit_s(self._slots.pool(task.workspace_uid).mean_s)
            attempt.run_at = now + attempt.wait_limit_s + limits.run_time_s + RUN_GRACE_S
            slow_s = self.ledger.slow_s(task.workspace_uid)
            attempt.slow_us = slow_s * 1e6
            if task.hedge_times:
                attempt.hedge_at = now + self.hedges.after_s(task)
            self._slots.take(attempt.id, replica, now, task.work)
            self.attempts[attempt.id] = task
            task.request = None
            job = begun_by(task.jobs, request.method, request.path) if task.jobs else None
            link.start(
                Start(
                    attempt_id=attempt.id,
                    replica_id=replica.id,
                    port=task.port,
                    request=request,
                    run_time_limit_s=min(job.limit_s, limits.run_time_s) if job and job.limit_s else limits.run_time_s,
                    response_body_limit_bytes=limits.response_body_bytes,
                    streamed=task.streamed,
                    record_after_s=slow_s,
                    job=job,
                    concurrency=max(replica.capacity, 1) if attempt.wait_limit_s else 0,
                    wait_limit_s=attempt.wait_limit_s,
                )
            )
            if attempt.wait_limit_s:
                self._metrics.sent_ahead(task.workspace_name)
            if attempt.number == 1:
                self.queues.of(task.workspace_uid).budget.begin(now)
                self._metrics.task_started(task.workspace_name, now - task.accepted_at)
            self.heed(task)
            return
        self.fill(task.workspace_uid)

    def resume(self, task: OpenTask) -> None:
        """Take up a task of an earlier process: WAITING, or RUNNING on a node that has not come back yet."""
        self.tasks[task.id] = task
        attempt = task.attempt
        if attempt is not None:
            self.attempts[attempt.id] = task
            if self._fleet.replica(attempt.replica_id) is not None:
                now = self._monotonic()
                replica = self._slots.known(attempt.replica_id, task.workspace_uid, attempt.node_addr, now)
                self._slots.take(attempt.id, replica, now)
            self.heed(task)
            return
        self.enqueue(task)
        if self._is_gone(task.workspace_uid):
            self.end(task, DELETED)

    def _is_gone(self, workspace_uid: str) -> bool:
        try:
            return self._fleet.workspace(workspace_uid).deleted
        except NotFound:
            return True

    # -- what came of an attempt

    def complete(self, task: OpenTask, result: AttemptResult) -> None:
        """The container has answered."""
        task.response = result.response
        meter = task.current.meter
        if meter is not None and result.response is not None:
            task.response = structs.replace(result.response, size=meter.response_bytes)
        self._finish(task, result.delivery, None, result)

    def fail(self, task: OpenTask, delivery: Delivery, failure: Failure, result: AttemptResult | None = None) -> None:
        """The attempt has failed: the task runs again, or ends."""
        attempt = task.current
        self._metrics.attempt_failed(task.workspace_name, failure.reason)
        task.history = after(
            task.history, delivery=delivery, cause=failure.cause, reason=failure.reason, node_addr=attempt.node_addr
        )
        verdict = judge(
            task.history,
            repeatable=task.repeatable,
            max_attempts=task.limits.max_attempts,
            delivery=delivery,
            failure=failure,
        )
        if verdict is None and self._is_gone(task.workspace_uid):
            verdict = DELETED
        if task.streamed and attempt.head is not None:
            # Its caller has the beginning of that answer: no other can take its place.
            verdict = verdict or failure
        if task.pin:
            verdict = failure
        if verdict is not None:
            self._finish(task, delivery, verdict, result, failure)
            return
        task.move(Phase.REQUEUEING)
        task.failure = failure
        if attempt.replica_id not in task.avoid:
            task.avoid = (*task.avoid, attempt.replica_id)
        self.hedges.drop(task)
        row = self.ledger.end(task, delivery, result, failure)
        if failure.cause is Cause.CUSTOMER:
            task.gpu_us += row.gpu_us
        task.queue_time = row.end_time
        self._writes.begin(task, partial(self._store.requeue, row), self._requeued)

    def _requeued(self, task: OpenTask) -> None:
        self.attempts.pop(task.current.id, None)
        self._ack(task.current)
        task.move(Phase.WAITING)
        task.state = State.QUEUED
        task.attempt = None
        wanted, task.wanted = task.wanted, None
        if wanted is not None:
            self.end(task, wanted)
            return
        task.ready = False
        now = self._monotonic()
        hold_s = self._hold_s(task, now)
        task.held = hold_s > 0
        task.ready_at = now + backoff_s(task.history.failures, self._jitter()) + hold_s
        self.enqueue(task)
        self.callers.answer_due(task)

    def _hold_s(self, task: OpenTask, now: float) -> float:
        failure = task.failure
        if failure is None or failure.cause is not Cause.PLATFORM or failure.reason == BUSY:
            return 0.0
        left_s = min(task.limits.queue_time_s, task.total_at - now)
        hold_s = self.queues.of(task.workspace_uid).budget.hold_s(now, left_s)
        if hold_s:
            self._metrics.retry_held(task.workspace_name)
        return hold_s

    def begun(self, task: OpenTask, job_id: str) -> None:
        """The container works on it by itself, under that id. Said again it changes nothing."""
        attempt = task.current
        if attempt.job_id != job_id:
            attempt.job_id = job_id
            self._jobs.put(
                Job(
                    workspace_uid=task.workspace_uid,
                    id=job_id,
                    task_id=task.id,
                    attempt=attempt.number,
                    replica_id=attempt.replica_id,
                    node_addr=attempt.node_addr,
                )
            )

    def _lose(self, task: OpenTask, now: float) -> None:
        """Nothing is to be heard of the attempt any more."""
        attempt = task.current
        failure = attempt.lost_by
        assert failure is not None
        if failure.reason == NODE_LOST and self._is_silence(now):
            attempt.lost_at = now + SILENCE_LOOK_S
            return
        self._call_off(attempt)
        self.fail(task, attempt.delivery, failure)

    def _is_silence(self, now: float) -> bool:
        # Asked once for all tasks of a tick: in a silence that is every running task of the fleet.
        if self._silence is None:
            self._silence = self._slots.most_are_silent(now)
        return self._silence

    # -- the end

    def end(self, task: OpenTask, failure: Failure) -> None:
        """End the task without an answer: cancelled, or over a limit. Nothing happens if it is about to end."""
        recording = task.phase is Phase.RECORDING and task.write is not None
        if recording or task.phase in {Phase.ASSIGNING, Phase.REQUEUEING}:
            task.wanted = task.wanted or failure
        elif task.phase is Phase.RUNNING:
            attempt = task.current
            self._call_off(attempt)
            self._finish(task, attempt.delivery, failure, attempt_failure=failure)
        elif task.phase in UNASSIGNED:
            self.queues.leave(task)
            task.move(Phase.ENDING)
            task.failure = failure
            task.end = end_of(state_of(failure), self._clock(), task.gpu_us, None, failure)
            self._writes.begin(
                task, partial(self._store.end_queued, task.id, task.end, webhook_of(task, task.end)), self._ended
            )

    def _finish(
        self,
        task: OpenTask,
        delivery: Delivery,
        failure: Failure | None,
        result: AttemptResult | None = None,
        attempt_failure: Failure | None = None,
    ) -> None:
        """End the task with its attempt. The slot stays taken until its node has said that the attempt is over."""
        task.move(Phase.ENDING)
        self.hedges.drop(task)
        row = self.ledger.end(task, delivery, result, attempt_failure or failure)
        total_us = task.gpu_us if row.cause == Cause.PLATFORM else task.gpu_us + row.gpu_us
        task.failure = failure
        state = State.COMPLETED if failure is None else state_of(failure)
        task.end = end_of(state, row.end_time, total_us, task.response, failure, meter=task.current.meter)
        self._writes.begin(task, partial(self._store.finish, row, task.end, webhook_of(task, task.end)), self._ended)

    def hedged(self, task: OpenTask, node_addr: str, result: AttemptResult) -> None:
        """A second attempt has ended: it ends the task if it was answered before the first, and well."""
        hedge, response = task.hedge, result.response
        assert hedge is not None
        well = response is not None and response.status < 500 and response.size == len(response.body)
        if not well or response is None or task.phase is not Phase.RUNNING or task.current.head is not None:
            # Its answer would have to be read from elsewhere than its task's, or is none.
            self.hedges.drop(task, result)
            if (link := self._slots.link(node_addr)) is not None:
                link.ack(hedge.id)
            return
        task.winner = self.hedges.take(task)
        self._metrics.hedged(task.workspace_name, "won")
        task.response = response
        task.move(Phase.ENDING)
        first = self.ledger.end(task, task.current.delivery, None, OVERTAKEN)
        second = self.ledger.row(task, hedge, result.delivery, result, None)
        task.end = end_of(State.COMPLETED, second.end_time, task.gpu_us + second.gpu_us, response, None)
        write = partial(self._store.finish, first, task.end, webhook_of(task, task.end), hedge=second)
        self._writes.begin(task, write, self._ended)

    def _ended(self, task: OpenTask) -> None:
        assert task.end is not None
        task.state = task.end.state
        self._remove(task)
        if task.winner is not None:
            self._call_off(task.current)
            if (link := self._slots.link(task.winner.node_addr)) is not None:
                link.ack(task.winner.id)
        self.callers.answer_all(task)
        seconds = self._monotonic() - task.accepted_at
        self._metrics.task_ended(task.workspace_name, task.state, task.failure.reason if task.failure else "", seconds)
        self._clear(task)

    def forget(self, task: OpenTask, error: BaseException) -> None:
        """There is no such task on disk, or not as we know it."""
        if task.phase is Phase.ENDED:
            return
        self.queues.leave(task)
        attempt = task.attempt
        if attempt is not None and task.phase is Phase.ASSIGNING:
            self._slots.release(attempt.id, attempt.node_addr, self._monotonic())
        if attempt is not None and task.phase is Phase.RUNNING:
            self._call_off(attempt)
        self._remove(task)
        refuse(task.take_waiters(), error)
        self._clear(task)
        self.fill(task.workspace_uid)

    def _remove(self, task: OpenTask) -> None:
        task.move(Phase.ENDED)
        self.hedges.drop(task)
        self.tasks.pop(task.id, None)
        if task.attempt is not None:
            self.attempts.pop(task.attempt.id, None)
            self._ack(task.attempt)

    def _clear(self, task: OpenTask) -> None:
        # A timer may hold it for a while.
        task.request = task.response = task.end = task.write = task.then = None

    def _call_off(self, attempt: OpenAttempt) -> None:
        link = self._slots.link(attempt.node_addr)
        if link is not None:
            link.cancel(attempt.id)

    def _ack(self, attempt: OpenAttempt) -> None:
        link = self._slots.link(attempt.node_addr)
        if attempt.answered and link is not None:
            link.ack(attempt.id)

    def hang_up(self, task: OpenTask) -> None:
        """The one caller that it is for has gone: that ends it, unless its workspace says otherwise."""
        try:
            cancels = self._fleet.workspace(task.workspace_uid).spec.cancel_on_hangup
        except NotFound:
            cancels = True
        if cancels:
            self.end(task, HUNG_UP)

    def _stale(self, task: OpenTask) -> None:
        self.forget(task, NgpuError())

    # -- time

    def heed(self, task: OpenTask | Queue) -> None:
        """Its next time may have become earlier."""
        if self._timers.set(task):
            self.sooner.set()

    def tick(self) -> float:
        """Do what is due. Gives the monotonic time when to come again; inf: not before `sooner`."""
        now = self._monotonic()
        self._silence = None
        while (task := self._timers.pop(now)) is not None:
            if isinstance(task, Queue):
                self.fill(task.workspace_uid)
            else:
                self._attend(task, now)
            self.heed(task)
        for uid in self.doubts.look(now):
            self.fill(uid)
        return min(self._timers.next(), self.doubts.next(now))

    def _attend(self, task: OpenTask, now: float) -> None:
        self.callers.answer_due(task)
        if task.write_at <= now:
            self._writes.try_again(task)
        elif task.phase is Phase.WAITING:
            if task.total_at <= now:
                self.end(task, total_time(task.limits.total_time_s, Cause.PLATFORM))
            elif task.queue_at <= now:
                why = self.callers.why(self.queues.of(task.workspace_uid))
                self.end(task, queue_time(task.limits.queue_time_s, why))
            elif task.ready_at <= now:
                task.ready = True
                task.ready_at = inf
                self.fill(task.workspace_uid)
        elif task.phase is Phase.RUNNING:
            attempt = task.current
            if task.total_at <= now:
                cause = Cause.CUSTOMER if attempt.lost_by is None else Cause.PLATFORM
                self.end(task, total_time(task.limits.total_time_s, cause))
            elif attempt.lost_at <= now:
                self._lose(task, now)
            elif attempt.run_at <= now:
                self.end(task, run_time(task.limits.run_time_s))
            elif attempt.hedge_at <= now:
                self.hedges.attend(task, now)
            elif attempt.unread_at <= now:
                attempt.unread_at = inf
                self.hang_up(task)


def _wait_limit_s(expected_s: float) -> float:
    """How long what was sent ahead of its slot waits for it at its node, if that should take so long."""
    return max(WAIT_TIMES * expected_s, LEAST_WAIT_S)
