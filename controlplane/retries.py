"""What follows from a failed attempt: the task ends, or runs again and after how long. Pure.

The rules, in order: some failures are final by their nature; what never reached a container is always run elsewhere;
what a container has refused as busy is, and that uses nothing up; what
did reach one and must not be repeated is not; a task that took down its container on two nodes takes no third; what the
customer's side caused uses `max_attempts`, what the platform caused has a bound of its own.

So that an outage is not doubled by what it made fail, a workspace has a budget of what it runs again because of the
platform. What is over it is held back longer, and nothing worse: it is promised to run, so the budget bends before a
limit of the task's would end it.
"""

from math import inf
from typing import Final

import msgspec

from controlplane.failures import (
    ATTEMPTS_USED_UP,
    BAD_RESPONSE,
    BUSY,
    CANCELLED,
    CONTAINER_EXITED,
    JOB_FAILED,
    NODE_LOST,
    OUTCOME_UNKNOWN,
    REPLICA_LOST,
    RESPONSE_TOO_LARGE,
    RUN_TIME_LIMIT,
)
from controlplane.model import Cause, Delivery
from controlplane.slots import Failure

#: Attempts of one task that may fail without the customer's doing: more than any fault that passes, and still a bound.
PLATFORM_ATTEMPTS: Final = 20
#: Nodes on which a task's container died before the task is held to be the reason.
POISON_NODES: Final = 2
#: The wait before the second attempt; it doubles with each further one ...
FIRST_BACKOFF_S: Final = 0.1
#: ... up to this.
LONGEST_BACKOFF_S: Final = 30.0

#: In each BUDGET_S a workspace may run again RETRIES attempts that the platform has failed, and one more for each fifth
#: task that began in that time.
BUDGET_S: Final = 30.0
RETRIES: Final = 10
RETRY_SHARE: Final = 0.2
#: What is over the budget is held back at most so long, and at most this share of what a limit leaves it.
LONGEST_HOLD_S: Final = 60.0
HOLD_SHARE: Final = 0.25

#: Where the customer's side caused these, another attempt would end the same way.
FINAL: Final = frozenset({RUN_TIME_LIMIT, RESPONSE_TOO_LARGE, BAD_RESPONSE, CANCELLED, JOB_FAILED})


class History(msgspec.Struct, frozen=True):
    """The failed attempts of a task. `customers`: those that reached a container and failed by the customer's side."""

    customers: int = 0
    platforms: int = 0
    #: Nodes on which its container died under it.
    died_on: frozenset[str] = frozenset()
    #: Those that a container has refused as busy; only the task's time is their bound.
    refusals: int = 0

    @property
    def failures(self) -> int:
        """All of them."""
        return self.customers + self.platforms + self.refusals


NO_HISTORY: Final = History()


def after(history: History, *, delivery: Delivery, cause: int, reason: str, node_addr: str) -> History:
    """The history with one more failed attempt."""
    refused = reason == BUSY
    customers = cause == Cause.CUSTOMER and delivery is not Delivery.NOT_SENT and not refused
    return History(
        customers=history.customers + customers,
        platforms=history.platforms + (not customers and not refused),
        died_on=history.died_on | {node_addr} if reason == CONTAINER_EXITED else history.died_on,
        refusals=history.refusals + refused,
    )


def judge(
    history: History, *, repeatable: bool, max_attempts: int, delivery: Delivery, failure: Failure
) -> Failure | None:
    """The failure the task ends with, or None: run it again. `history` includes this attempt."""
    if failure.reason in FINAL and failure.cause is Cause.CUSTOMER:
        return failure
    if delivery is not Delivery.NOT_SENT and failure.reason != BUSY:
        if not repeatable:
            return _not_repeated(failure)
        if len(history.died_on) >= POISON_NODES:
            message = f"Its container died under it on {len(history.died_on)} nodes, so it is not run again."
            return Failure(Cause.CUSTOMER, CONTAINER_EXITED, f"{message} {failure.message}")
    if history.customers >= max_attempts and failure.cause is Cause.CUSTOMER:
        # With one attempt allowed, "used up" would only hide what happened.
        return failure if max_attempts <= 1 else _used_up(history.customers, failure)
    if history.platforms >= PLATFORM_ATTEMPTS:
        return _used_up(history.failures, failure)
    return None


def backoff_s(failures: int, jitter: float) -> float:
    """How long to wait after so many failed attempts (from 1). `jitter`: from 0 to 1, takes up to half of it away."""
    whole = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30))
    return whole * (1.0 - jitter / 2)


class Budget:
    """What a workspace may run again because of the platform. Times are monotonic seconds, and never go back.

    Counted in windows of BUDGET_S: this one, and of the one before as much as is less than BUDGET_S ago. In memory
    only: a new process begins with a fresh one.
    """

    __slots__ = ("_begun", "_begun_before", "_end", "_retried", "_retried_before")

    def __init__(self) -> None:
        self._end = -inf
        self._begun = self._begun_before = 0
        self._retried = self._retried_before = 0

    def begin(self, now: float) -> None:
        """A task has begun: its first attempt."""
        if now >= self._end:
            self._turn(now)
        self._begun += 1

    def hold_s(self, now: float, left_s: float) -> float:
        """An attempt is to run again: how much longer than its backoff it is held back. 0: it is within the budget.

        `left_s`: the time that its task has left.
        """
        if now >= self._end:
            self._turn(now)
        before = max(0.0, (self._end - now) / BUDGET_S)
        allowed = RETRIES + RETRY_SHARE * (self._begun + self._begun_before * before)
        over = self._retried + self._retried_before * before + 1 - allowed
        self._retried += 1
        # One after the other, as fast as the budget grows.
        return min(max(0.0, over * BUDGET_S / allowed), LONGEST_HOLD_S, max(0.0, left_s * HOLD_SHARE))

    def _turn(self, now: float) -> None:
        follows = now < self._end + BUDGET_S
        self._begun_before, self._retried_before = (self._begun, self._retried) if follows else (0, 0)
        self._begun = self._retried = 0
        self._end = (self._end if follows else now) + BUDGET_S


def _not_repeated(failure: Failure) -> Failure:
    if failure.reason in {NODE_LOST, REPLICA_LOST}:
        message = f"{failure.message} Whether the container ran the request is not known, and it may not be repeated."
        return Failure(failure.cause, OUTCOME_UNKNOWN, message)
    return Failure(
        failure.cause, failure.reason, f"{failure.message} It is not run again, since it may not be repeated."
    )


def _used_up(attempts: int, failure: Failure) -> Failure:
    return Failure(failure.cause, ATTEMPTS_USED_UP, f"{attempts} attempts failed; the last one: {failure.message}")
