"""One Batch stream to the control plane and a table of futures: a call costs a dictionary entry, not an RPC.

Whatever waits when the writer is free goes in one frame, without a timer: a lone call leaves at once, many share the
60-120 us that a gRPC operation costs. When the stream breaks every call without an answer ends as Unavailable, because
only the caller can know whether asking again is safe; the stream is then opened anew for as long as `run` runs.
"""

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import structlog
from ngpu import wire
from ngpu.v1 import task_pb2 as pb

from httpbridge.errors import Unavailable

if TYPE_CHECKING:
    from httpbridge.envelope import Payload, Stored

FIRST_BACKOFF_S: Final = 0.2
MOST_BACKOFF_S: Final = 5.0

#: How often calls are looked at whose answer is overdue.
PATIENCE_S: Final = 1.0

#: A stream that lived for so long was a good one: what comes after it is not a repetition.
GOOD_STREAM_S: Final = 10.0

log = structlog.get_logger(__name__)


class Stream(Protocol):
    """What we ask of a bidirectional gRPC call."""

    def read(self) -> Awaitable[Any]:
        """The next frame, or grpc.aio.EOF."""

    def write(self, request: pb.BatchRequest) -> Awaitable[None]:
        """Send a frame; done when the transport has taken it."""

    def cancel(self) -> bool:
        """End the call."""


class Waiting(asyncio.Future[pb.Answer]):
    """For one answer. Who cancels it has gone.

    `resume` is called as soon as it has ended; a future's callbacks have to wait for the loop's next round.
    """

    __slots__ = ("_batch", "call_id", "deadline", "resume")

    def __init__(self, batch: "Batch", call_id: int, deadline: float) -> None:
        super().__init__(loop=batch.loop)
        self._batch = batch
        self.call_id = call_id
        #: By the loop's clock, when it is given up.
        self.deadline = deadline
        self.resume: Callable[[], None] | None = None

    def end(self, answer: "pb.Answer | Unavailable") -> None:
        """This is it. Nothing happens if nobody waits any more."""
        if self.done():
            return
        if isinstance(answer, Unavailable):
            self.set_exception(answer)
        else:
            self.set_result(answer)
        if self.resume is not None:
            self.resume()

    def cancel(self, msg: Any = None) -> bool:
        """Abandon the call."""
        if not self.done():
            self._batch.abandon(self.call_id)
        elif not self.cancelled() and self.exception() is None:
            self._batch.unheard(self.result().schedule)
        return super().cancel(msg)


