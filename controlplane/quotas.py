"""How fast tasks may come, and how many of an account may wait: limits that are looked at before a task is accepted.

The length of a workspace's own queue is intake's. A task that is running is never ended by any of these.
"""

from collections.abc import Callable
from math import inf
from typing import Final

from controlplane.callers import Fleet
from controlplane.census import Workspace
from controlplane.errors import NgpuError, NotFound, QueueFull
from controlplane.queues import Queue, Queues

#: Tasks of one account that may wait, over all its workspaces.
ACCOUNT_QUEUE_LENGTH: Final = 20_000
#: So many seconds' worth of tasks may come at once.
BURST_S: Final = 1.0
#: What a sum of seconds may be off, from rounding.
CLOCK_S: Final = 1e-6
#: The queues of an account are counted anew this often; what is accepted between is added.
COUNT_S: Final = 0.1
#: When to try again with an account whose queues are full, in seconds.
RETRY_AFTER_S: Final = 5.0


class RateLimited(NgpuError):
    """Tasks of this workspace come faster than its limit `rate` allows; slow down, or ask its owner for more."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"


class AccountQueueFull(QueueFull):
    """As many tasks wait in all workspaces of this account as the operator allows; try again later."""

    reason = "ACCOUNT_QUEUE_FULL"


class Quotas:
    """Knows of each workspace when its next task is due, and of each account how many wait."""

    def __init__(
        self,
        queues: Queues,
        fleet: Fleet,
        *,
        monotonic: Callable[[], float],
        account_queue_length: int = ACCOUNT_QUEUE_LENGTH,
    ) -> None:
        self._queues = queues
        self._fleet = fleet
        self._monotonic = monotonic
        self._account_queue_length = account_queue_length
        #: By workspace: when its tasks would have come, had they come evenly at their rate.
        self._due: dict[str, float] = {}
        #: By account: how many wait, and until when that is believed.
        self._waiting: dict[str, tuple[int, float]] = {}

    def admit(self, workspace: Workspace, queue: Queue) -> None:
        """One more task. Raises RateLimited, AccountQueueFull.

        A workspace that has nothing in its queue may always add to it.
        """
        now = self._monotonic()
        due = max(self._due.get(workspace.uid, -inf), now)
        interval_s = 1 / workspace.spec.limits.rate
        wait_s = due + interval_s - now - BURST_S
        # More than what is left of adding so small numbers to a clock.
        if wait_s > CLOCK_S:
            raise RateLimited(retry_after_s=wait_s)
        if queue and workspace.spec.account:
            self._count(workspace.spec.account, now)
        self._due[workspace.uid] = due + interval_s

    def _count(self, account: str, now: float) -> None:
        waiting, until = self._waiting.get(account, (0, -inf))
        if until <= now:
            waiting = sum(len(queue) for queue in self._queues if queue and self._account_of(queue) == account)
            until = now + COUNT_S
        if waiting >= self._account_queue_length:
            raise AccountQueueFull(retry_after_s=RETRY_AFTER_S)
        self._waiting[account] = waiting + 1, until

    def _account_of(self, queue: Queue) -> str:
        try:
            return self._fleet.workspace(queue.workspace_uid).spec.account
        except NotFound:
            return ""
