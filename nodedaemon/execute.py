"""Attempts: starts in, results out, in batches; over as many Execute streams as it takes.

Streams come and go under an attempt: a broken one is not a cancel. Each new one begins with all that is held, and every
result is sent on it again until it is acknowledged.
"""

import asyncio
import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Final
from weakref import WeakValueDictionary

import structlog
from ngpu.v1 import http_pb2, node_pb2, task_pb2

from nodedaemon.ahead import Ahead
from nodedaemon.attempt import Attempt, GpuClock, Places, exited, find_container
from nodedaemon.bulk import Bulk, GivenUp
from nodedaemon.course import CUSTOMER, PLATFORM, Course, NoAnswer
from nodedaemon.deadlines import Deadlines
from nodedaemon.dial import read, write
from nodedaemon.engine import Address, Exit
from nodedaemon.errand import pack
from nodedaemon.frames import ExecuteCall, Frames
from nodedaemon.held import Taken
from nodedaemon.http1 import BadRequest, request_head
from nodedaemon.jobs import Job, Jobs
from nodedaemon.journal import Journal
from nodedaemon.relay import Exchange, Relay, rest_of
from nodedaemon.spool import Body, Spool

log = structlog.get_logger()

#: Attempts at once on one node; capacities are far below it.
RUNNING_LIMIT: Final = 10_000
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
        taken: Iterable[Taken] = (),
        record: Callable[[Attempt], None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._places = places
        self._relay = relay
        self._bulk = bulk
        self._spool = spool
        self._journal = journal
        self._taken = tuple(taken)
        self._record = record
        self._jobs = Jobs(relay=relay, places=places, journal=journal, monotonic=monotonic)
        self._monotonic = monotonic
        self._clock_ns = clock_ns
        self._group: asyncio.TaskGroup
        self._running: dict[str, Attempt] = {}
        self._ahead = Ahead()
        self._deadlines = Deadlines()
        # By replica, for as long as an attempt holds its GPUs.
        self._gpu_clocks: WeakValueDictionary[str, GpuClock] = WeakValueDictionary()
        # Of attempts, running or ended, whose body is on its way to the control plane: their results wait for it.
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        # What is to be told; the results themselves lie in the spool.
        self._frames = Frames(spool.result, self._job_id)
        # To the next daemon.
        self._left: list[str] = []
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
            notes = self._journal.notes
            interrupted = [attempt_id for attempt_id in self._journal.interrupted if attempt_id not in self._spool]
            waiting = self._take_up([attempt_id for attempt_id in interrupted if attempt_id not in notes])
            jobs = {i: Job.noted(notes.get(i, b"")) for i in interrupted if i not in waiting}
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
            try:
                await asyncio.Event().wait()
            finally:
                if not self._closed:
                    # The daemon fails: that costs no more than its being killed.
                    self._leave()

    # What the control plane says.

    def start(self, start: node_pb2.Start) -> None:
        """Begin an attempt, or let it wait for its slot. Of one that is held already it changes nothing."""
        attempt_id = start.attempt_id
        if attempt_id in self._running or attempt_id in self._ahead or attempt_id in self._spool:
            return
        if start.concurrency and self._must_wait(start):
            self._ahead.add(start, self._monotonic())
            self._deadlines.set(attempt_id, start.wait_limit_ms / 1000, self._waited_long)
            return
        self._begin_now(start)

    def _must_wait(self, start: node_pb2.Start) -> bool:
        """For others on its replica; what cannot begin at all need not."""
        at_work = sum(attempt.replica_id == start.replica_id for attempt in self._running.values())
        return at_work >= start.concurrency and not self._refusal()

    def _begin_now(self, start: node_pb2.Start, waited_s: float = 0.0) -> None:
        attempt = Attempt(start, self._course(start.attempt_id), self._monotonic())
        attempt.waited_s = waited_s
        if start.HasField("job"):
            attempt.job = Job.of(start, self._clock_ns())
        try:
            exchange = self._exchange(attempt, start)
            # Most wait for a small answer on a connection that is there: that takes no task.
            then = functools.partial(self._answered, attempt)
            begun = attempt.job is None and self._relay.begin_now(exchange, attempt.course, then)
        except NoAnswer as why:
            attempt.leave_gpus()
            self._end(attempt, node_pb2.Result(attempt_id=attempt.id), why)
            return
        self._enter(attempt, exchange)
        if not begun:
            self._step_in(attempt)

    def _give_slot(self, replica_id: str) -> None:
        """An attempt there is over: what waited for that begins."""
        while self._ahead and (start := self._ahead.first(replica_id)) is not None and not self._must_wait(start):
            self._begin_waiting(start.attempt_id)

    def _begin_waiting(self, attempt_id: str) -> None:
        waiting = self._ahead.pop(attempt_id, None)
        if waiting is not None:
            self._deadlines.remove(attempt_id)
            self._begin_now(waiting.start, self._monotonic() - waiting.since)

    def _waited_long(self, attempt_id: str) -> None:
        words = "It waited at its node for a slot, which was not free for longer than expected."
        self._end_waiting(attempt_id, NoAnswer("BUSY", PLATFORM, words))

    def _end_waiting(self, attempt_id: str, why: NoAnswer) -> None:
        """It does not begin. Nothing happens if it waits no more."""
        waiting = self._ahead.pop(attempt_id, None)
        if waiting is not None:
            self._deadlines.remove(attempt_id)
            result = node_pb2.Result(attempt_id=attempt_id, delivery=task_pb2.DELIVERY_NOT_SENT)
            result.waited_us = round((self._monotonic() - waiting.since) * 1e6)
            result.failure.CopyFrom(why.failure())
            self._add(result)

    def _take_up(self, interrupted: Collection[str]) -> Collection[str]:
        """Go on waiting for the answers to what an earlier daemon sent; which attempts these are."""
        waiting: dict[str, Taken] = {}
        for taken in self._taken:
            attempt_id = taken.errand.start.attempt_id
            if attempt_id in interrupted and attempt_id not in waiting:
                waiting[attempt_id] = taken
            else:
                taken.hold.discard()
        self._taken = ()
        at_once = Counter(taken.errand.start.replica_id for taken in waiting.values())
        for taken in waiting.values():
            self._wait_on(taken, at_once[taken.errand.start.replica_id])
        return waiting

    def _wait_on(self, taken: Taken, at_once: int) -> None:
        """For an answer, one of so many on its replica."""
        errand = taken.errand
        attempt = Attempt.waiting(taken, self._course(errand.start.attempt_id), at_once, now=self._monotonic())
        if errand.job is not None:
            attempt.job = Job(errand.job, begun_ns=self._clock_ns() - round(attempt.before_s * 1e9))
        if errand.has_gpus:
            self._enter_gpus(attempt)
        self._launch(attempt, rest_of(taken, functools.partial(self._open_body, attempt)))
        finding = find_container(attempt, errand.container_id, self._places)
        self._group.create_task(finding, name=f"find the container of {attempt.id}")

    def _go_on(self, job: Job, at_once: int) -> None:
        """With a job that an earlier daemon began, one of so many on its replica."""
        now = self._monotonic()
        passed_s = min(max(0.0, (self._clock_ns() - job.begun_ns) / 1e9), job.start.run_time_limit_ms / 1000)
        self._launch(
            Attempt.at_work(job, self._course(job.start.attempt_id), at_once, now=now, passed_s=passed_s), None
        )

    def _course(self, attempt_id: str) -> Course:
        return Course(functools.partial(self._frames.sent, attempt_id), self._monotonic)

    def _launch(self, attempt: Attempt, exchange: Exchange | None) -> None:
        self._enter(attempt, exchange)
        self._step_in(attempt)

    def _enter(self, attempt: Attempt, exchange: Exchange | None) -> None:
        attempt.exchange = exchange
        attempt.step_in = self._step_in
        self._running[attempt.id] = attempt
        self._deadlines.set(attempt.id, attempt.limit_s - attempt.before_s, self._time_over)

    def _step_in(self, attempt: Attempt) -> None:
        """From now on the attempt has a task, if it had none."""
        exchange = attempt.exchange
        if exchange is not None:
            self._relay.step_in(exchange, abort=attempt.interruption is not None)
        attempt.task = self._group.create_task(self._run(attempt, exchange), name=attempt.id)

    def _answered(self, attempt: Attempt) -> None:
        """Something has come of an attempt that has no task."""
        exchange = attempt.exchange
        assert exchange is not None
        result = node_pb2.Result(attempt_id=attempt.id)
        try:
            is_over = self._relay.end_now(exchange, attempt.course, result.response)
        except Exception:
            attempt.interrupt(_broken(attempt))
            return
        if is_over:
            self._leave_running(attempt)
            self._give_slot(attempt.replica_id)
            self._end(attempt, result, None)
        else:
            self._step_in(attempt)

    def cancel(self, attempt_id: str) -> None:
        """End an attempt; its result follows. Of one that has ended it changes nothing."""
        why = NoAnswer("CANCELLED", CUSTOMER, "The task was cancelled.")
        if attempt := self._running.get(attempt_id):
            attempt.interrupt(why)
        else:
            self._end_waiting(attempt_id, why)

    def acknowledge(self, attempt_id: str) -> None:
        """The attempt's end is on disk, or it is given up: forget it."""
        if attempt := self._running.get(attempt_id):
            attempt.given_up = True
            attempt.interrupt(GivenUp())
        elif self._ahead.pop(attempt_id, None) is not None:
            self._deadlines.remove(attempt_id)
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
        """Attempts that run or wait to, and those that have ended and are not acknowledged."""
        return [*self._running, *self._ahead, *self._left, *self._spool.attempts()]

    def container_exited(self, exit_: Exit) -> None:
        """A container ended by itself. Its connections break; what is left after EXIT_NEWS_S is ended here."""
        asyncio.get_running_loop().call_later(EXIT_NEWS_S, self._end_exited, exit_)

    def close(self) -> None:
        """Take no more."""
        self._closed = True
        for attempt_id in list(self._ahead):
            self._end_waiting(attempt_id, NoAnswer("REPLICA_LOST", PLATFORM, self._refusal()))
        self._check_quiet()

    async def finish(self, within_s: float, *, leave: bool = False) -> None:
        """After `close`: give what runs so long to end; the rest ends as lost with the node.

        `leave`: what can be is left to the next daemon instead.
        """
        for attempt in self._running.values():
            if attempt.task is None:
                self._step_in(attempt)
        tasks = [attempt.task for attempt in self._running.values() if attempt.task is not None]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=within_s)
        lost = NoAnswer("NODE_LOST", PLATFORM, "The node's daemon was stopped before the container had answered.")
        if leave:
            self._leave()
        for attempt in self._running.values():
            if not attempt.left:
                attempt.interrupt(lost)
        if late:
            await asyncio.wait(late)
        self._check_quiet()

    def _leave(self) -> None:
        """To the next daemon, what can be."""
        for attempt in self._running.values():
            attempt.leave()
            if attempt.left:
                self._left.append(attempt.id)

    async def quiet(self, within_s: float) -> bool:
        """After `finish`: wait so long until all that is held is acknowledged. False: something is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._quiet.wait()
        return self._quiet.is_set()

    # One stream.

    async def attend(self, call: ExecuteCall) -> None:
        """Serve one Execute stream until it ends. Raises a group with LinkLost or AioRpcError in it."""
        running = [*self._running, *self._ahead]
        resume = node_pb2.Resume(running=running, ended=self._spool.attempts())
        await write(call, node_pb2.ExecuteRequest(resume=resume))
        self._frames.restate(
            results=(i for i in self._spool.attempts() if i not in self._deliveries),
            sent=(i for i, attempt in self._running.items() if attempt.course.sent_at),
            begun=(i for i, attempt in self._running.items() if attempt.job is not None),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear(call), name="execute: hear")
            group.create_task(self._frames.tell(call), name="execute: tell")

    async def _hear(self, call: ExecuteCall) -> None:
        while True:
            frame = await read(call)
            for start in frame.starts:
                self.start(start)
            for attempt_id in frame.cancels:
                self.cancel(attempt_id)
            for attempt_id in frame.acks:
                self.acknowledge(attempt_id)

    # One attempt.

    def _exchange(self, attempt: Attempt, start: node_pb2.Start) -> Exchange:
        """What is asked of the container. Raises NoAnswer if it cannot be asked.

        Nothing of `start` itself is kept: it would keep the whole frame that it came in.
        """
        address = self._places.address(attempt.replica_id, attempt.port)
        if address is None:
            raise NoAnswer("REPLICA_LOST", PLATFORM, "The replica is not ready on its node (any more).")
        if refusal := self._refusal():
            raise NoAnswer("REPLICA_LOST", PLATFORM, refusal)
        request = start.request
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        streamed = start.streamed
        switches = streamed and any(header.name.lower() == "upgrade" for header in request.headers)
        try:
            head = request_head(request, f"{host}:{address[1]}", switches=switches)
        except BadRequest as fault:
            raise NoAnswer("INTERNAL", PLATFORM, f"The request cannot be written as HTTP: {fault}.") from None
        body = request.body
        inline, size = body.inline, body.size
        exchange = Exchange(
            container_id=self._places.container_id(attempt.replica_id),
            address=address,
            method=request.method,
            payload=head + inline,
            begin=functools.partial(self._begin, attempt, address),
            open_body=functools.partial(self._open_body, attempt),
            limit_bytes=start.response_body_limit_bytes,
            streamed=streamed and attempt.job is None,
        )
        if size > len(inline):
            exchange.upload = self._bulk.fetch(attempt.id, len(inline), size)
            exchange.upload_bytes = size - len(inline)
        if switches:
            exchange.open_tunnel = functools.partial(self._bulk.tunnel, attempt.id)
        elif self._relay.holds:
            exchange.errand = self._errand(attempt, start, exchange.container_id)
        return exchange

    def _errand(self, attempt: Attempt, start: node_pb2.Start, container_id: str) -> bytes | None:
        job = attempt.job.start if attempt.job is not None else None
        has_gpus = bool(self._places.gpu_ids(start.replica_id))
        return pack(start, container_id, attempt.accepted_at, has_gpus=has_gpus, job=job)

    async def _run(self, attempt: Attempt, exchange: Exchange | None) -> None:
        """`exchange` is None where an earlier daemon did it."""
        task = attempt.task
        assert task is not None
        attempt.stepped = True
        result = node_pb2.Result(attempt_id=attempt.id)
        why = attempt.interruption
        try:
            if why is None:
                why = await self._relayed(attempt, exchange, result.response)
        except asyncio.CancelledError:
            if attempt.left:
                task.uncancel()
                return
            why = attempt.interruption
            if why is None:
                raise
            task.uncancel()
            if attempt.job is not None:
                await self._jobs.call_off(attempt.job, why)
        except Exception:
            why = _broken(attempt)
        finally:
            self._leave_running(attempt)
        self._give_slot(attempt.replica_id)
        self._end(attempt, result, why)

    def _leave_running(self, attempt: Attempt) -> None:
        self._deadlines.remove(attempt.id)
        # They know each other, and would wait for the garbage collector.
        attempt.exchange = None
        attempt.leave_gpus()
        del self._running[attempt.id]

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
            self._enter_gpus(attempt)

    def _enter_gpus(self, attempt: Attempt) -> None:
        clock = self._gpu_clocks.setdefault(attempt.replica_id, GpuClock(self._monotonic))
        attempt.gpu_clock, attempt.gpu_entered = clock, clock.enter()

    def _open_body(self, attempt: Attempt, head: http_pb2.HttpResponse) -> Body:
        """The answer's body needs a place of its own."""
        try:
            body = self._spool.begin_body(attempt.id, head.body.size)
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
        end_time = result.end_time
        end_time.seconds, end_time.nanos = divmod(self._clock_ns(), 1_000_000_000)
        self.ended[result.failure.reason] += 1
        self._spool.add(result)
        if result.attempt_id not in self._deliveries:
            self._frames.ended(result.attempt_id)

    def _forget(self, attempt_id: str) -> None:
        self._stop_delivery(attempt_id)
        self._spool.forget(attempt_id)
        self._journal.end(attempt_id)
        self._frames.forget(attempt_id)
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
        self._stop_delivery(attempt_id)
        self._spool.drop_body(attempt_id)

    def _stop_delivery(self, attempt_id: str) -> None:
        if delivery := self._deliveries.pop(attempt_id, None):
            delivery.cancel()

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
            self._frames.ended(attempt_id)

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
        if len(self._running) + len(self._ahead) >= RUNNING_LIMIT:
            return f"The node runs {RUNNING_LIMIT} attempts already."
        return ""

    def _time_over(self, attempt_id: str) -> None:
        if attempt := self._running.get(attempt_id):
            attempt.outlasted(held_up=self._spool.full)

    def _end_exited(self, exit_: Exit) -> None:
        for attempt in list(self._running.values()):
            if attempt.replica_id == exit_.replica_id and attempt.accepted_at <= exit_.at:
                attempt.interrupt(exited(exit_))

    def _job_begun(self, attempt: Attempt) -> None:
        self._hold_gpus(attempt)
        self._frames.begun(attempt.id)

    def _job_id(self, attempt_id: str) -> str:
        attempt = self._running.get(attempt_id)
        return attempt.job.id if attempt is not None and attempt.job is not None else ""

    def _check_quiet(self) -> None:
        if self._closed and not self._running and not len(self._spool):
            self._quiet.set()


def _broken(attempt: Attempt) -> NoAnswer:
    """For an error that nobody foresaw; to be called where it is caught."""
    log.exception("attempt_broken", attempt=attempt.id)
    return NoAnswer("INTERNAL", PLATFORM, "The node failed while it passed the request on; its log says why.")
