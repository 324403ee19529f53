"""The product's own routing on the simulated fleet: its queue, slots, estimates, sizes and plan."""

import time
from datetime import UTC, datetime
from functools import partial
from math import inf

from controlplane import routing
from controlplane.lifecycle import PLAN_S
from controlplane.model import State
from controlplane.queues import Queue
from controlplane.sizes import LEAST_MEAN_S
from controlplane.slots import Slots, Start
from controlplane.spec import Limits
from controlplane.tasks import OpenTask, Phase
from scripts.bench.routing_fleet import REPLICAS, Fleet, Job

WORKSPACE = "w-1"
PATH = "/run"
_THEN = datetime(2000, 1, 1, tzinfo=UTC)
_LIMITS = Limits()


class _Link:
    """The way to a node: what would go over it the simulation does."""

    def start(self, start: Start) -> None:
        """See slots.Link."""

    def cancel(self, attempt_id: str) -> None:
        """See slots.Link."""

    def ack(self, attempt_id: str) -> None:
        """See slots.Link."""


class Product:
    """What intake, lifecycle and dispatcher do with a task between its arrival and its result, without disk and wire.

    `plan_s`: CPU seconds of all plans. `ahead`: slots may hold one task ahead.
    """

    def __init__(self, *, ahead: bool = True) -> None:
        self._ahead = ahead
        self._slots = Slots()
        self._queue = Queue(WORKSPACE)
        self._open: dict[int, tuple[OpenTask, Job]] = {}
        self.plan_s = 0.0
        for index in range(REPLICAS):
            self._slots.connect(f"n{index}", _Link(), "", (), 0.0)
            self._slots.known(str(index), WORKSPACE, f"n{index}", 0.0).capacity = 1
        self._pool = self._slots.pool(WORKSPACE)

    def arrive(self, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        task, pool = _task(job, fleet.now), self._pool
        if pool.mean_s >= LEAST_MEAN_S:
            task.features = pool.sizes.features(PATH, job.body)
            if task.features is not None:
                task.work = pool.sizes.work(task.features)
        self._open[job.number] = task, job
        self._queue.add(task)
        self._fill(fleet)

    def ended(self, index: int, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        task, _ = self._open.pop(job.number)
        self._slots.release(task.id, f"n{index}", fleet.now)
        replica = self._pool.replicas[str(index)]
        seconds = job.end - job.given - (job.begun - job.there)
        trip_s = seconds - (job.done - job.begun) if self._ahead else 0.0
        self._slots.observe(replica, seconds, fleet.now, task.work, task.features, trip_s=trip_s)
        self._fill(fleet)

    def _wake(self, fleet: Fleet) -> None:
        if fleet.now >= self._queue.due():
            self._fill(fleet)

    def _fill(self, fleet: Fleet) -> None:
        queue, pool = self._queue, self._pool
        if not queue:
            return
        began = time.thread_time()
        plan = routing.plan(queue.ready(), pool.replicas.values(), mean_s=pool.mean_s, now=fleet.now)
        self.plan_s += time.thread_time() - began
        for task, replica_id, _ in plan.bindings:
            self._give(task, replica_id, fleet)
        if self._ahead:
            replicas = pool.replicas.values()
            for task, replica_id, _ in routing.ahead(queue.ready(), replicas, mean_s=pool.mean_s, now=fleet.now):
                self._give(task, replica_id, fleet)
        queue.plan_at = fleet.now + max(plan.again_s, PLAN_S)
        if plan.again_s < inf:
            fleet.wake_at(queue.plan_at, partial(self._wake, fleet))

    def _give(self, task: OpenTask, replica_id: str, fleet: Fleet) -> None:
        self._queue.remove(task, served=True)
        self._slots.take(task.id, self._pool.replicas[replica_id], fleet.now, task.work)
        fleet.give(int(replica_id), self._open[task.place][1])


def _task(job: Job, now: float) -> OpenTask:
    return OpenTask(
        id=str(job.number),
        workspace_uid=WORKSPACE,
        workspace_name=WORKSPACE,
        place=job.number,
        port=80,
        request=None,
        repeatable=True,
        limits=_LIMITS,
        create_time=_THEN,
        accepted_at=now,
        total_at=inf,
        phase=Phase.WAITING,
        state=State.QUEUED,
    )
