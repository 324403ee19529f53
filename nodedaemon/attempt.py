"""One attempt while it runs, and the result it ends in."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from ngpu.v1 import node_pb2, task_pb2

from nodedaemon.connection import Address
from nodedaemon.course import CUSTOMER, PLATFORM, Course, NoAnswer
from nodedaemon.engine import Exit
from nodedaemon.jobs import Job

#: How long an attempt may run if its Start does not say.
RUN_TIME_LIMIT_MS: Final = 3_600_000


class Places(Protocol):
    """What attempts need to know of replicas."""

    def address(self, replica_id: str, port: int) -> Address | None:
        """Where to reach that port of a ready replica."""

    def container_id(self, replica_id: str) -> str:
        """The container that it has now; empty: none."""

    def gpu_ids(self, replica_id: str) -> tuple[str, ...]:
        """Its GPUs."""

    async def exited(self, replica_id: str, *, since: float, within_s: float) -> Exit | None:
        """Did its container end by itself at or after `since`? Waits up to `within_s` for the news."""


class GpuClock:
    """Shares the time of one replica's GPUs equally among the attempts that hold them at once.

    So what all attempts held adds up to the time the GPUs were held, whatever the concurrency.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._at = 0.0
        # The time that an attempt which was there from the beginning would have been given.
        self._shared = 0.0
        self.holders = 0

    def enter(self) -> float:
        """An attempt begins to hold the GPUs. Give the value to `leave`."""
        self._advance()
        self.holders += 1
        return self._shared

    def leave(self, entered: float) -> float:
        """It holds them no more: its share, in seconds."""
        self._advance()
        self.holders -= 1
        return self._shared - entered

    def _advance(self) -> None:
        now = self._monotonic()
        if self.holders:
            self._shared += (now - self._at) / self.holders
        self._at = now


class Attempt:
    """One attempt that runs."""

    def __init__(self, start: node_pb2.Start, course: Course, accepted_at: float) -> None:
        self.id = start.attempt_id
        self.replica_id = start.replica_id
        self.port = start.port
        self.limit_s = (start.run_time_limit_ms or RUN_TIME_LIMIT_MS) / 1000
        #: Longer than this is slow, and recorded; 0: never.
        self.record_after_s = start.record_after_ms / 1000
        self.course = course
        self.accepted_at = accepted_at
        #: What it may become; None: its container's answer is the end of it.
        self.job: Job | None = None
        #: Of its time, what was over before this daemon began.
        self.before_s = 0.0
        self.gpu_clock: GpuClock | None = None
        self.gpu_entered = 0.0
        self.gpu_held_s = 0.0
        self.interruption: NoAnswer | None = None
        # A task that is cancelled before its first step ends without a word.
        self.stepped = False
        self.given_up = False
        self.task: asyncio.Task[None]

    def interrupt(self, why: NoAnswer) -> None:
        """End it for that reason; the first one stays. Its container's connection is closed at once."""
        if self.interruption is None:
            self.interruption = why
            if self.stepped:
                self.task.cancel()

    def leave_gpus(self) -> None:
        """It holds them no more."""
        if self.gpu_clock is not None:
            self.gpu_held_s += self.gpu_clock.leave(self.gpu_entered)
            self.gpu_clock = None

    def outlasted(self, *, held_up: bool) -> None:
        """Its time is over. `held_up`: the node itself has kept the container waiting."""
        not_sent = self.course.delivery == task_pb2.DELIVERY_NOT_SENT
        where = "before the request could be sent" if not_sent else "before the container had answered"
        # What the platform held up is not the customer's fault.
        cause = PLATFORM if not_sent or held_up else CUSTOMER
        self.interrupt(NoAnswer("RUN_TIME_LIMIT", cause, f"The run time limit of {self.limit_s:g} s was over {where}."))

    def fill(self, result: node_pb2.Result, why: NoAnswer | None) -> None:
        """All of the result that is known besides an answer, which `why` replaces."""
        course, since = self.course, self.accepted_at
        if why is not None:
            result.ClearField("response")
            result.failure.CopyFrom(why.failure())
        if self.job is not None:
            result.job_id = self.job.id
        result.delivery = course.delivery
        if course.sent_at:
            result.sent_after_us = _us(course.sent_at - since)
        if course.first_byte_at:
            result.first_byte_after_us = _us(course.first_byte_at - since)
        if course.last_byte_at:
            result.last_byte_after_us = _us(course.last_byte_at - since)
        result.gpu_us = round(self.gpu_held_s * 1e6)


def exited(exit_: Exit) -> NoAnswer:
    """What a container's end means for what it worked on."""
    cause = PLATFORM if exit_.from_outside else CUSTOMER
    return NoAnswer("CONTAINER_EXITED", cause, f"The container {exit_.words} while it worked on the request.")


def _us(seconds: float) -> int:
    # 0 means: not reached.
    return max(1, round(seconds * 1e6))
