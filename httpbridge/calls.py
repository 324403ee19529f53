"""The control plane as the bridge sees it: every gRPC call it makes; refusals become the bridge's errors here.

Calls that are many and small go through the Batch stream (`batch`); bodies over 64 KiB go over a channel of their own,
so that small calls stay fast beside them; the rest is plain unary calls and server streams.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from math import inf
from typing import Any, Final, Self, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError
from ngpu import dial, parcels, streams, wire
from ngpu.parcels import Parcel
from ngpu.v1 import asset_pb2, asset_pb2_grpc, http_pb2, task_pb2_grpc, workspace_pb2, workspace_pb2_grpc
from ngpu.v1 import task_pb2 as pb

from httpbridge import errors
from httpbridge.batch import Batch, Stream
from httpbridge.envelope import Payload, Stored

#: Plain calls must be answered within this.
CALL_LIMIT_S: Final = 30.0
#: One attempt to move one body; it goes on from where it was.
TRANSFER_LIMIT_S: Final = 3600.0
#: A held answer comes at the latest so long after its `wait`.
ANSWER_GRACE_S: Final = 30.0
#: A response that is still coming is worth a wait for a control plane that is started anew.
FOLLOW_LIMIT_S: Final = 30.0
#: How often a broken stream is taken up again without having got any further.
RESUMES: Final = 3
RESUME_PAUSE_S: Final = 0.5

#: Bodies that fill chunks before they are sent, at a time; others go on as they come, since each holds up to a chunk.
FILLING: Final = 128

#: With a socket of its own, and so with no memory of earlier failures to connect.
_SMALL_OPTIONS: Final[wire.ChannelOptions] = [*wire.CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]

Answer = TypeVar("Answer")
#: Of a response as it comes: its head, then bytes of its body.
Part: TypeAlias = http_pb2.HttpResponse | bytes
#: Bytes both ways.
Connection: TypeAlias = "grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]"

log = structlog.get_logger(__name__)

#: By `ngpu.v1.Error.reason`.
_REASONS: Final[dict[str, type[errors.BridgeError]]] = {
    "INVALID_ARGUMENT": errors.BadRequest,
    "FORBIDDEN": errors.Forbidden,
    "ASSET_MISSING": errors.Forbidden,
    "NOT_FOUND": errors.NotFound,
    "CONFLICT": errors.Conflict,
    "EXPIRED": errors.Gone,
    "JOB_LOST": errors.Gone,
    "TOO_LARGE": errors.TooLarge,
    "QUEUE_FULL": errors.TooMany,
    "RATE_LIMITED": errors.TooMany,
    "NO_REPLICA": errors.Unavailable,
    "TIME_LIMIT": errors.TimeLimit,
    "UNAVAILABLE": errors.Unavailable,
    "ASSET_UNKNOWN": errors.Unavailable,
}
#: By gRPC status, for what carries no reason we know.
_CODES: Final[dict[int, type[errors.BridgeError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT.value[0]: errors.BadRequest,
    grpc.StatusCode.NOT_FOUND.value[0]: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS.value[0]: errors.Conflict,
    grpc.StatusCode.PERMISSION_DENIED.value[0]: errors.Forbidden,
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]: errors.TooMany,
    grpc.StatusCode.FAILED_PRECONDITION.value[0]: errors.Conflict,
    grpc.StatusCode.UNAVAILABLE.value[0]: errors.Unavailable,
    grpc.StatusCode.CANCELLED.value[0]: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0]: errors.TimeLimit,
}
_UNAUTHENTICATED: Final = grpc.StatusCode.UNAUTHENTICATED.value[0]


def refusal(error: http_pb2.Error) -> errors.BridgeError:
    """The bridge's error for one of the wire's."""
    if error.code == _UNAUTHENTICATED:
        # The bridge's own token: the caller can do nothing about it and need not know.
        log.error("token_refused", message=error.message)
        return errors.Unavailable("This bridge is not set up right: the control plane does not accept its token")
    kind = _REASONS.get(error.reason) or _CODES.get(error.code)
    if kind is None:
        log.error("control_plane_fault", code=error.code, reason=error.reason, message=error.message)
        return errors.BridgeError()
    return kind(error.message, retry_after_s=error.retry_after_ms / 1000)


def translated(error: grpc.aio.AioRpcError) -> errors.BridgeError:
    """The bridge's error for a failed call."""
    for key, value in error.trailing_metadata() or ():
        if key == wire.ERROR and isinstance(value, bytes):
            try:
                return refusal(http_pb2.Error.FromString(value))
            except DecodeError:
                break
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        # gRPC's own words (addresses, errno) are for the log.
        log.warning("control_plane_unreachable", details=error.details())
        return errors.Unavailable("The control plane cannot be reached; try again soon")
    return refusal(http_pb2.Error(code=code.value[0], message=error.details() or ""))


