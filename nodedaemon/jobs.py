"""Containers that answer at once and work on: their jobs are followed here, by questions, until they are done.

An attempt that has become a job keeps its slot, its GPUs and its run time; only what is heard of it comes by other
requests. What the journal keeps of it is enough for the next daemon to go on asking: a daemon that is killed costs no
second execution.
"""

import asyncio
import functools
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol
from weakref import WeakValueDictionary

import structlog
from google.protobuf.message import DecodeError
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2

from nodedaemon.connection import Address
from nodedaemon.course import CUSTOMER, PLATFORM, Course, NoAnswer
from nodedaemon.http1 import BadRequest, request_head
from nodedaemon.job_rules import Finding, Stand, first, later, output_of, target
from nodedaemon.journal import Journal
from nodedaemon.relay import Exchange, Relay, Sink, is_utf8, nothing

log = structlog.get_logger()

#: Between two questions, if the rule does not say.
POLL_S: Final = 1.0
#: One question takes no longer than this.
ASK_LIMIT_S: Final = 60.0
#: Questions in a row that may go wrong before the job is given up.
TROUBLES: Final = 5
#: To end a job whose task is cancelled; then its slot is free in any case.
CANCEL_LIMIT_S: Final = 1.5
#: After a restart of the daemon its containers have so long to be found again.
ADOPT_LIMIT_S: Final = 60.0
ADOPT_LOOK_S: Final = 0.1
#: Longest answer to a question, which is read as a whole: outputs in JSON are images in base64 and the like.
ANSWER_BYTES: Final = 32 * 1024 * 1024
#: Longer ones are parsed outside the event loop.
IN_LOOP_BYTES: Final = 256 * 1024
#: Where nobody is there to be told of a cancel.
_BEYOND_CANCEL: Final = frozenset({"CONTAINER_EXITED", "REPLICA_LOST"})
#: What no further question would change.
_FINAL: Final = frozenset({"BUSY", "JOB_FAILED", "REPLICA_LOST", "RESPONSE_TOO_LARGE", "INTERNAL"})


class Places(Protocol):
    """What is asked of replicas."""

    def address(self, replica_id: str, port: int) -> Address | None:
        """Where to reach that port of a ready replica."""

    def container_id(self, replica_id: str) -> str:
        """The container that it has now; empty: none."""


@dataclass(slots=True)
class Job:
    """What an attempt may become. `start` is its Start without body and headers; `id` is empty until it has begun."""

    start: node_pb2.Start
    id: str = ""
    #: By the wall clock, in nanoseconds: when the attempt was accepted.
    begun_ns: int = 0
    container_id: str = ""

    @classmethod
    def of(cls, start: node_pb2.Start, begun_ns: int) -> "Job":
        """Of a Start with a rule."""
        request = http_pb2.HttpRequest(method=start.request.method, path=start.request.path)
        bare = node_pb2.Start(
            attempt_id=start.attempt_id,
            replica_id=start.replica_id,
            port=start.port,
            request=request,
            run_time_limit_ms=start.run_time_limit_ms,
            response_body_limit_bytes=start.response_body_limit_bytes,
            job=start.job,
        )
        return cls(bare, begun_ns=begun_ns)

    @classmethod
    def noted(cls, note: bytes) -> "Job | None":
        """As an earlier daemon noted it. None: the note cannot be read."""
        try:
            said = json.loads(note)
            start = node_pb2.Start.FromString(b64decode(said["start"]))
            return cls(start, str(said["id"]), int(said["begun_ns"]), str(said["container_id"]))
        except (ValueError, KeyError, TypeError, DecodeError):
            return None

    def note(self) -> bytes:
        """For the journal."""
        start = b64encode(self.start.SerializeToString()).decode()
        return json.dumps(
            {"id": self.id, "begun_ns": self.begun_ns, "container_id": self.container_id, "start": start}
        ).encode()


@dataclass(slots=True)
class _Collected:
    """An answer's body in memory, where it is too large to be inline. A replica has one such at a time: `turn`."""

    turn: asyncio.Lock
    limit_bytes: int
    data: bytearray = field(default_factory=bytearray)
    has_turn: bool = False

    async def write(self, data: bytes) -> None:
        """Append; waits for its turn, and so does the container. The relay keeps it within the limit."""
        if not self.has_turn:
            await self.turn.acquire()
            self.has_turn = True
        self.data += data

    def end(self) -> None:
        """That was all."""

    def let_go(self) -> None:
        """The next one's turn."""
        if self.has_turn:
            self.has_turn = False
            self.turn.release()


