"""The failures that the control plane itself finds, each with its reason (task.proto, Failure) and a sentence."""

from typing import Final

from controlplane.model import Cause, State
from controlplane.slots import Failure

ATTEMPTS_USED_UP: Final = "ATTEMPTS_USED_UP"
BAD_RESPONSE: Final = "BAD_RESPONSE"
BUSY: Final = "BUSY"
CANCELLED: Final = "CANCELLED"
CONTAINER_EXITED: Final = "CONTAINER_EXITED"
HEDGED: Final = "HEDGED"
INTERNAL: Final = "INTERNAL"
JOB_FAILED: Final = "JOB_FAILED"
NODE_LOST: Final = "NODE_LOST"
OUTCOME_UNKNOWN: Final = "OUTCOME_UNKNOWN"
QUEUE_TIME_LIMIT: Final = "QUEUE_TIME_LIMIT"
REPLICA_LOST: Final = "REPLICA_LOST"
RESPONSE_TOO_LARGE: Final = "RESPONSE_TOO_LARGE"
RUN_TIME_LIMIT: Final = "RUN_TIME_LIMIT"
TOTAL_TIME_LIMIT: Final = "TOTAL_TIME_LIMIT"
WORKSPACE_DELETED: Final = "WORKSPACE_DELETED"

HUNG_UP: Final = Failure(Cause.CUSTOMER, CANCELLED, "The caller hung up before the answer.")
CALLED_OFF: Final = Failure(Cause.CUSTOMER, CANCELLED, "It was cancelled.")
DELETED: Final = Failure(Cause.CUSTOMER, WORKSPACE_DELETED, "Its workspace was deleted before it had run.")
UNRECORDED: Final = Failure(Cause.PLATFORM, INTERNAL, "It could not be recorded, and its caller was told so.")
UNSAID: Final = Failure(Cause.PLATFORM, INTERNAL, "Its node did not say what happened.")

LOST: Final = Failure(Cause.PLATFORM, NODE_LOST, "The node that ran it was lost.")
LOST_AT_START: Final = Failure(
    Cause.PLATFORM, NODE_LOST, "The node that ran it did not come back after the control plane was started anew."
)
LOST_BEFORE_SENT: Final = Failure(
    Cause.PLATFORM, NODE_LOST, "Its node was lost before the request could be sent to it."
)
NOT_ARRIVED: Final = Failure(Cause.PLATFORM, NODE_LOST, "Its node lost its connection before it had the request.")
NOT_HELD: Final = Failure(Cause.PLATFORM, NODE_LOST, "Its node does not know of it any more.")
CONTAINER_LOST: Final = Failure(Cause.PLATFORM, REPLICA_LOST, "The container that ran it was lost.")

OVERTAKEN: Final = Failure(Cause.PLATFORM, HEDGED, "It took long, and a second attempt elsewhere was answered first.")
HEDGE_UNUSED: Final = Failure(Cause.PLATFORM, HEDGED, "It was a second attempt, and the first one ended before it.")
HEDGE_OPEN: Final = Failure(
    Cause.PLATFORM, HEDGED, "It was a second attempt, and the control plane was started anew before it was heard of."
)


def queue_time(limit_s: float, why: str) -> Failure:
    """It has waited for too long. `why`: what it waited for."""
    message = f"It waited for {limit_s:g} s, its workspace's limit of the queue time: {why}."
    return Failure(Cause.PLATFORM, QUEUE_TIME_LIMIT, message)


def run_time(limit_s: float) -> Failure:
    """It has run for too long."""
    message = f"It ran for longer than {limit_s:g} s, its workspace's limit of the run time."
    return Failure(Cause.CUSTOMER, RUN_TIME_LIMIT, message)


def total_time(limit_s: float, cause: Cause) -> Failure:
    """It has taken too long altogether."""
    message = f"It had not ended after {limit_s:g} s, its workspace's limit of the total time."
    return Failure(cause, TOTAL_TIME_LIMIT, message)


def state_of(failure: Failure) -> State:
    """The terminal state of a task that ends with it."""
    return State.CANCELLED if failure.reason == CANCELLED else State.FAILED
