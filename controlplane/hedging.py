"""Second attempts: where one takes much longer than is usual, another begins elsewhere, and the first answer wins.

Off unless a workspace asks for it (`hedge`), and only for what may be repeated: a task that is answered in one piece by
any replica, while nobody waits for a slot. It is the platform's insurance: the attempt that was not needed is in the
ledger, and costs nothing.

A second attempt is no state of its task, whose row goes on to tell of the first. It is in the ledger before it begins,
as one of which nothing is known, so that a crash loses the attempt and not the knowledge of it: its node is told to end
it when it comes back. If the first attempt fails, the second is called off with it, and the task goes the usual way.
Its number is HEDGE more than the first one's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from math import inf
from typing import Final

from controlplane import routing
from controlplane.errors import NgpuError, Unavailable
from controlplane.failures import HEDGE_OPEN, HEDGE_UNUSED
from controlplane.ledger import Ledger
from controlplane.model import Attempt, Delivery
from controlplane.queues import Queues
from controlplane.slots import AttemptResult, Failure, Replica, Request, Slots, Start
from controlplane.store import Store
from controlplane.tasks import OpenAttempt, OpenTask, Phase, request_of_row

#: Added to the number of an attempt for that of its second.
HEDGE: Final = 1_000_000
#: Quicker than this nothing is hedged: it would end before it could be helped.
LEAST_S: Final = 0.1
#: Where there was no room for it, it is looked again after this.
LOOK_S: Final = 1.0
#: A row that the store did not take is given to it again after this.
AGAIN_S: Final = 1.0


class Hedges:
    """The second attempts that there are; at most one a task.

    `later`: takes what has to wait for the disk. `fill`: told of a workspace that has got a free slot.
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        queues: Queues,
        *,
        monotonic: Callable[[], float],
        later: Callable[[Callable[[], Awaitable[None]]], None],
        fill: Callable[[str], None],
        ledger: Ledger,
        begun: Callable[[OpenTask], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._queues = queues
        self._monotonic = monotonic
        self._later = later
        self._fill = fill
        self._ledger = ledger
        self._begun = begun
        #: By the second attempt's id.
        self.tasks: dict[str, OpenTask] = {}

    def after_s(self, task: OpenTask) -> float:
        """After how long a task is to get a second attempt. While nothing is known yet: when to ask again."""
        mean_s = self._slots.pool(task.workspace_uid).mean_s
        return max(LEAST_S, task.hedge_times * mean_s * task.work) if mean_s else LOOK_S

    def attend(self, task: OpenTask, now: float) -> None:
        """It has run for so long."""
        attempt = task.current
        if not self._slots.pool(task.workspace_uid).mean_s or not self._replicas(task):
            attempt.hedge_at = now + LOOK_S
        else:
            attempt.hedge_at = inf
            self._later(partial(self._begin, task, attempt))

    def _replicas(self, task: OpenTask) -> Sequence[Replica]:
        """Where it could go: to another node, and nowhere while others wait."""
        attempt = task.current
        if not task.recorded or attempt.head is not None or len(self._queues.of(task.workspace_uid)):
            return ()
        return [
            replica
            for replica in self._slots.pool(task.workspace_uid).replicas.values()
            if replica.free > 0 and not replica.failures and replica.node.addr != attempt.node_addr
        ]

    async def _begin(self, task: OpenTask, attempt: OpenAttempt) -> None:
        try:
            row = await self._store.task(task.id)
        except NgpuError:
            return
        if task.phase is not Phase.RUNNING or task.attempt is not attempt or task.hedge is not None or row is None:
            return
        replicas, request, now = self._replicas(task), request_of_row(row), self._monotonic()
        # One whose body does not lie in the row may be read once.
        if not replicas or request.size > len(request.body):
            return
        mean_s = self._slots.pool(task.workspace_uid).mean_s
        bindings = routing.plan((task,), replicas, mean_s=mean_s, now=now).bindings
        if not bindings:
            return
        (binding,) = bindings
        replica = next(replica for replica in replicas if replica.id == binding.replica_id)
        why = f"a second attempt, since the first has run for {now - attempt.given_at:.3g} s: {binding.reason}"
        hedge = task.hedge = self._ledger.begin(task, replica, why, attempt.number + HEDGE)
        self.tasks[hedge.id] = task
        self._slots.reserve(hedge.id, replica)
        try:
            await self._store.put_attempt(self._ledger.row(task, hedge, Delivery.SENT_PARTLY, None, HEDGE_OPEN))
        except NgpuError:
            self.drop(task)
            return
        if task.hedge is hedge:
            self._start(task, hedge, replica, request)

    def _start(self, task: OpenTask, hedge: OpenAttempt, replica: Replica, request: Request) -> None:
        link, now = self._slots.link(hedge.node_addr), self._monotonic()
        if link is None or not replica.has_room:
            # The node has gone; or a task that was sent ahead of this slot has it by now.
            self.drop(task)
            return
        hedge.given_at = now
        hedge.sent = True
        self._slots.take(hedge.id, replica, now, task.work)
        self._begun(task)
        link.start(
            Start(
                attempt_id=hedge.id,
                replica_id=replica.id,
                port=task.port,
                request=request,
                run_time_limit_s=task.limits.run_time_s,
                response_body_limit_bytes=task.limits.response_body_bytes,
            )
        )

    def drop(self, task: OpenTask, result: AttemptResult | None = None) -> None:
        """It is not needed any more, or has failed with that result. No error if there is none."""
        hedge = self.take(task)
        if hedge is None:
            return
        failure = HEDGE_UNUSED if result is None or result.failure is None else result.failure
        failure = Failure(HEDGE_UNUSED.cause, failure.reason, failure.message)
        delivery = Delivery.NOT_SENT if not hedge.sent else hedge.delivery if result is None else result.delivery
        if not hedge.sent:
            for uid in self._slots.release(hedge.id, hedge.node_addr, self._monotonic()):
                self._fill(uid)
        elif result is None and (link := self._slots.link(hedge.node_addr)) is not None:
            link.cancel(hedge.id)
        self._put(self._ledger.row(task, hedge, delivery, result, failure))

    def take(self, task: OpenTask) -> OpenAttempt | None:
        """Its second attempt, which it has no longer."""
        hedge, task.hedge = task.hedge, None
        if hedge is not None:
            del self.tasks[hedge.id]
        return hedge

    def _put(self, row: Attempt) -> None:
        try:
            self._store.put_attempt(row).add_done_callback(partial(self._done, row))
        except Unavailable:
            self._later(partial(self._again, row))

    def _done(self, row: Attempt, writing: "asyncio.Future[None]") -> None:
        if writing.cancelled() or isinstance(writing.exception(), Unavailable):
            self._later(partial(self._again, row))

    async def _again(self, row: Attempt) -> None:
        await asyncio.sleep(AGAIN_S)
        self._put(row)
