"""How far one exchange with a container has come, and why there is no answer: known, never guessed."""

import time
from collections.abc import Callable
from typing import Final

from ngpu.v1 import task_pb2

CUSTOMER: Final = task_pb2.CAUSE_CUSTOMER
PLATFORM: Final = task_pb2.CAUSE_PLATFORM


class NoAnswer(Exception):
    """There is no answer of the container: `reason` and `cause` as in task.proto, the message for a person."""

    def __init__(self, reason: str, cause: "task_pb2.Cause.ValueType", message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.cause = cause

    def failure(self) -> task_pb2.Failure:
        """As it travels."""
        return task_pb2.Failure(cause=self.cause, reason=self.reason, message=str(self))


class Course:
    """Where an exchange stands. Times are of `monotonic`; 0.0: not reached.

    `on_sent` is called once, when the whole request has been handed to the container's socket.
    """

    __slots__ = ("_monotonic", "_on_sent", "delivery", "first_byte_at", "last_byte_at", "received_bytes", "sent_at")

    def __init__(self, on_sent: Callable[[], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._on_sent = on_sent
        self.delivery: task_pb2.Delivery.ValueType = task_pb2.DELIVERY_NOT_SENT
        self.sent_at = 0.0
        self.first_byte_at = 0.0
        self.last_byte_at = 0.0
        #: Of the response's body.
        self.received_bytes = 0

    def begun(self) -> None:
        """A byte of the request has gone out."""
        self.delivery = task_pb2.DELIVERY_SENT_PARTLY

    def sent(self) -> None:
        """All of the request has gone out."""
        self.sent_at = self._monotonic()
        if self.delivery == task_pb2.DELIVERY_SENT_PARTLY:
            self.delivery = task_pb2.DELIVERY_SENT
        self._on_sent()

    def heard(self, *, answered: bool, ended: bool) -> None:
        """Something of an answer has come. Is its head complete, and is all of it?"""
        now = self._monotonic()
        if not self.first_byte_at:
            self.first_byte_at = now
        if answered:
            self.delivery = task_pb2.DELIVERY_ANSWERED
        if ended:
            self.last_byte_at = now
