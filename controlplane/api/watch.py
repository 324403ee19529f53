"""Follow one task: its states, and one of its bodies from any byte, as it comes.

A body that is still being delivered is read from the body store behind the node that writes it. What was sent of an
attempt is never mixed with the bytes of the next: then the watcher is told to begin anew.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, nullcontext
from typing import Any, Final, TypeAlias, TypeVar

from ngpu import wire
from ngpu.parcels import Parcel
from ngpu.v1 import task_pb2 as pb

from controlplane import ids
from controlplane.api import translate
from controlplane.api.deliveries import Deliveries
from controlplane.api.gate import Caller
from controlplane.api.owners import Owners
from controlplane.api.stored import body_of_request, body_of_response
from controlplane.bodies import Bodies
from controlplane.dispatcher import Dispatcher, TaskView
from controlplane.errors import Expired, NotFound, OutOfRange, Unavailable
from controlplane.model import ENDED, State
from controlplane.slots import Response
from controlplane.store import Store

#: How long one question to the dispatcher may wait, in seconds ...
WAIT_S: Final = 3600.0
#: ... and the pause before the next, should it have answered without news.
PAUSE_S: Final = 1.0

Event: TypeAlias = Parcel[pb.WatchResponse]

T = TypeVar("T")


class Watch:
    """Serves Watch."""

    def __init__(
        self, owners: Owners, dispatcher: Dispatcher, store: Store, bodies: Bodies, deliveries: Deliveries
    ) -> None:
        self._owners = owners
        self._dispatcher = dispatcher
        self._store = store
        self._bodies = bodies
        self._deliveries = deliveries

    async def watch(self, request: pb.WatchRequest, caller: Caller) -> AsyncIterator[Event]:
        """See task.proto. Unavailable besides: what was read is of an attempt that was lost; begin anew."""
        view = await self._owners.task(request.task_id, request.workspace_id, caller.principal)
        promised = sent = 0
        reading = self._dispatcher.reading(view.task_id) if request.cancel_on_hangup else nullcontext()
        try:
            with reading:
                async with aclosing(self._watch(view, request.part, request.offset)) as events:
                    async for event in events:
                        if event.message.HasField("head"):
                            promised = event.message.head.body.size
                        sent = max(sent, _end(event))
                        yield event
        except BaseException:
            # Many hang up as soon as they have all that was promised: that cancels nothing.
            if request.cancel_on_hangup and not 0 < promised <= sent:
                self._dispatcher.hang_up(view.task_id)
            raise

    async def _watch(
        self, view: TaskView, part: "pb.WatchRequest.Part.ValueType", offset: int
    ) -> AsyncGenerator[Event, None]:
        if part == pb.WatchRequest.PART_REQUEST:
            async for event in self._request(view.task_id, offset):
                yield event
        begun = 0
        while view.state not in ENDED:
            yield _state(view)
            changed = asyncio.create_task(self._next(view), name=f"watch-{view.task_id}")
            try:
                if part == pb.WatchRequest.PART_UNSPECIFIED and view.state is State.RUNNING:
                    async for event in self._live(view, offset, changed):
                        begun = view.attempt
                        offset = max(offset, _end(event))
                        yield event
                view = await changed
            finally:
                changed.cancel()
            if begun and (view.attempt != begun or view.state not in {State.RUNNING, State.COMPLETED}):
                if view.state in ENDED:
                    break
                raise Unavailable(
                    "The node that sent the response was lost; the task runs anew: watch it from offset 0."
                )
        if part == pb.WatchRequest.PART_UNSPECIFIED and view.response is not None:
            if not begun:
                yield _head(view.response)
            # What went over a connection that changed its protocol was counted, not kept.
            if view.response.status != 101:
                async for event in self._recorded(view, view.response, offset):
                    yield event
        yield _state(view)

    async def _next(self, view: TaskView) -> TaskView:
        """The task, once its state or attempt is another."""
        seen = (view.attempt, view.state)
        while True:
            now = await self._dispatcher.query(view.task_id, wait_s=WAIT_S, seen=seen)
            if (now.attempt, now.state) != seen:
                return now
            await asyncio.sleep(PAUSE_S)

    async def _live(self, view: TaskView, offset: int, changed: asyncio.Task[TaskView]) -> AsyncIterator[Event]:
        """The head and the bytes of the attempt that runs, until the task has changed or all is read."""
        attempt_id = ids.attempt_id(view.task_id, view.attempt)
        head = await _unless(changed, self._deliveries.head(attempt_id))
        if head is None:
            return
        yield _head(head)
        name = body_of_response(view.task_id, view.attempt)
        async with aclosing(self._bodies.follow(name, offset, until=changed)) as chunks:
            try:
                async for chunk in chunks:
                    yield _data(chunk, offset)
                    offset += len(chunk)
            except NotFound:
                return  # it was deleted because the attempt was given up, which `changed` is about to tell

    async def _recorded(self, view: TaskView, response: Response, offset: int) -> AsyncIterator[Event]:
        """The bytes of the answer of an ended task."""
        if offset > response.size:
            raise OutOfRange(f"offset: {offset} is past the end, which is at {response.size}.")
        if len(response.body) == response.size:
            for start in range(offset, response.size, wire.CHUNK_BYTES):
                yield _data(response.body[start : start + wire.CHUNK_BYTES], start)
            return
        async for event in self._stored(body_of_response(view.task_id, view.attempt), offset):
            yield event

    async def _request(self, task_id: str, offset: int) -> AsyncIterator[Event]:
        row = await self._store.task(task_id)
        if row is None:
            raise NotFound
        if offset > row.request_size:
            raise OutOfRange(f"offset: {offset} is past the end, which is at {row.request_size}.")
        if row.request_size and row.expire_time is not None:
            raise Expired
        if row.request_body is not None:
            for start in range(offset, row.request_size, wire.CHUNK_BYTES):
                yield _data(row.request_body[start : start + wire.CHUNK_BYTES], start)
            return
        if row.request_size:
            async for event in self._stored(body_of_request(task_id), offset):
                yield event

    async def _stored(self, name: str, offset: int) -> AsyncIterator[Event]:
        try:
            async for chunk in self._bodies.follow(name, offset):
                yield _data(chunk, offset)
                offset += len(chunk)
        except NotFound:
            raise Expired from None


async def _unless(changed: asyncio.Task[TaskView], what: Coroutine[Any, Any, T]) -> T | None:
    """What `what` gives; None if the task changes first."""
    waiting = asyncio.ensure_future(what)
    try:
        await asyncio.wait({changed, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()
        # Else what it waits in would still be running when it is closed.
        await asyncio.wait({waiting})


def _state(view: TaskView) -> Event:
    event = pb.WatchResponse()
    translate.fill_task(event.task, view)
    return Parcel(event)


def _head(response: Response) -> Event:
    event = pb.WatchResponse()
    translate.fill_response(event.head, response, 0)
    event.head.body.inline = b""
    return Parcel(event)


def _data(chunk: bytes, offset: int) -> Event:
    return Parcel(pb.WatchResponse(offset=offset), chunk)


def _end(event: Event) -> int:
    """Where the data in it ends; 0: it has none."""
    return event.message.offset + len(event.data)
