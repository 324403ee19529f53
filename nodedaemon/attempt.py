"""One attempt while it runs, and the result it ends in."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from ngpu.v1 import node_pb2, task_pb2

from nodedaemon.connection import Address
from nodedaemon.course import CUSTOMER, PLATFORM, Course, NoAnswer
from nodedaemon.engine import Exit
from nodedaemon.held import Taken
from nodedaemon.jobs import ADOPT_LOOK_S, Job
from nodedaemon.relay import Exchange

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

    exchange: Exchange | None = None
    #: What it may become; None: its container's answer is the end of it.
    job: Job | None = None
    #: How long it waited here for a slot before `accepted_at`.
    waited_s = 0.0
    #: Of its time, what was over before this daemon began.
    before_s = 0.0
    gpu_clock: GpuClock | None = None
    gpu_entered = 0.0
    gpu_held_s = 0.0
    interruption: NoAnswer | None = None
    #: None: it waits for its container's answer without one, and `step_in` gives it one.
    task: asyncio.Task[None] | None = None
    step_in: "Callable[[Attempt], None]"
    # A task that is cancelled before its first step ends without a word.
    stepped = False
    given_up = False
    #: To the next daemon: no result follows.
    left = False

    def __init__(self, start: node_pb2.Start, course: Course, accepted_at: float) -> None:
        self.id = start.attempt_id
        self.replica_id = start.replica_id
        self.port = start.port
        self.limit_s = (start.run_time_limit_ms or RUN_TIME_LIMIT_MS) / 1000
        #: Longer than this is slow, and recorded; 0: never.
        self.record_after_s = start.record_after_ms / 1000
        self.course = course
        self.accepted_at = accepted_at

    @classmethod
    def waiting(cls, taken: Taken, course: Course, at_once: int, *, now: float) -> "Attempt":
        """One whose answer an earlier daemon waited for, with `at_once` of them on its replica."""
        attempt = cls(taken.errand.start, course, taken.errand.accepted_at)
        attempt.before_s = max(0.0, now - attempt.accepted_at)
        course.delivery, course.sent_at = task_pb2.DELIVERY_SENT, taken.begun_at
        if taken.errand.has_gpus:
            # How they shared the GPUs until now nobody knows any more.
            attempt.gpu_held_s = max(0.0, now - taken.begun_at) / at_once
        return attempt

    @classmethod
    def at_work(cls, job: Job, course: Course, at_once: int, *, now: float, passed_s: float) -> "Attempt":
        """One with a job that an earlier daemon began so long ago, one of `at_once` on its replica."""
        attempt = cls(job.start, course, now - passed_s)
        attempt.job = job
        attempt.before_s = passed_s
        course.sent_at = course.first_byte_at = attempt.accepted_at
        course.delivery = task_pb2.DELIVERY_ANSWERED
        attempt.gpu_held_s = passed_s / at_once
        return attempt

    def interrupt(self, why: NoAnswer) -> None:
        """End it for that reason; the first one stays. Its container's connection is closed at once."""
        if self.interruption is None:
            self.interruption = why
            if self.task is None:
                self.step_in(self)
            elif self.stepped:
                self.task.cancel()

    def leave(self) -> None:
        """Leave it to the next daemon, if that can go on with it: with a job, or a request that only waits."""
        connection = self.exchange.connection if self.exchange is not None else None
        if self.interruption is not None:
            return
        if (self.job is not None and self.job.id) or (connection is not None and connection.leave()):
            self.left = True
            if self.task is not None:
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
        # 0 means: not reached.
        if course.sent_at:
            result.sent_after_us = round((course.sent_at - since) * 1e6) or 1
        if course.first_byte_at:
            result.first_byte_after_us = round((course.first_byte_at - since) * 1e6) or 1
        if course.last_byte_at:
            result.last_byte_after_us = round((course.last_byte_at - since) * 1e6) or 1
        if self.gpu_held_s:
            result.gpu_us = round(self.gpu_held_s * 1e6)
        if self.waited_s:
            result.waited_us = round(self.waited_s * 1e6)


async def find_container(attempt: Attempt, container_id: str, places: Places) -> None:
    """Of an attempt that was taken up: end it if its replica has another by now. What ends later, the engine tells."""
    while attempt.task is not None and not attempt.task.done():
        now = places.container_id(attempt.replica_id)
        if now == container_id:
            return
        if now:
            words = "The container that worked on it was replaced while the node's daemon was down."
            attempt.interrupt(NoAnswer("REPLICA_LOST", PLATFORM, words))
            return
        await asyncio.sleep(ADOPT_LOOK_S)


def exited(exit_: Exit) -> NoAnswer:
    """What a container's end means for what it worked on."""
    cause = PLATFORM if exit_.from_outside else CUSTOMER
    return NoAnswer("CONTAINER_EXITED", cause, f"The container {exit_.words} while it worked on the request.")