class Jobs:
    """Follows jobs."""

    def __init__(
        self,
        *,
        relay: Relay,
        places: Places,
        journal: Journal,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._relay = relay
        self._places = places
        self._journal = journal
        self._monotonic = monotonic
        self._sleep = sleep
        # By replica: a container that takes its time over a long answer holds up no other's.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Parsed, an answer may take many times its size.
        self._parsing = asyncio.Lock()

    async def follow(
        self,
        job: Job,
        course: Course,
        response: http_pb2.HttpResponse,
        *,
        begun: Callable[[], None],
        open_body: Callable[[http_pb2.HttpResponse], Sink],
    ) -> None:
        """To the end of what `response`, the container's first answer, has begun; at once if that is nothing.

        With `job.id` set: go on with what an earlier daemon began. `begun` is called once the container is at work on
        it. Leaves the task's answer in `response`. Raises NoAnswer.
        """
        if job.id:
            await self._find_again(job)
        else:
            await self._judge_first(job, response, open_body)
        if not job.id:
            return
        begun()
        turn = self._turns.setdefault(job.start.replica_id, asyncio.Lock())
        limit_bytes = min(job.start.response_body_limit_bytes or ANSWER_BYTES, ANSWER_BYTES)
        troubles = 0
        while True:
            await self._sleep(_poll_s(job))
            if self._out_of_reach(job):
                continue
            body = _Collected(turn, limit_bytes)
            trouble: NoAnswer
            try:
                answer = await self._ask(job, job.start.job.ask, body)
                data = bytes(body.data) or answer.body.inline
                finding = await self._judge(job, answer.status, data)
                if finding.stand is Stand.DONE:
                    response.CopyFrom(answer)
                    await _put_output(job, finding, data, response, open_body)
                    course.last_byte_at = self._monotonic()
                    return
                if finding.stand is Stand.UNDER_WAY:
                    troubles = 0
                    continue
                _refuse(finding)
                trouble = NoAnswer(
                    "BAD_RESPONSE",
                    CUSTOMER,
                    f"The container was asked after its job {job.id} and "
                    f"answered what the workspace's rule for jobs does not know: {finding.words}",
                )
            except NoAnswer as why:
                if why.reason in _FINAL:
                    raise
                trouble = why
            finally:
                body.let_go()
            troubles += 1
            if troubles >= TROUBLES:
                raise trouble

    async def call_off(self, job: Job, why: NoAnswer) -> None:
        """Tell the container that nobody wants the job any more, if it can be told; within CANCEL_LIMIT_S."""
        rule = job.start.job
        if not (job.id and rule.cancel) or why.reason in _BEYOND_CANCEL:
            return
        body = _Collected(asyncio.Lock(), wire.INLINE_BYTES)
        try:
            async with asyncio.timeout(CANCEL_LIMIT_S):
                answer = await self._ask(job, rule.cancel, body)
        except (NoAnswer, TimeoutError) as fault:
            log.warning("job_not_cancelled", attempt=job.start.attempt_id, job=job.id, reason=str(fault))
        else:
            log.info("job_cancelled", attempt=job.start.attempt_id, job=job.id, status=answer.status)

    async def _judge_first(
        self, job: Job, response: http_pb2.HttpResponse, open_body: Callable[[http_pb2.HttpResponse], Sink]
    ) -> None:
        """Sets `job.id` if there is one to follow."""
        body, start = response.body, job.start
        if body.size > len(body.inline):
            # Too long for a word about a job.
            return
        finding = first(start.job, response.status, body.inline)
        _refuse(finding)
        if finding.stand is Stand.DONE:
            await _put_output(job, finding, body.inline, response, open_body)
        elif finding.stand is Stand.BEGUN:
            job.id = finding.job_id
            job.container_id = self._places.container_id(start.replica_id)
            try:
                self._journal.note(start.attempt_id, job.note())
            except OSError as fault:
                # It runs all the same, and is lost only if the daemon is killed as well.
                log.warning("job_not_noted", attempt=start.attempt_id, reason=fault.strerror)

    async def _judge(self, job: Job, status: int, data: bytes) -> Finding:
        rule = job.start.job
        if len(data) <= IN_LOOP_BYTES:
            return later(rule, status, data)
        async with self._parsing:
            return await asyncio.to_thread(later, rule, status, data)

    async def _find_again(self, job: Job) -> None:
        """Wait until its container is adopted. Raises NoAnswer: it is not there any more."""
        start, until = job.start, self._monotonic() + ADOPT_LIMIT_S
        while self._places.address(start.replica_id, start.port) is None:
            if self._monotonic() >= until:
                raise NoAnswer("REPLICA_LOST", PLATFORM, "Its container was gone when the node's daemon was back.")
            await self._sleep(ADOPT_LOOK_S)
        if self._places.container_id(start.replica_id) != job.container_id:
            words = "The container that worked on it was replaced while the node's daemon was down."
            raise NoAnswer("REPLICA_LOST", PLATFORM, words)
        log.info("job_taken_up", attempt=start.attempt_id, job=job.id)

    def _out_of_reach(self, job: Job) -> bool:
        """Its container may be there, but the engine does not say so: it may come back, and so may the engine."""
        start = job.start
        if not job.container_id or self._places.address(start.replica_id, start.port) is not None:
            return False
        return self._places.container_id(start.replica_id) == job.container_id

    def _begin(self, job: Job, address: Address) -> None:
        """The container is about to be asked. Raises NoAnswer."""
        if self._places.address(job.start.replica_id, job.start.port) != address:
            raise NoAnswer("CONNECT_FAILED", PLATFORM, "The container's address may have become another's.")

    async def _ask(self, job: Job, template: str, body: _Collected) -> http_pb2.HttpResponse:
        """The answer to a request about the job, its body inline or in `body`. Raises NoAnswer."""
        start = job.start
        address = self._places.address(start.replica_id, start.port)
        if address is None:
            raise NoAnswer("REPLICA_LOST", PLATFORM, "The replica was stopped while it worked on the request.")
        method, path, query = target(template, start.request.path, job.id)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        try:
            head = request_head(http_pb2.HttpRequest(method=method, path=path, query=query), f"{host}:{address[1]}")
        except BadRequest as fault:
            raise NoAnswer("INTERNAL", PLATFORM, f"{template!r} cannot be asked: {fault}.") from None
        exchange = Exchange(
            container_id=self._places.container_id(start.replica_id),
            address=address,
            method=method,
            payload=head,
            begin=functools.partial(self._begin, job, address),
            open_body=lambda _: body,
            limit_bytes=body.limit_bytes,
        )
        answer = http_pb2.HttpResponse()
        try:
            async with asyncio.timeout(ASK_LIMIT_S):
                await self._relay.run(exchange, Course(nothing, self._monotonic), answer)
        except TimeoutError:
            words = f"The container did not answer within {ASK_LIMIT_S:g} s when it was asked after its job {job.id}."
            raise NoAnswer("CONNECTION_CLOSED", CUSTOMER, words) from None
        return answer


def _refuse(finding: Finding) -> None:
    """Raises NoAnswer if that is what was found."""
    if finding.stand is Stand.BUSY:
        raise NoAnswer("BUSY", PLATFORM, f"The container is busy and has not taken the job: {finding.words}")
    if finding.stand is Stand.FAILED:
        raise NoAnswer("JOB_FAILED", CUSTOMER, f"The container's job failed: {finding.words}")


async def _put_output(
    job: Job,
    finding: Finding,
    data: bytes,
    response: http_pb2.HttpResponse,
    open_body: Callable[[http_pb2.HttpResponse], Sink],
) -> None:
    """Make `response`, the answer that says so with the body `data`, the output of a job that is done."""
    pointer = job.start.job.output
    if pointer:
        output = output_of(pointer, finding.document)
        if output is None:
            words = f"The container says that its job is done, but its answer has no output at {pointer}."
            raise NoAnswer("BAD_RESPONSE", CUSTOMER, words)
        data = output.data
        del response.headers[:]
        response.headers.add(name="Content-Type", value=output.kind)
    body = response.body
    body.Clear()
    body.size = len(data)
    if len(data) <= wire.INLINE_BYTES:
        body.inline = data
        body.is_utf8 = is_utf8(data)
        return
    sink = open_body(response)
    try:
        for at in range(0, len(data), wire.CHUNK_BYTES):
            await sink.write(data[at : at + wire.CHUNK_BYTES])
    except OSError as fault:
        words = f"The node could not store the container's answer: {fault.strerror}."
        raise NoAnswer("INTERNAL", PLATFORM, words) from None
    body.is_utf8 = is_utf8(data)
    sink.end()


def _poll_s(job: Job) -> float:
    poll = job.start.job.poll
    return poll.seconds + poll.nanos / 1e9 or POLL_S
