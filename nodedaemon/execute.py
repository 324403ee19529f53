"""Attempts: starts in, results out, in batches; over as many Execute streams as it takes.

Streams come and go under an attempt: a broken one is not a cancel. Each new one begins with all that is held, and every
result is sent on it again until it is acknowledged.
"""

import asyncio
import contextlib
import functools
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

import grpc
import structlog
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, task_pb2

from nodedaemon.attempt import Attempt, GpuClock, Places, exited
from nodedaemon.bulk import Bulk, GivenUp
from nodedaemon.course import CUSTOMER, PLATFORM, Course, NoAnswer
from nodedaemon.deadlines import Deadlines
from nodedaemon.dial import read, write
from nodedaemon.engine import Address, Exit
from nodedaemon.http1 import BadRequest, request_head
from nodedaemon.jobs import Job, Jobs
from nodedaemon.journal import Journal
from nodedaemon.relay import Exchange, Relay
from nodedaemon.spool import Body, Spool

ExecuteCall: TypeAlias = "grpc.aio.StreamStreamCall[node_pb2.ExecuteRequest, node_pb2.ExecuteResponse]"

log = structlog.get_logger()

#: Attempts at once on one node; capacities are far below it.
RUNNING_LIMIT: Final = 10_000
#: That a request is sent is told with the next result, or after this long. Most results come sooner and say it too.
SENT_DELAY_S: Final = 0.02
#: A connection that breaks may do so because its container exits; the engine says so within this time. A busy one takes
#: more than a second, and so does the end of a process that held a GPU.
EXIT_NEWS_S: Final = 3.0


