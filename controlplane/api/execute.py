"""Tasks to nodes and results back, in batches; and bodies too large for a batch, on streams of their own."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from msgspec import structs
from ngpu import wire
from ngpu.parcels import Parcel
from ngpu.v1 import node_pb2 as pb

from controlplane import ids
from controlplane.api import translate
from controlplane.api.deliveries import Deliveries, Progress
from controlplane.api.gate import Caller, Stream
from controlplane.api.nodes import session_of
from controlplane.api.requests import chunk_of
from controlplane.api.stored import body_of_request
from controlplane.bodies import Bodies
from controlplane.dispatcher import Dispatcher
from controlplane.errors import InvalidArgument, StaleAttempt, Unavailable
from controlplane.model import Cause
from controlplane.slots import AttemptResult, Failure, Start

#: What may wait for one node; past it the node does not read, and its stream is ended to begin anew.
OUTBOX: Final = 100_000
#: Acknowledgements are in no hurry: they wait so long, in seconds, for a start to ride with. At low load that is one
#: message less per task, and the caller's answer does not wait behind it.
ACKS_S: Final = 0.02
#: What a start weighs beside its body, roughly.
_START_BYTES: Final = 512


class Execution:
    """Execute, Fetch and Deliver."""

    def __init__(self, *, dispatcher: Dispatcher, bodies: Bodies, deliveries: Deliveries) -> None:
        self._dispatcher = dispatcher
        self._bodies = bodies
        self._deliveries = deliveries

    async def execute(self, stream: Stream[pb.ExecuteRequest, pb.ExecuteResponse], caller: Caller) -> None:
        """See node.proto."""
        session = session_of(caller)
        addr = session.node_addr
        first = await stream.read()
        if first is None or not first.HasField("resume"):
            raise InvalidArgument("The first message must have `resume`: every attempt that the node holds.")
        outbox = Outbox()
        with session.stream("execute") as ending:
            self._dispatcher.node_up(addr, outbox, first.resume.running, first.resume.ended, node_ip=caller.ip)
            try:
                async with asyncio.TaskGroup() as group:
                    helpers = [
                        group.create_task(ending.wait(), name=f"execute-ending-{addr}"),
                        group.create_task(outbox.write_all(stream), name=f"execute-writer-{addr}"),
                    ]
                    message: pb.ExecuteRequest | None = first
                    while message is not None:
                        await self._take(addr, message)
                        message = await stream.read()
                    for helper in helpers:
                        helper.cancel()
            finally:
                self._dispatcher.node_down(addr, outbox, outbox.unsent())

    async def _take(self, addr: str, message: pb.ExecuteRequest) -> None:
        for attempt_id in message.sent:
            self._dispatcher.sent(addr, attempt_id)
        for job in message.jobs:
            self._dispatcher.begun(addr, job.attempt_id, job.job_id)
        for said in message.results:
            try:
                result = translate.result_of(said)
            except ValueError as error:
                raise InvalidArgument(f"A result has a value that this version does not know: {error}.") from error
            if result.response is not None and (len(result.response.body) != result.response.size):
                result = await self._delivered(result)
            if result.response is None and self._deliveries.begun(result.attempt_id):
                # The beginning of an answer that there will never be.
                await self._bodies.delete(f"{result.attempt_id}.response")
            self._deliveries.forget(result.attempt_id)
            self._dispatcher.result(addr, result)

    async def _delivered(self, result: AttemptResult) -> AttemptResult:
        """The result, if the body it speaks of is in the body store; else a failure of the platform."""
        response = result.response
        assert response is not None
        if self._deliveries.size(result.attempt_id) == response.size:
            return result
        # After a restart only the disk knows.
        name = f"{result.attempt_id}.response"
        if await self._bodies.sealed(name) and await self._bodies.size(name) == response.size:
            return result
        failure = Failure(Cause.PLATFORM, "BAD_RESPONSE", "The node did not deliver the whole response.")
        return structs.replace(result, response=None, failure=failure)

    async def fetch(self, request: pb.FetchRequest, caller: Caller) -> AsyncIterator[Parcel[pb.FetchResponse]]:
        """See node.proto."""
        addr = session_of(caller).node_addr
        if not self._dispatcher.attempt_is_current(addr, request.attempt_id):
            raise StaleAttempt
        task_id, _ = ids.split_attempt_id(request.attempt_id)
        async for chunk in self._bodies.follow(body_of_request(task_id), request.offset):
            yield Parcel(pb.FetchResponse(), chunk)

    async def deliver(self, stream: Stream[Parcel[pb.DeliverRequest], pb.DeliverResponse], caller: Caller) -> None:
        """See node.proto."""
        addr = session_of(caller).node_addr
        parcel = await stream.read()
        if parcel is None:
            raise InvalidArgument("The first message must name the attempt and have the head.")
        attempt_id = parcel.message.attempt_id
        if not self._dispatcher.attempt_is_current(addr, attempt_id):
            raise StaleAttempt
        limit = self._dispatcher.response_limit(attempt_id)
        name = f"{attempt_id}.response"
        size, complete = await self._bodies.begin(name)
        # Only now: who is told of the head begins to read the body.
        head = translate.response_of(parcel.message.head)
        self._deliveries.begin(attempt_id, head)
        self._dispatcher.answering(addr, attempt_id, head)
        try:
            async with Progress(lambda stored: stream.write(pb.DeliverResponse(stored_bytes=stored))) as progress:
                while not complete:
                    progress.tell(size)
                    if (parcel := await stream.read()) is None:
                        return
                    caller.check()
                    if not self._dispatcher.attempt_is_current(addr, attempt_id):
                        raise StaleAttempt
                    message, data = parcel.message, chunk_of(parcel)
                    size = await self._bodies.append(name, message.offset, data, limit_bytes=limit, behind=True)
                    if message.last:
                        size = await self._bodies.seal(name)
                        complete = True
        finally:
            is_over = not complete and not self._dispatcher.attempt_is_current(addr, attempt_id)
            # The attempt was given up under it. A sealed body is one that another stream has completed since.
            if is_over and not await self._bodies.sealed(name):
                await self._bodies.delete(name)
        self._deliveries.complete(attempt_id, size)
        await stream.write(pb.DeliverResponse(stored_bytes=size, complete=True))


class Outbox:
    """What waits to be sent to one node: a `slots.Link`. Drained by one writer, a frame at a time."""

    def __init__(self, room: int = OUTBOX) -> None:
        self._room = room
        self._starts: deque[Start] = deque()
        self._cancels: deque[str] = deque()
        self._acks: deque[str] = deque()
        self._news = asyncio.Event()
        #: When acknowledgements wait no longer.
        self._due: asyncio.TimerHandle | None = None

    def start(self, start: Start) -> None:
        """Begin an attempt."""
        self._starts.append(start)
        self._news.set()

    def cancel(self, attempt_id: str) -> None:
        """End an attempt; its result still follows."""
        self._cancels.append(attempt_id)
        self._news.set()

    def ack(self, attempt_id: str) -> None:
        """The attempt's end is on disk, or it was given up: forget it."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(ACKS_S, self._news.set)
        self._acks.append(attempt_id)

    def unsent(self) -> list[str]:
        """Attempts that the node cannot have heard of."""
        return [start.attempt_id for start in self._starts]

    async def write_all(self, stream: Stream[pb.ExecuteRequest, pb.ExecuteResponse]) -> None:
        """Send whatever waits as soon as the stream has room, until cancelled. Raises Unavailable if too much waits."""
        while True:
            if len(self._starts) + len(self._cancels) + len(self._acks) > self._room:
                raise Unavailable("The node does not read what it is sent; it must begin the stream anew.")
            if self._news.is_set() or self._starts or self._cancels:
                self._news.clear()
                if (frame := self._frame()).ByteSize():
                    await stream.write(frame)
            else:
                await self._news.wait()

    def _frame(self) -> pb.ExecuteResponse:
        frame, size = pb.ExecuteResponse(), 0
        # An attempt is cancelled after it was started and acknowledged after it has ended: in no order can one of them
        # overtake what it speaks of, as long as starts go first.
        items = wire.BATCH_ITEMS
        while self._starts and items and size < wire.BATCH_BYTES:
            start = self._starts.popleft()
            translate.fill_start(frame.starts.add(), start)
            size += _START_BYTES + len(start.request.body)
            items -= 1
        if not self._starts:
            frame.cancels.extend(_taken(self._cancels, items))
            frame.acks.extend(_taken(self._acks, items - len(frame.cancels)))
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._acks:
            self._news.set()
        return frame


def _taken(waiting: deque[str], most: int) -> list[str]:
    return [waiting.popleft() for _ in range(min(len(waiting), most))]
