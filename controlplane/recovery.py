"""What a new process makes of the rows of tasks that have not ended: the same tasks, with their times set anew.

The time in which no control plane ran was no fault of the tasks: queue times begin again, no total time ends before the
nodes have had the time to come back, and what ran is believed to run on until its node has said otherwise.
"""

from datetime import datetime

import msgspec

from controlplane import ids
from controlplane.callers import Fleet
from controlplane.errors import NotFound
from controlplane.failures import LOST_AT_START
from controlplane.hedging import HEDGE
from controlplane.model import Cause, State, Task
from controlplane.retries import NO_HISTORY, History, after
from controlplane.spec import Limits
from controlplane.store import Store
from controlplane.tasks import OpenAttempt, OpenTask, Phase, caller_of


class Graces(msgspec.Struct, frozen=True):
    """How long to wait for a node that is not connected, in seconds."""

    #: After its link broke.
    reconnect_s: float = 10.0
    #: After a start of the control plane.
    start_s: float = 60.0
    #: At least, with a task that may not be repeated.
    hold_s: float = 120.0


async def taken_up(
    row: Task, place: int, store: Store, fleet: Fleet, *, graces: Graces, clock: datetime, now: float
) -> OpenTask:
    """The open task of a row, WAITING or RUNNING. Its request stays on disk.

    `clock` and `now` are the same moment by either clock, `now` in monotonic seconds.
    """
    try:
        workspace = fleet.workspace(row.workspace_uid)
        name, limits, jobs = workspace.name, workspace.spec.limits, workspace.spec.jobs
    except NotFound:
        name, limits, jobs = row.workspace_uid, Limits(), ()
    accepted_at = now - _seconds(row.create_time, clock)
    task = OpenTask(
        id=row.id,
        workspace_uid=row.workspace_uid,
        workspace_name=name,
        place=place,
        port=row.port,
        request=None,
        repeatable=row.repeatable,
        limits=limits,
        create_time=row.create_time,
        accepted_at=accepted_at,
        total_at=max(accepted_at + limits.total_time_s, now + graces.start_s),
        phase=Phase.WAITING,
        state=State(row.state),
        recorded=True,
        streamed=row.streamed,
        jobs=jobs,
        cancel_on_hangup=row.cancel_on_hangup,
        callback_url=row.callback_url,
        caller=caller_of(row.btc_address, row.user_ip),
        priority=row.priority,
        number=row.attempt,
        start_time=row.start_time,
    )
    running = task.state is State.RUNNING
    if row.attempt > (1 if running else 0):
        await _remember(task, store)
    if running:
        assert row.assign_time is not None
        task.phase = Phase.RUNNING
        grace_s = graces.start_s if task.repeatable else max(graces.start_s, graces.hold_s)
        replica = fleet.replica(row.replica_id)
        task.attempt = OpenAttempt(
            id=ids.attempt_id(row.id, row.attempt),
            number=row.attempt,
            replica_id=row.replica_id,
            node_addr=row.node_addr,
            node_ip="",
            gpu_ids=() if replica is None else replica.gpu_ids,
            queue_time=task.queue_time or task.create_time,
            assign_time=row.assign_time,
            reason=row.assign_reason,
            given_at=now - _seconds(row.assign_time, clock),
            lost_at=now + grace_s,
            lost_by=LOST_AT_START,
        )
    return task


async def _remember(task: OpenTask, store: Store) -> None:
    """Its failed attempts, from the ledger."""
    history: History = NO_HISTORY
    for attempt in await store.attempts(task.id):
        if attempt.number >= HEDGE:
            # No failure of its task's: there was another that went on.
            continue
        history = after(
            history,
            delivery=attempt.delivery,
            cause=attempt.cause,
            reason=attempt.failure_reason,
            node_addr=attempt.node_addr,
        )
        task.avoid = (*task.avoid, attempt.replica_id)
        task.queue_time = attempt.end_time
        if attempt.cause == Cause.CUSTOMER:
            task.gpu_us += attempt.gpu_us
    task.history = history


def _seconds(since: datetime, until: datetime) -> float:
    return max(0.0, (until - since).total_seconds())