class TaskEnded(errors.BadGateway):
    """The task has ended without a response of the container."""

    def __init__(self, task: pb.Task) -> None:
        super().__init__(task.failure.message, task_id=task.task_id)
        self.task = task


class ControlPlane:
    """A connection to the control plane; all methods raise BridgeError.

    `addresses`: its own; or several, with commas between them, of which one answers. `token` is asked anew at every
    connection, so that a token may be replaced while the bridge runs.
    """

    def __init__(
        self,
        addresses: str,
        token: Callable[[], str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        outstanding: int = wire.BATCH_OUTSTANDING,
    ) -> None:
        self._token = token
        self._addresses = dial.split(addresses)
        self._credentials = credentials
        #: Of those that were left, to be closed when what is under way there has ended.
        self._leaving: set[asyncio.Task[None]] = set()
        self._storing = 0
        self._use(self._addresses[0], self._dial(self._addresses[0]))
        self.batch = Batch(self._open_batch, outstanding=outstanding)

    async def run(self) -> None:
        """Keep the Batch stream up until cancelled."""
        await self.batch.run()

    async def close(self) -> None:
        """Close the connections."""
        for leaving in self._leaving:
            leaving.cancel()
        await asyncio.gather(self._small.close(), self._large.close(), *self._leaving, return_exceptions=True)

    def _dial(self, address: str) -> grpc.aio.Channel:
        return _channel(address, self._credentials, _SMALL_OPTIONS)

    def _use(self, address: str, small: grpc.aio.Channel) -> None:
        self._small = small
        self._large = _channel(address, self._credentials, wire.BULK_CLIENT_OPTIONS)
        self._tasks = task_pb2_grpc.TaskServiceStub(self._small)
        self._bodies = task_pb2_grpc.TaskServiceStub(self._large)
        self._upload = self._large.stream_unary(
            "/ngpu.v1.TaskService/Upload",
            request_serializer=parcels.writer(pb.UploadRequest),
            response_deserializer=pb.UploadResponse.FromString,
        )
        self._watch = self._large.unary_stream(
            "/ngpu.v1.TaskService/Watch",
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=parcels.reader(pb.WatchResponse),
        )
        self._workspaces = workspace_pb2_grpc.WorkspaceServiceStub(self._small)
        self._assets = asset_pb2_grpc.AssetServiceStub(self._small)

    async def _reach(self) -> None:
        """Go on with the one of several that answers."""
        while (found := await dial.reach(self._addresses, self._dial)) is None:
            log.info("connecting_to_control_plane")
        for channel in (self._small, self._large):
            # Not at once: streams that still come would end as if their own callers had gone.
            leaving = asyncio.create_task(channel.close(CALL_LIMIT_S), name="leave a control plane")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        self._use(*found)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _open_batch(self) -> Stream:
        if len(self._addresses) > 1:
            await self._reach()
        if self._small.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            log.info("connecting_to_control_plane")
        await self._small.channel_ready()
        # So that the first large body does not wait for it.
        self._large.get_state(try_to_connect=True)
        return self._tasks.Batch(metadata=self._metadata())

    def _metadata(self, request_id: str = "") -> tuple[tuple[str, str], ...]:
        bearer = (wire.AUTHORIZATION, f"Bearer {self._token()}")
        return (bearer, (wire.REQUEST_ID, request_id)) if request_id else (bearer,)

    async def schedule(
        self, request: pb.ScheduleRequest, payload: Payload | Stored | None = None
    ) -> pb.ScheduleResponse:
        """TaskService.Schedule, with `payload` in a copy of `request`, if it is not there already.

        If this is cancelled the control plane is told that nobody waits any more.
        """
        waiting = self.batch.schedule(request, payload, limit_s=request.wait.seconds + ANSWER_GRACE_S)
        # It may be large, and the answer may take its time.
        del payload
        answer = await waiting
        _raise_error(answer)
        return answer.schedule

    async def query(self, request: pb.QueryRequest) -> pb.QueryResponse:
        """TaskService.Query."""
        answer = await self.batch.query(request, limit_s=request.wait.seconds + ANSWER_GRACE_S)
        _raise_error(answer)
        return answer.query

    async def cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        """TaskService.Cancel."""
        answer = await self.batch.cancel(request, limit_s=CALL_LIMIT_S)
        _raise_error(answer)
        return answer.cancel

    async def detail(self, request: pb.GetDetailRequest, request_id: str) -> pb.GetDetailResponse:
        """TaskService.GetDetail, bodies cut at 1 MiB."""
        return await _answer(self._tasks.GetDetail(request, metadata=self._metadata(request_id), timeout=CALL_LIMIT_S))

    async def check_address(self, address: str, request_id: str) -> Iterable[asset_pb2.Holding]:
        """AssetService.CheckAddress."""
        request = asset_pb2.CheckAddressRequest(address=address)
        response = await _answer(
            self._assets.CheckAddress(request, metadata=self._metadata(request_id), timeout=CALL_LIMIT_S)
        )
        return response.holdings

    async def workspace(self, workspace_id: str, request_id: str) -> workspace_pb2.Workspace:
        """WorkspaceService.GetWorkspace. Raises Unauthorized for an unknown id, which is a credential."""
        request = workspace_pb2.GetWorkspaceRequest(workspace=workspace_id)
        try:
            response = await _answer(
                self._workspaces.GetWorkspace(request, metadata=self._metadata(request_id), timeout=CALL_LIMIT_S)
            )
        except errors.NotFound:
            raise errors.Unauthorized("There is no workspace with this id") from None
        return response.workspace

    async def upload(self, body: bytes | bytearray, *, workspace_id: str = "", route: str = "") -> str:
        """TaskService.Upload: store a body; returns the id under which a Schedule may use it."""
        view = memoryview(body)
        first = Parcel(pb.UploadRequest(workspace_id=workspace_id, route=route), bytes(view[: wire.CHUNK_BYTES]))
        chunks = itertools.chain(
            [first],
            (
                Parcel(pb.UploadRequest(), bytes(view[at : at + wire.CHUNK_BYTES]))
                for at in range(wire.CHUNK_BYTES, len(body), wire.CHUNK_BYTES)
            ),
        )
        response = await _answer(self._upload(chunks, metadata=self._metadata(), timeout=TRANSFER_LIMIT_S))
        return response.upload_id

    async def body(
        self, task_id: str, workspace_id: str, *, offset: int, size: int, part: "pb.WatchRequest.Part.ValueType"
    ) -> AsyncGenerator[bytes, None]:
        """A request's body or an ended task's response from `offset` to `size`, as it comes (TaskService.Watch).

        Takes a broken stream up again where it was. Raises Gone besides, before the first chunk.
        """
        broken = 0
        while offset < size:
            request = pb.WatchRequest(task_id=task_id, workspace_id=workspace_id, part=part, offset=offset)
            events = self._watch(request, metadata=self._metadata(), timeout=TRANSFER_LIMIT_S)
            try:
                async for event, piece in streams.messages(events):
                    if data := _in_step(piece, event, offset, task_id):
                        offset += len(data)
                        broken = 0
                        yield data
                    elif offset >= size and event.task.state in (pb.TASK_STATE_QUEUED, pb.TASK_STATE_RUNNING):
                        # The stream goes on until the task ends. Else read it to its end: of a stream that is cancelled
                        # with something unread grpc.aio keeps a chunk's memory for ever.
                        return
                if offset >= size:
                    return
                raise errors.Unavailable("The body ended early; ask again")
            except grpc.aio.AioRpcError as error:
                refused = translated(error)
                if broken >= RESUMES or not isinstance(refused, errors.Unavailable | errors.TimeLimit):
                    raise refused from None
                broken += 1
                await asyncio.sleep(RESUME_PAUSE_S)
            finally:
                events.cancel()

    async def store(
        self, begun: bytes, rest: AsyncIterator[bytes], *, workspace_id: str = "", route: str = "", size: int = 0
    ) -> pb.UploadResponse:
        """TaskService.Upload of a body as it comes, `size` bytes or, at 0, nobody knows how many.

        `rest` is not asked for a piece before the control plane has agreed; its own errors pass.
        """
        call = self._upload(metadata=self._metadata(), timeout=TRANSFER_LIMIT_S)
        self._storing += 1
        least = wire.CHUNK_BYTES if self._storing <= FILLING else 1
        try:
            await call.write(Parcel(pb.UploadRequest(workspace_id=workspace_id, route=route, size=size, discard=True)))
            agreed = dict(await call.initial_metadata())
            # It comes with a refusal, too, and then has nothing in it.
            if wire.UPLOAD_ID in agreed:
                await _write_all(call, _chunks(begun, rest, least), limit=int(agreed[wire.UPLOAD_LIMIT]))
            return await _answer(call)
        except asyncio.InvalidStateError:
            # It ended under us; it says why.
            return await _answer(call)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INTERNAL and wire.ERROR not in dict(error.trailing_metadata() or ()):
                # What grpc.aio says of a write to a stream that the other side has ended.
                raise errors.Unavailable("The body could not be stored; send it again") from None
            raise translated(error) from None
        finally:
            self._storing -= 1
            call.cancel()

    async def follow(self, task_id: str, workspace_id: str, *, attempt: int) -> AsyncGenerator[Part, None]:
        """TaskService.Watch for the one caller that a streamed task is for; ends when all of the response has come.

        Gives the head, then data without gaps, also where the stream had to be taken up again. To close it early
        cancels the task. `attempt`: of the head that is known already, 0: none is. Raises TaskEnded besides.
        """
        loop = asyncio.get_running_loop()
        offset = running = 0
        state = pb.TASK_STATE_UNSPECIFIED
        give_up_at = inf
        while True:
            began, begun_at = loop.time(), offset
            request = pb.WatchRequest(task_id=task_id, workspace_id=workspace_id, offset=offset, cancel_on_hangup=True)
            events = self._watch(request, metadata=self._metadata())
            try:
                async for event, piece in streams.messages(events):
                    if event.HasField("task"):
                        running, state = event.task.attempt, event.task.state
                        if state in (pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELLED):
                            raise TaskEnded(event.task)
                        if attempt and running != attempt:
                            raise errors.BadGateway("The node that sent the response was lost", task_id=task_id)
                    if event.HasField("head"):
                        attempt = running
                        yield event.head
                    if data := _in_step(piece, event, offset, task_id):
                        offset += len(data)
                        yield data
                if state == pb.TASK_STATE_COMPLETED:
                    return
                raise errors.Unavailable("The response ended early")
            except grpc.aio.AioRpcError as error:
                refused, now = translated(error), loop.time()
                if offset > begun_at or now - began > FOLLOW_LIMIT_S or give_up_at == inf:
                    give_up_at = now + FOLLOW_LIMIT_S
                if now >= give_up_at or not isinstance(refused, errors.Unavailable):
                    raise refused from None
                await asyncio.sleep(RESUME_PAUSE_S)
            finally:
                events.cancel()

    async def connect(self, task_id: str, workspace_id: str) -> "Connection":
        """TaskService.Connect: take the connection of a task whose container has answered with 101."""
        call: Connection = self._bodies.Connect(metadata=self._metadata())
        try:
            await call.write(pb.ConnectRequest(task_id=task_id, workspace_id=workspace_id))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()
            raise errors.BadGateway("The connection to the container broke", task_id=task_id) from None
        return call

    async def pages(self, request: pb.ListTasksRequest, request_id: str) -> AsyncGenerator[pb.ListTasksResponse, None]:
        """TaskService.ListTasks, page by page; takes a broken stream up again after the last page."""
        broken = 0
        left = request.limit
        while True:
            pages = self._tasks.ListTasks(request, metadata=self._metadata(request_id), timeout=TRANSFER_LIMIT_S)
            try:
                async for page in pages:
                    broken = 0
                    request.cursor = page.cursor
                    left -= len(page.task_ids)
                    yield page
                    # Without this a stream that breaks after its last page would be begun again from the first.
                    if not page.cursor or (request.limit and left <= 0):
                        return
            except grpc.aio.AioRpcError as error:
                refused = translated(error)
                if broken >= RESUMES or not isinstance(refused, errors.Unavailable | errors.TimeLimit):
                    raise refused from None
                broken += 1
                request.limit = left if request.limit else 0
                await asyncio.sleep(RESUME_PAUSE_S)
            else:
                return
            finally:
                pages.cancel()


def _channel(
    address: str, credentials: grpc.ChannelCredentials | None, options: wire.ChannelOptions
) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


async def _answer(call: Awaitable[Answer]) -> Answer:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise translated(error) from None


def _in_step(data: bytes, event: pb.WatchResponse, offset: int, task_id: str) -> bytes:
    """The same, if there are any the bytes at `offset`."""
    if data and event.offset != offset:
        log.error("body_out_of_step", task_id=task_id, wanted=offset, got=event.offset)
        raise errors.BridgeError
    return data


async def _write_all(call: Any, pieces: AsyncGenerator[bytes, None], *, limit: int) -> None:
    """All of a body. Raises TooLarge: of a refusal that comes while we write, grpc.aio may not tell the reason."""
    size = 0
    async with aclosing(pieces) as chunks:
        async for data in chunks:
            size += len(data)
            if size > limit:
                raise errors.TooLarge(f"The body is larger than {limit} bytes, the most that this workspace takes")
            await call.write(Parcel(pb.UploadRequest(), data))
    await call.write(Parcel(pb.UploadRequest(last=True)))
    await call.done_writing()


async def _chunks(begun: bytes, rest: AsyncIterator[bytes], least: int) -> AsyncGenerator[bytes, None]:
    """The same in chunks of so many bytes at least, but for the last: a message costs what a third of a chunk does."""
    # Not a list: pieces may be as small as a caller likes.
    waiting = bytearray(begun)
    async for piece in rest:
        waiting += piece
        while len(waiting) >= least:
            yield _cut(waiting)
    while waiting:
        yield _cut(waiting)


def _cut(waiting: bytearray) -> bytes:
    """Take a chunk off its front."""
    data = bytes(memoryview(waiting)[: wire.CHUNK_BYTES])
    del waiting[: wire.CHUNK_BYTES]
    return data


def _raise_error(answer: pb.Answer) -> None:
    if answer.HasField("error"):
        raise refusal(answer.error)
