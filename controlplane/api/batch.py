"""TaskService.Batch: many calls and answers in one frame each way. The hot path: every call of the bridge comes here.

Per stream one reader and one writer, and per call a future of the dispatcher with a callback; no task of asyncio. The
writer takes whatever is ready when it is free: no timer, so an answer alone waits for nobody, and many share a frame.
"""

import asyncio
import functools
from collections import deque
from typing import Final

import msgspec
from ngpu import wire
from ngpu.v1 import task_pb2 as pb

from controlplane.access import Principal
from controlplane.api import translate
from controlplane.api.gate import Caller, Gate, Stream, error_message
from controlplane.api.owners import Owners
from controlplane.api.tasks import TaskApi
from controlplane.dispatcher import TaskView
from controlplane.errors import InvalidArgument, NotFound, Unavailable

#: What an answer weighs beside its body, roughly.
_ANSWER_BYTES: Final = 256


class Batches:
    """Serves Batch streams. `gate` puts errors into words, as it does for the unary methods."""

    def __init__(self, tasks: TaskApi, owners: Owners, gate: Gate) -> None:
        self._tasks = tasks
        self._owners = owners
        self._gate = gate
        self._streams: set[_Calls] = set()
        self._stopping = False

    async def batch(self, stream: Stream[pb.BatchRequest, pb.BatchResponse], caller: Caller) -> None:
        """See task.proto."""
        calls = _Calls(self._tasks, self._owners, self._gate, stream, caller)
        calls.stopping = self._stopping
        self._streams.add(calls)
        reader = asyncio.create_task(calls.read_all(), name="batch-reader")
        reader.add_done_callback(lambda _: calls.wake())
        try:
            await calls.write_all(reader)
        finally:
            self._streams.remove(calls)
            calls.abandon_all()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def stop(self) -> None:
        """End each stream, with Unavailable, once all its calls are answered. The dispatcher was stopped before."""
        self._stopping = True
        for calls in self._streams:
            calls.stopping = True
            calls.wake()


class _Call(msgspec.Struct, frozen=True):
    """What must be kept of a call for its answer. Not its message: that would keep the frame's bodies in memory."""

    id: int
    method: str
    max_inline_bytes: int = 0
    #: Of a query: the workspace that was named, if one was.
    workspace_id: str = ""


class _Calls:
    """The calls of one stream that have no answer yet, and the answers that are not sent yet."""

    def __init__(
        self,
        tasks: TaskApi,
        owners: Owners,
        gate: Gate,
        stream: Stream[pb.BatchRequest, pb.BatchResponse],
        caller: Caller,
    ) -> None:
        self._tasks = tasks
        self._owners = owners
        self._gate = gate
        self._stream = stream
        self._caller = caller
        self._open: dict[int, asyncio.Future[TaskView]] = {}
        self._ready: deque[tuple[_Call, TaskView | BaseException]] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self.stopping = False

    def wake(self) -> None:
        """Something has changed that the writer must look at."""
        self._news.set()

    async def read_all(self) -> None:
        """Begin every call that comes, until the caller sends no more."""
        while (message := await self._stream.read()) is not None:
            self._caller.check()
            for call_id in message.abandoned:
                future = self._open.pop(call_id, None)
                if future is not None:
                    future.cancel()
            for call in message.calls:
                while len(self._open) + len(self._ready) >= wire.BATCH_OUTSTANDING:
                    self._room.clear()
                    await self._room.wait()
                self._begin(call, self._caller.principal)

    def _begin(self, message: pb.Call, principal: Principal) -> None:
        method = message.WhichOneof("method") or ""
        call = _call_of(message, method)
        try:
            future = self._future_of(message, method, principal)
        except Exception as error:
            self._ready.append((call, error))
            self._news.set()
        else:
            self._open[call.id] = future
            future.add_done_callback(functools.partial(self._done, call))

    def _future_of(self, message: pb.Call, method: str, principal: Principal) -> "asyncio.Future[TaskView]":
        if message.id in self._open:
            raise InvalidArgument("call.id: is in use by an unanswered call of this stream.")
        match method:
            case "schedule":
                return self._tasks.begin(message.schedule, principal)
            case "query":
                return self._tasks.begin_query(message.query, principal)
            case "cancel":
                return asyncio.create_task(self._tasks.end(message.cancel, principal), name="batch-cancel")
        raise InvalidArgument("call.method: is missing, or unknown to this version.")

    def _done(self, call: _Call, future: "asyncio.Future[TaskView]") -> None:
        if self._open.get(call.id) is not future:
            if not future.cancelled():
                future.exception()  # abandoned: nobody wants to hear it
            return
        del self._open[call.id]
        outcome: TaskView | BaseException
        if future.cancelled():
            outcome = Unavailable("The call was cut off; ask for its task again.")
        else:
            outcome = future.exception() or future.result()
        self._ready.append((call, outcome))
        self._news.set()

    async def write_all(self, reader: "asyncio.Task[None]") -> None:
        """Send answers until the caller sends no more and has them all, or the control plane stops."""
        while True:
            if self._ready:
                await self._stream.write(self._frame())
                self._room.set()
            elif reader.done() and (not self._open or reader.exception() is not None):
                return reader.result()
            elif self.stopping and not self._open:
                raise Unavailable("The control plane is stopping; try again soon.")
            else:
                self._news.clear()
                await self._news.wait()

    def _frame(self) -> pb.BatchResponse:
        frame, size = pb.BatchResponse(), 0
        for _ in range(min(len(self._ready), wire.BATCH_ITEMS)):
            call, outcome = self._ready.popleft()
            try:
                size += _ANSWER_BYTES + self._fill(frame.answers.add(id=call.id), call, outcome)
                code = "OK"
            except Exception as caught:
                error = self._gate.error_of(caught, call.method)
                frame.answers[-1].error.CopyFrom(error_message(error))
                code = error.code
            self._gate.calls[call.method, code] += 1
            if size >= wire.BATCH_BYTES:
                break
        return frame

    def _fill(self, answer: pb.Answer, call: _Call, outcome: TaskView | BaseException) -> int:
        """Set an answer within the frame that is being built. Gives its body's length; raises its error."""
        if isinstance(outcome, BaseException):
            raise outcome
        if call.method == "query":
            owner = self._owners.owner(call.workspace_id, self._caller.principal)
            if owner and outcome.workspace_uid != owner:
                raise NotFound
        if call.method == "cancel":
            translate.fill_task(answer.cancel.task, outcome)
            return 0
        into = answer.schedule if call.method == "schedule" else answer.query
        translate.fill_task(into.task, outcome)
        if outcome.response is None:
            return 0
        limit = min(call.max_inline_bytes or wire.INLINE_BYTES, wire.INLINE_BYTES)
        translate.fill_response(into.response, outcome.response, limit)
        return len(outcome.response.body)

    def abandon_all(self) -> None:
        """The stream is over: the tasks that want it are cancelled, the others go on without us."""
        futures, self._open = list(self._open.values()), {}
        for future in futures:
            future.cancel()


def _call_of(message: pb.Call, method: str) -> _Call:
    if method == "schedule":
        return _Call(message.id, method, message.schedule.max_inline_bytes)
    if method == "query":
        return _Call(message.id, method, message.query.max_inline_bytes, message.query.workspace_id)
    return _Call(message.id, method)
