"""What follows from a failed attempt: the task ends, or runs again and after how long. Pure.

The rules, in order: some failures are final by their nature; what never reached a container is always run elsewhere;
what a container has refused as busy is, and that uses nothing up; what
did reach one and must not be repeated is not; a task that took down its container on two nodes takes no third; what the
customer's side caused uses `max_attempts`, what the platform caused has a bound of its own.
"""

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


def _not_repeated(failure: Failure) -> Failure:
    if failure.reason in {NODE_LOST, REPLICA_LOST}:
        message = f"{failure.message} Whether the container ran the request is not known, and it may not be repeated."
        return Failure(failure.cause, OUTCOME_UNKNOWN, message)
    return Failure(
        failure.cause, failure.reason, f"{failure.message} It is not run again, since it may not be repeated."
    )


def _used_up(attempts: int, failure: Failure) -> Failure:
    return Failure(failure.cause, ATTEMPTS_USED_UP, f"{attempts} attempts failed; the last one: {failure.message}")