class Batch:
    """Calls in, answers out; at most `outstanding` of them without an answer.

    `open_stream` waits until the control plane can be reached, then opens the stream.
    """

    def __init__(
        self,
        open_stream: Callable[[], Awaitable[Stream]],
        *,
        outstanding: int = wire.BATCH_OUTSTANDING,
        chance: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._open_stream = open_stream
        self._outstanding = outstanding
        self._chance = chance
        self._sleep = sleep
        self.loop = asyncio.get_running_loop()
        self._answers: dict[int, Waiting] = {}
        #: Full frames, and the one that calls are put into until the writer takes it.
        self._full: deque[pb.BatchRequest] = deque()
        self._frame = pb.BatchRequest()
        self._calls = self._frame.calls
        self._frame_calls = 0
        self._frame_bytes = 0
        self._waiting = asyncio.Event()
        self._last_id = 0
        self._last_taken_id = 0
        self.is_up = False
        #: Set once the stream is up, or could not be opened.
        self.tried = asyncio.Event()
        #: What was sent, for the metrics.
        self.frames_sent = 0
        self.calls_sent = 0

    @property
    def in_flight(self) -> int:
        """Calls without an answer."""
        return len(self._answers)

    def schedule(
        self, request: pb.ScheduleRequest, payload: "Payload | Stored | None" = None, *, limit_s: float
    ) -> Waiting:
        """TaskService.Schedule, `payload` put into its copy of `request`. If this is cancelled, the call is abandoned.

        Raises Unavailable; also when no answer has come after `limit_s`, which is none of the task's own limits.
        """
        schedule = self._add().schedule
        schedule.CopyFrom(request)
        if payload is not None:
            payload.put_into(schedule)
        return self._wait(schedule.ByteSize(), limit_s)

    def query(self, request: pb.QueryRequest, *, limit_s: float) -> Waiting:
        """TaskService.Query; else as `schedule`."""
        self._add().query.CopyFrom(request)
        return self._wait(request.ByteSize(), limit_s)

    def cancel(self, request: pb.CancelRequest, *, limit_s: float) -> Waiting:
        """TaskService.Cancel; else as `schedule`."""
        self._add().cancel.CopyFrom(request)
        return self._wait(request.ByteSize(), limit_s)

    def call_off(self, task_id: str) -> None:
        """TaskService.Cancel, unanswered: of a task whose caller has gone. Nothing happens while we are cut off."""
        with contextlib.suppress(Unavailable):
            self._add().cancel.MergeFrom(pb.CancelRequest(task_id=task_id, hangup=True))

    def _add(self) -> pb.Call:
        if not self.is_up:
            raise Unavailable("The control plane cannot be reached; try again soon")
        if len(self._answers) >= self._outstanding:
            raise Unavailable("Too many calls are being worked on; try again soon")
        if self._frame_bytes >= wire.BATCH_BYTES or self._frame_calls >= wire.BATCH_ITEMS:
            self._full.append(self._take())
        self._frame_calls += 1
        self._last_id += 1
        if not self._waiting.is_set():
            self._waiting.set()
        return self._calls.add(id=self._last_id)

    def _wait(self, size: int, limit_s: float) -> Waiting:
        """For the answer to what was added last, and has `size` bytes."""
        self._frame_bytes += size
        waiting = self._answers[self._last_id] = Waiting(self, self._last_id, self.loop.time() + limit_s)
        return waiting

    def unheard(self, answer: pb.ScheduleResponse) -> None:
        """It came in the moment in which its caller went. If it is only the beginning, that is as good as abandoned."""
        if answer.response.status and answer.task.state == pb.TASK_STATE_RUNNING:
            self.call_off(answer.task.task_id)

    async def _give_up(self) -> None:
        # One look at all now and then: a timer for each call would cost more than all the rest of this file does.
        while True:
            await self._sleep(PATIENCE_S)
            now = self.loop.time()
            for waiting in list(self._answers.values()):
                if now >= waiting.deadline:
                    self.abandon(waiting.call_id)
                    waiting.end(Unavailable("The control plane did not answer in time; try again soon"))

    def abandon(self, call_id: int) -> None:
        """Nobody waits for it any more."""
        if self._answers.pop(call_id, None) is None:
            return
        if call_id > self._last_taken_id:
            # Not sent yet, so it never will be: the control plane only knows of the abandonment of earlier calls.
            for frame in (self._frame, *self._full):
                for index, call in enumerate(frame.calls):
                    if call.id == call_id:
                        del frame.calls[index]
                        self._frame_calls = len(self._calls)
                        return
        self._frame.abandoned.append(call_id)
        self._waiting.set()

    async def run(self) -> None:
        """Keep the stream up until cancelled."""
        failures = 0
        while True:
            began = self.loop.time()
            try:
                stream = await self._open_stream()
                reason = await self._use(stream)
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            self.tried.set()
            failures = 1 if self.loop.time() - began > GOOD_STREAM_S else failures + 1
            # Half of it by chance, so that bridges which lost one control plane do not come back as one.
            pause_s = min(MOST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (failures - 1)) * (0.5 + self._chance() / 2)
            log.warning("batch_stream_lost", reason=reason, retry_in_s=round(pause_s, 2))
            await self._sleep(pause_s)

    async def _use(self, stream: Stream) -> str:
        """Read until the stream ends. Returns why it did."""
        self.is_up = True
        self.tried.set()
        log.info("batch_stream_up")
        patience = asyncio.create_task(self._give_up(), name="batch-patience")
        writer = asyncio.create_task(self._write(stream), name="batch-writer")
        # The reader is what notices a broken stream; a writer that died of something else must take it along.
        writer.add_done_callback(lambda _: stream.cancel())
        try:
            while (frame := await stream.read()) is not grpc.aio.EOF:
                for answer in frame.answers:
                    waiting = self._answers.pop(answer.id, None)
                    if waiting is not None:
                        waiting.end(answer)
        except asyncio.CancelledError:
            # grpc.aio says the same whether the task or the call was cancelled.
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return f"writer: {writer.exception()!r}" if writer.done() and not writer.cancelled() else "cancelled"
        finally:
            self.is_up = False
            writer.cancel()
            patience.cancel()
            await asyncio.gather(writer, patience, return_exceptions=True)
            self._forget()
        return "ended by the control plane"

    async def _write(self, stream: Stream) -> None:
        while True:
            await self._waiting.wait()
            frame = self._full.popleft() if self._full else self._take()
            if frame.calls:
                self._last_taken_id = frame.calls[-1].id
            if not self._full and not self._frame.calls and not self._frame.abandoned:
                self._waiting.clear()
            if frame.calls or frame.abandoned:
                await stream.write(frame)
                self.frames_sent += 1
                self.calls_sent += len(frame.calls)

    def _take(self) -> pb.BatchRequest:
        frame = self._frame
        self._frame = pb.BatchRequest()
        self._calls = self._frame.calls
        self._frame_calls = self._frame_bytes = 0
        return frame

    def _forget(self) -> None:
        """The stream is gone: nothing of it may reach the next one, whose control plane knows none of these ids."""
        self._full.clear()
        self._take()
        self._last_taken_id = self._last_id
        self._waiting.clear()
        answers, self._answers = self._answers, {}
        for waiting in answers.values():
            waiting.end(
                Unavailable(
                    "The connection to the control plane broke before it answered. A task may have been accepted: "
                    "send an Idempotency-Key to be able to ask again safely"
                )
            )