class Executor:
    """Runs attempts and keeps their results until they are acknowledged. `run` must be running before the first start.

    `ended` counts attempts by reason of failure, "" for answers. `record` hears of those that failed or were slow.
    """

    def __init__(
        self,
        *,
        places: Places,
        relay: Relay,
        bulk: Bulk,
        spool: Spool,
        journal: Journal,
        record: Callable[[Attempt], None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._places = places
        self._relay = relay
        self._bulk = bulk
        self._spool = spool
        self._journal = journal
        self._record = record
        self._jobs = Jobs(relay=relay, places=places, journal=journal, monotonic=monotonic)
        self._monotonic = monotonic
        self._clock_ns = clock_ns
        self._group: asyncio.TaskGroup
        self._running: dict[str, Attempt] = {}
        self._deadlines = Deadlines()
        # By replica, for as long as an attempt holds its GPUs.
        self._gpu_clocks: WeakValueDictionary[str, GpuClock] = WeakValueDictionary()
        # Of attempts, running or ended, whose body is on its way to the control plane: their results wait for it.
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        # What the next frames carry; the results themselves lie in the spool.
        self._results: deque[str] = deque()
        self._begun: deque[str] = deque()
        self._sent: dict[str, None] = {}
        self._sent_ripe = False
        self._sent_timer: asyncio.TimerHandle | None = None
        self._frame_due = asyncio.Event()
        self._closed = False
        self._quiet = asyncio.Event()
        self.ended: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled. Takes up what an earlier daemon left."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for attempt_id in self._spool.attempts():
                body, result = self._spool.body(attempt_id), self._spool.result(attempt_id)
                if body and result:
                    self._deliver_soon(attempt_id, result.response, body)
            left = [attempt_id for attempt_id in self._journal.interrupted if attempt_id not in self._spool]
            jobs = {attempt_id: Job.noted(self._journal.notes.get(attempt_id, b"")) for attempt_id in left}
            at_once = Counter(job.start.replica_id for job in jobs.values() if job)
            for attempt_id, job in jobs.items():
                if job is not None:
                    self._go_on(job, at_once[job.start.replica_id])
                else:
                    # At least one byte may have gone out, and what came of it nobody knows.
                    result = node_pb2.Result(attempt_id=attempt_id, delivery=task_pb2.DELIVERY_SENT)
                    words = "The node's daemon was killed while the container worked on the request."
                    result.failure.CopyFrom(NoAnswer("NODE_LOST", PLATFORM, words).failure())
                    self._add(result)
            await asyncio.Event().wait()

    # What the control plane says.

    def start(self, start: node_pb2.Start) -> None:
        """Begin an attempt. Of one that is held already it changes nothing."""
        if start.attempt_id in self._running or start.attempt_id in self._spool:
            return
        course = Course(functools.partial(self._note_sent, start.attempt_id), self._monotonic)
        attempt = Attempt(start, course, self._monotonic())
        if start.HasField("job"):
            attempt.job = Job.of(start, self._clock_ns())
        try:
            exchange = self._exchange(attempt, start)
        except NoAnswer as why:
            self._end(attempt, node_pb2.Result(attempt_id=attempt.id), why)
            return
        self._running[attempt.id] = attempt
        attempt.task = self._group.create_task(self._run(attempt, exchange), name=attempt.id)

    def _go_on(self, job: Job, at_once: int) -> None:
        """With a job that an earlier daemon began, one of so many on its replica."""
        attempt_id, now = job.start.attempt_id, self._monotonic()
        course = Course(functools.partial(self._note_sent, attempt_id), self._monotonic)
        passed_s = min(max(0.0, (self._clock_ns() - job.begun_ns) / 1e9), job.start.run_time_limit_ms / 1000)
        attempt = Attempt(job.start, course, now - passed_s)
        attempt.job = job
        attempt.before_s = passed_s
        course.sent_at = course.first_byte_at = attempt.accepted_at
        course.answered()
        # How they shared the GPUs until now nobody knows any more.
        attempt.gpu_held_s = passed_s / at_once
        self._running[attempt_id] = attempt
        attempt.task = self._group.create_task(self._run(attempt, None), name=attempt_id)

    def cancel(self, attempt_id: str) -> None:
        """End an attempt; its result follows. Of one that has ended it changes nothing."""
        if attempt := self._running.get(attempt_id):
            attempt.interrupt(NoAnswer("CANCELLED", CUSTOMER, "The task was cancelled."))

    def acknowledge(self, attempt_id: str) -> None:
        """The attempt's end is on disk, or it is given up: forget it."""
        if attempt := self._running.get(attempt_id):
            attempt.given_up = True
            attempt.interrupt(GivenUp())
        self._forget(attempt_id)

    # What the node says.

    @property
    def taking(self) -> bool:
        """New attempts may start here."""
        return not self._refusal()

    @property
    def running(self) -> int:
        """How many attempts run."""
        return len(self._running)

    def held(self) -> list[str]:
        """Attempts that run, and those that have ended and are not acknowledged."""
        return [*self._running, *self._spool.attempts()]

    def container_exited(self, exit_: Exit) -> None:
        """A container ended by itself. Its connections break; what is left after EXIT_NEWS_S is ended here."""
        asyncio.get_running_loop().call_later(EXIT_NEWS_S, self._end_exited, exit_)

    def close(self) -> None:
        """Take no more."""
        self._closed = True
        self._check_quiet()

    async def finish(self, within_s: float) -> None:
        """After `close`: give what runs so long to end; the rest ends as lost with the node."""
        tasks = [attempt.task for attempt in self._running.values()]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=within_s)
        lost = NoAnswer("NODE_LOST", PLATFORM, "The node's daemon was stopped before the container had answered.")
        for attempt in self._running.values():
            attempt.interrupt(lost)
        if late:
            await asyncio.wait(late)

    async def quiet(self, within_s: float) -> bool:
        """After `finish`: wait so long until all that is held is acknowledged. False: something is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._quiet.wait()
        return self._quiet.is_set()

    # One stream.

    async def attend(self, call: ExecuteCall) -> None:
        """Serve one Execute stream until it ends. Raises a group with LinkLost or AioRpcError in it."""
        resume = node_pb2.Resume(running=list(self._running), ended=self._spool.attempts())
        await write(call, node_pb2.ExecuteRequest(resume=resume))
        self._results = deque(i for i in self._spool.attempts() if i not in self._deliveries)
        self._sent = dict.fromkeys(i for i, attempt in self._running.items() if attempt.course.sent_at)
        self._sent_ripe = True
        self._begun = deque(i for i, attempt in self._running.items() if attempt.job is not None)
        self._frame_due.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear(call), name="execute: hear")
            group.create_task(self._tell(call), name="execute: tell")

    async def _hear(self, call: ExecuteCall) -> None:
        while True:
            frame = await read(call)
            for start in frame.starts:
                self.start(start)
            for attempt_id in frame.cancels:
                self.cancel(attempt_id)
            for attempt_id in frame.acks:
                self.acknowledge(attempt_id)

    async def _tell(self, call: ExecuteCall) -> None:
        """Whatever waits goes in one frame; while that is on its way, more comes to wait."""
        while True:
            await self._frame_due.wait()
            self._frame_due.clear()
            while self._results or self._begun or (self._sent and self._sent_ripe):
                await write(call, self._frame())

    def _frame(self) -> node_pb2.ExecuteRequest:
        frame = node_pb2.ExecuteRequest()
        items = size = 0
        while self._begun and items < wire.BATCH_ITEMS:
            begun = self._running.get(self._begun.popleft())
            # The result of one that has ended says it, too.
            if begun is not None and begun.job is not None and begun.job.id:
                frame.jobs.add(attempt_id=begun.id, job_id=begun.job.id)
                items += 1
        while self._results and items < wire.BATCH_ITEMS and size < wire.BATCH_BYTES:
            attempt_id = self._results.popleft()
            result = self._spool.result(attempt_id)
            if result is not None:
                # It says that the request was sent, too.
                self._sent.pop(attempt_id, None)
                frame.results.append(result)
                items += 1
                size += len(result.response.body.inline)
        if self._sent_ripe:
            for attempt_id in list(itertools.islice(self._sent, wire.BATCH_ITEMS - items)):
                del self._sent[attempt_id]
                frame.sent.append(attempt_id)
            self._sent_ripe = bool(self._sent)
        return frame

    # One attempt.

    def _exchange(self, attempt: Attempt, start: node_pb2.Start) -> Exchange:
        """What is asked of the container. Raises NoAnswer if it cannot be asked.

        Nothing of `start` itself is kept: it would keep the whole frame that it came in.
        """
        address = self._places.address(start.replica_id, start.port)
        if address is None:
            raise NoAnswer("REPLICA_LOST", PLATFORM, "The replica is not ready on its node (any more).")
        if refusal := self._refusal():
            raise NoAnswer("REPLICA_LOST", PLATFORM, refusal)
        request, body = start.request, start.request.body
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        switches = start.streamed and any(header.name.lower() == "upgrade" for header in request.headers)
        try:
            head = request_head(request, f"{host}:{address[1]}", switches=switches)
        except BadRequest as fault:
            raise NoAnswer("INTERNAL", PLATFORM, f"The request cannot be written as HTTP: {fault}.") from None
        inline = body.inline
        return Exchange(
            container_id=self._places.container_id(start.replica_id),
            address=address,
            method=request.method,
            payload=head + inline,
            begin=functools.partial(self._begin, attempt, address),
            open_body=functools.partial(self._open_body, attempt),
            upload=self._bulk.fetch(attempt.id, len(inline), body.size) if body.size > len(inline) else None,
            limit_bytes=start.response_body_limit_bytes,
            streamed=start.streamed and attempt.job is None,
            open_tunnel=functools.partial(self._bulk.tunnel, attempt.id) if switches else None,
        )

    async def _run(self, attempt: Attempt, exchange: Exchange | None) -> None:
        """`exchange` is None where an earlier daemon did it."""
        attempt.stepped = True
        result = node_pb2.Result(attempt_id=attempt.id)
        left_s = attempt.limit_s - attempt.before_s
        self._deadlines.set(attempt.id, left_s, functools.partial(self._time_over, attempt))
        why = attempt.interruption
        try:
            if why is None:
                why = await self._relayed(attempt, exchange, result.response)
        except asyncio.CancelledError:
            why = attempt.interruption
            if why is None:
                raise
            attempt.task.uncancel()
            if attempt.job is not None:
                await self._jobs.call_off(attempt.job, why)
        except Exception:
            log.exception("attempt_broken", attempt=attempt.id)
            why = NoAnswer("INTERNAL", PLATFORM, "The node failed while it passed the request on; its log says why.")
        finally:
            self._deadlines.remove(attempt.id)
            attempt.leave_gpus()
            del self._running[attempt.id]
        self._end(attempt, result, why)

    async def _relayed(
        self, attempt: Attempt, exchange: Exchange | None, response: http_pb2.HttpResponse
    ) -> NoAnswer | None:
        """Fills in `response`, or says why there is none."""
        try:
            if exchange is not None:
                await self._relay.run(exchange, attempt.course, response)
            if attempt.job is not None:
                await self._jobs.follow(
                    attempt.job,
                    attempt.course,
                    response,
                    begun=functools.partial(self._job_begun, attempt),
                    open_body=functools.partial(self._open_body, attempt),
                )
        except NoAnswer as why:
            attempt.leave_gpus()
            return await self._explained(attempt, why) if why.reason == "CONNECTION_CLOSED" else why
        return None

    def _begin(self, attempt: Attempt, address: Address) -> None:
        """The container is about to see the attempt. Raises NoAnswer."""
        if self._places.address(attempt.replica_id, attempt.port) != address:
            # What we are connected to may be another's container.
            raise NoAnswer("REPLICA_LOST", PLATFORM, "The replica was lost before the request could be sent.")
        try:
            self._journal.begin(attempt.id)
        except OSError as fault:
            words = f"The node could not note the attempt in its journal: {fault.strerror}."
            raise NoAnswer("INTERNAL", PLATFORM, words) from None
        self._hold_gpus(attempt)

    def _hold_gpus(self, attempt: Attempt) -> None:
        if attempt.gpu_clock is None and self._places.gpu_ids(attempt.replica_id):
            clock = self._gpu_clocks.setdefault(attempt.replica_id, GpuClock(self._monotonic))
            attempt.gpu_clock, attempt.gpu_entered = clock, clock.enter()

    def _open_body(self, attempt: Attempt, head: http_pb2.HttpResponse) -> Body:
        """The answer's body needs a place of its own."""
        try:
            body = self._spool.begin_body(attempt.id)
        except OSError as fault:
            words = f"The node could not store the container's answer: {fault.strerror}."
            raise NoAnswer("INTERNAL", PLATFORM, words) from None
        self._deliver_soon(attempt.id, head, body)
        return body

    async def _explained(self, attempt: Attempt, why: NoAnswer) -> NoAnswer:
        """Why the connection closed, if there is more to say: the container exited, or the replica is lost."""
        exit_ = await self._places.exited(attempt.replica_id, since=attempt.accepted_at, within_s=EXIT_NEWS_S)
        if exit_ is not None:
            return exited(exit_)
        if self._places.address(attempt.replica_id, attempt.port) is None:
            return NoAnswer("REPLICA_LOST", PLATFORM, "The replica was lost while it worked on the request.")
        return why

    def _end(self, attempt: Attempt, result: node_pb2.Result, why: NoAnswer | None) -> None:
        """Keep the result until it is acknowledged."""
        if why is not None:
            self._drop_body(attempt.id)
        if attempt.given_up:
            self._forget(attempt.id)
        else:
            attempt.fill(result, why)
            self._add(result)
            if self._is_remarkable(attempt, why):
                self._record(attempt)

    def _is_remarkable(self, attempt: Attempt, why: NoAnswer | None) -> bool:
        """It has failed, or it was slow."""
        if why is not None:
            return why.reason != "CANCELLED"
        return 0 < attempt.record_after_s <= self._monotonic() - attempt.accepted_at

    def _add(self, result: node_pb2.Result) -> None:
        seconds, result.end_time.nanos = divmod(self._clock_ns(), 1_000_000_000)
        result.end_time.seconds = seconds
        self.ended[result.failure.reason] += 1
        self._spool.add(result)
        if result.attempt_id not in self._deliveries:
            self._results.append(result.attempt_id)
            self._frame_due.set()

    def _forget(self, attempt_id: str) -> None:
        self._drop_body(attempt_id)
        self._spool.forget(attempt_id)
        self._journal.end(attempt_id)
        self._sent.pop(attempt_id, None)
        self._check_quiet()

    # Bodies.

    def _deliver_soon(self, attempt_id: str, head: http_pb2.HttpResponse, body: Body) -> None:
        bare = http_pb2.HttpResponse()
        bare.CopyFrom(head)
        bare.body.ClearField("inline")
        name = f"deliver {attempt_id}"
        self._deliveries[attempt_id] = self._group.create_task(self._deliver(attempt_id, bare, body), name=name)

    def _drop_body(self, attempt_id: str) -> None:
        """No body of this attempt is wanted any more."""
        if delivery := self._deliveries.pop(attempt_id, None):
            delivery.cancel()
        self._spool.drop_body(attempt_id)

    async def _deliver(self, attempt_id: str, head: http_pb2.HttpResponse, body: Body) -> None:
        try:
            await self._bulk.deliver(attempt_id, head, body)
        except (NoAnswer, OSError) as fault:
            words = f"The container's answer could not be read from the node's disk: {fault}."
            why = fault if isinstance(fault, NoAnswer) else NoAnswer("INTERNAL", PLATFORM, words)
            if attempt := self._running.get(attempt_id):
                attempt.interrupt(why)
                return
            self._replace(attempt_id, why)
        self._deliveries.pop(attempt_id, None)
        if attempt_id in self._spool:
            self._results.append(attempt_id)
            self._frame_due.set()

    def _replace(self, attempt_id: str, why: NoAnswer) -> None:
        """An answer that was complete here cannot be had after all."""
        result = self._spool.result(attempt_id)
        self._spool.forget(attempt_id)
        if result is not None:
            result.ClearField("response")
            result.failure.CopyFrom(why.failure())
            self._spool.add(result)

    # Small things.

    def _refusal(self) -> str:
        if self._closed:
            return "The node's daemon is stopping."
        if self._spool.full:
            return "The node waits for the control plane to take its earlier answers."
        if len(self._running) >= RUNNING_LIMIT:
            return f"The node runs {RUNNING_LIMIT} attempts already."
        return ""

    def _time_over(self, attempt: Attempt) -> None:
        attempt.outlasted(held_up=self._spool.full)

    def _end_exited(self, exit_: Exit) -> None:
        for attempt in list(self._running.values()):
            if attempt.replica_id == exit_.replica_id and attempt.accepted_at <= exit_.at:
                attempt.interrupt(exited(exit_))

    def _note_sent(self, attempt_id: str) -> None:
        self._sent[attempt_id] = None
        if self._sent_timer is None:
            self._sent_timer = asyncio.get_running_loop().call_later(SENT_DELAY_S, self._ripen_sent)

    def _job_begun(self, attempt: Attempt) -> None:
        self._hold_gpus(attempt)
        self._begun.append(attempt.id)
        self._frame_due.set()

    def _ripen_sent(self) -> None:
        self._sent_timer = None
        if self._sent:
            self._sent_ripe = True
            self._frame_due.set()

    def _check_quiet(self) -> None:
        if self._closed and not self._running and not len(self._spool):
            self._quiet.set()
