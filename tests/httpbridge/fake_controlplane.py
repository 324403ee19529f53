"""A control plane in memory behind a real gRPC server: obeys protos/ngpu/v1, runs a scripted container, remembers.

One workspace-wide container: `container` is called with an Exchange and returns an Answer, or raises Broken.
"""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn, Self

import grpc
from ngpu import wire
from ngpu.v1 import asset_pb2, asset_pb2_grpc, http_pb2, task_pb2_grpc, workspace_pb2, workspace_pb2_grpc
from ngpu.v1 import task_pb2 as pb

WORKSPACE = "367614711220405248000001"
OTHER_WORKSPACE = "367614711220405248000002"
TOKEN = "bridge-token"
NODE_ADDR = "0xCac10F51814E8e425a6877951fecb7746161c669"
RICH = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
POOR = "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq"
INLINE_BYTES = wire.INLINE_BYTES


@dataclass
class Exchange:
    """What the container gets."""

    port: int
    method: str
    path: str
    query: str
    headers: list[tuple[str, bytes]]
    body: bytes

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(found) < 2, f"{name} came twice"
        return found[0].decode() if found else None


@dataclass
class Answer:
    """What the container says."""

    body: bytes = b""
    status: int = 200
    headers: list[tuple[str, bytes]] = field(default_factory=lambda: [("Content-Type", b"application/json")])


class Broken(Exception):
    """The attempt ends without an answer."""

    def __init__(self, reason: str, message: str, cause: "pb.Cause.ValueType" = pb.CAUSE_PLATFORM) -> None:
        super().__init__(message)
        self.failure = pb.Failure(cause=cause, reason=reason, message=message)


class Refused(Exception):
    """An error of the wire."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.error = http_pb2.Error(code=code.value[0], reason=reason, message=message, retry_after_ms=retry_after_ms)


Container = Callable[[Exchange], Awaitable[Answer]]


async def echo(exchange: Exchange) -> Answer:
    """The body comes back."""
    return Answer(exchange.body)


@dataclass
class Workspace:
    name: str
    ports: list[int] = field(default_factory=lambda: [8080, 8081])
    replicas: list[workspace_pb2.Replica] = field(default_factory=list)


@dataclass
class Task:
    request: pb.ScheduleRequest
    workspace_id: str
    port: int
    body: bytes
    view: pb.Task
    number: int
    response: http_pb2.HttpResponse = field(default_factory=http_pb2.HttpResponse)
    response_body: bytes = b""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    runner: "asyncio.Task[None] | None" = None


class FakeControlPlane(
    task_pb2_grpc.TaskServiceServicer,
    asset_pb2_grpc.AssetServiceServicer,
    workspace_pb2_grpc.WorkspaceServiceServicer,
):
    """See the module. `start` gives it an address; what tests look at afterwards are the public attributes."""

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.clock = clock
        self.container: Container = echo
        self.token = TOKEN
        self.workspaces = {WORKSPACE: Workspace("demo"), OTHER_WORKSPACE: Workspace("other", ports=[9000])}
        #: Published name to (workspace id, port, path).
        self.routes: dict[str, tuple[str, int, str]] = {"img2img": (WORKSPACE, 8081, "/sdapi/v1/img2img")}
        self.holdings: dict[str, dict[str, str]] = {RICH: {"AINN": "100.75"}}
        self.tasks: dict[str, Task] = {}
        self.exchanges: list[Exchange] = []
        self.scheduled: list[pb.ScheduleRequest] = []
        self.abandoned: list[int] = []
        self.uploads: dict[str, bytes] = {}
        self.upload_requests: list[pb.UploadRequest] = []
        #: An upload broke that nobody will go on with.
        self.discarded = asyncio.Event()
        self.frames: list[int] = []
        self.batches = 0
        self.page_size = 1000
        self.body_limit = 64 * 1024 * 1024
        #: Set to have the next calls of a method refused.
        self.refuse: dict[str, Refused] = {}
        #: A method's streams break after so many messages.
        self.break_after: dict[str, int] = {}
        #: Schedule and Query are taken and not answered.
        self.silent = False
        #: Key and certificate, PEM.
        self.tls: tuple[bytes, bytes] | None = None
        self._keys: dict[tuple[str, str], str] = {}
        self._numbers = itertools.count(1)
        self._server: grpc.aio.Server | None = None
        self._port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen; again on the same port after `stop`."""
        self._server = grpc.aio.server(options=wire.SERVER_OPTIONS)
        task_pb2_grpc.add_TaskServiceServicer_to_server(self, self._server)
        asset_pb2_grpc.add_AssetServiceServicer_to_server(self, self._server)
        workspace_pb2_grpc.add_WorkspaceServiceServicer_to_server(self, self._server)
        if self.tls is None:
            self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        else:
            credentials = grpc.ssl_server_credentials([self.tls])
            self._port = self._server.add_secure_port(f"127.0.0.1:{self._port}", credentials)
        await self._server.start()

    async def stop(self, grace_s: float | None = None) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None
        runners = [task.runner for task in self.tasks.values() if task.runner is not None]
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        # By now its callers have gone; this is so that its handlers get to know.
        await self.stop(1.0)

    def add_task(self, workspace_id: str = WORKSPACE, **view: Any) -> str:
        """A task that is simply there."""
        task_id = self._new_id()
        state = pb.Task(task_id=task_id, **view)
        if not state.HasField("create_time"):
            state.create_time.FromDatetime(self.clock())
        number = int(task_id.rpartition("_")[2])
        task = self.tasks[task_id] = Task(pb.ScheduleRequest(), workspace_id, 8080, b"", state, number)
        if state.state > pb.TASK_STATE_RUNNING:
            task.ended.set()
        return task_id

    def _new_id(self) -> str:
        return f"{self.clock():%Y%m%d_%H_%M_%S}_{next(self._numbers):020d}"

    # TaskService

    async def Batch(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.BatchResponse]:  # noqa: N802
        await self._admit(context)
        self.batches += 1
        answers: asyncio.Queue[pb.Answer | None] = asyncio.Queue()
        calls: dict[int, asyncio.Task[None]] = {}
        reader = asyncio.create_task(self._read_batch(request_iterator, answers, calls), name="fake-batch-reader")
        try:
            while (answer := await answers.get()) is not None:
                frame = pb.BatchResponse(answers=[answer])
                while not answers.empty() and (more := answers.get_nowait()) is not None:
                    frame.answers.append(more)
                yield frame
        finally:
            reader.cancel()
            for call in calls.values():
                call.cancel()
            await asyncio.gather(reader, *calls.values(), return_exceptions=True)

    async def _read_batch(
        self, frames: Any, answers: "asyncio.Queue[pb.Answer | None]", calls: "dict[int, asyncio.Task[None]]"
    ) -> None:
        try:
            async for frame in frames:
                self.frames.append(len(frame.calls))
                # Of earlier calls: one in this very frame would not be found.
                for call_id in frame.abandoned:
                    self.abandoned.append(call_id)
                    if call_id in calls:
                        calls[call_id].cancel()
                for call in frame.calls:
                    calls[call.id] = asyncio.create_task(self._call(call, answers), name="fake-call")
                    calls[call.id].add_done_callback(functools.partial(_forget, calls, call.id))
        finally:
            answers.put_nowait(None)

    async def _call(self, call: pb.Call, answers: "asyncio.Queue[pb.Answer | None]") -> None:
        answer = pb.Answer(id=call.id)
        method = call.WhichOneof("method")
        try:
            if method == "schedule":
                answer.schedule.CopyFrom(await self._schedule(call.schedule))
            elif method == "query":
                answer.query.CopyFrom(await self._query(call.query))
            elif method == "cancel":
                answer.cancel.CopyFrom(await self._cancel(call.cancel))
        except Refused as refused:
            answer.error.CopyFrom(refused.error)
        if not self.silent:
            answers.put_nowait(answer)

    async def _schedule(self, request: pb.ScheduleRequest) -> pb.ScheduleResponse:
        self._refusal("Schedule")
        task = self._accept(request)
        if request.HasField("wait"):
            try:
                await asyncio.wait_for(task.ended.wait(), request.wait.ToTimedelta().total_seconds())
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                if request.cancel_on_hangup and not task.ended.is_set():
                    self._end(task, pb.TASK_STATE_CANCELLED, pb.Failure(reason="CANCELLED", message="the caller left"))
                raise
        return pb.ScheduleResponse(task=task.view, response=self._cut(task.response, task.response_body, INLINE_BYTES))

    def _accept(self, request: pb.ScheduleRequest) -> Task:
        workspace_id, port, path = request.workspace_id, request.port, request.request.path
        if request.route:
            if request.route not in self.routes:
                raise Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such route")
            workspace_id, port, path = self.routes[request.route]
        if workspace_id not in self.workspaces:
            raise Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such workspace")
        ports = self.workspaces[workspace_id].ports
        if port not in (0, *ports):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", f"port {port} is not declared")
        self._check_asset(request.btc_address)
        sent = request.request.body
        if sent.upload_id and sent.upload_id not in self.uploads:
            raise Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such upload")
        body = self.uploads.pop(sent.upload_id) if sent.upload_id else sent.inline
        assert sent.size == len(body)
        key = (workspace_id, request.idempotency_key)
        if request.idempotency_key and key in self._keys:
            task = self.tasks[self._keys[key]]
            if (task.body, task.request.request.path) != (body, request.request.path):
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT", "the key was used with another request")
            return task
        task_id = self._new_id()
        view = pb.Task(task_id=task_id, state=pb.TASK_STATE_RUNNING, attempt=1)
        view.create_time.FromDatetime(self.clock())
        view.start_time.FromDatetime(self.clock())
        number = int(task_id.rpartition("_")[2])
        task = Task(request, workspace_id, port or ports[0], body, view, number)
        task.request.request.path = path
        self.tasks[task_id] = task
        self.scheduled.append(request)
        if request.idempotency_key:
            self._keys[key] = task_id
        task.runner = asyncio.create_task(self._run(task), name="fake-container")
        return task

    async def _run(self, task: Task) -> None:
        sent = task.request.request
        headers = [(header.name, header.value) for header in sent.headers]
        exchange = Exchange(task.port, sent.method, sent.path, sent.query, headers, task.body)
        self.exchanges.append(exchange)
        try:
            answer = await self.container(exchange)
        except Broken as broken:
            self._end(task, pb.TASK_STATE_FAILED, broken.failure)
            return
        if task.ended.is_set():
            return
        task.response_body = answer.body
        task.response.status = answer.status
        for name, value in answer.headers:
            task.response.headers.add(name=name, value=value)
        self._end(task, pb.TASK_STATE_COMPLETED, None)

    def _end(self, task: Task, state: "pb.TaskState.ValueType", failure: pb.Failure | None) -> None:
        task.view.state = state
        task.view.end_time.FromDatetime(self.clock())
        if failure is not None:
            task.view.failure.CopyFrom(failure)
        if task.runner is not None and task.runner is not asyncio.current_task():
            task.runner.cancel()
        task.ended.set()

    async def _query(self, request: pb.QueryRequest) -> pb.QueryResponse:
        self._refusal("Query")
        task = self._task(request)
        if request.HasField("wait"):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(task.ended.wait(), request.wait.ToTimedelta().total_seconds())
        return pb.QueryResponse(task=task.view, response=self._cut(task.response, task.response_body, INLINE_BYTES))

    async def _cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        self._refusal("Cancel")
        task = self._task(request)
        if not task.view.HasField("end_time"):
            self._end(task, pb.TASK_STATE_CANCELLED, pb.Failure(reason="CANCELLED", message="Cancelled by its owner"))
        return pb.CancelResponse(task=task.view)

    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadResponse:  # noqa: N802
        await self._admit(context, "Upload")
        upload_id = f"upload-{next(self._numbers):032x}"
        body = b""
        first = None
        async for piece in request_iterator:
            self.upload_requests.append(piece)
            assert len(piece.data) <= wire.CHUNK_BYTES
            if first is None and piece.workspace_id not in self.workspaces and piece.route not in self.routes:
                await self._refuse(context, Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such workspace"))
            body += piece.data
            if max(len(body), piece.size) > self.body_limit:
                await self._refuse(
                    context, Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", "the workspace takes less")
                )
            if first is None:
                first = piece
                agreed = ((wire.UPLOAD_ID, upload_id), (wire.UPLOAD_LIMIT, str(self.body_limit)))
                await context.send_initial_metadata(agreed)
        if first is not None and first.discard and not self.upload_requests[-1].last:
            self.discarded.set()
        else:
            self.uploads[upload_id] = body
        return pb.UploadResponse(upload_id=upload_id, size=len(body))

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> AsyncIterator[pb.ListTasksResponse]:  # noqa: N802
        await self._admit(context, "ListTasks")
        if request.workspace_id not in self.workspaces:
            await self._refuse(context, Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such workspace"))
        after = int(request.cursor) if request.cursor.isdigit() else 0
        found = [task for task in self.tasks.values() if self._listed(task, request) and task.number > after]
        most = request.limit or len(found)
        for sent, start in enumerate(range(0, max(1, min(len(found), most)), self.page_size)):
            if sent == self.break_after.get("ListTasks", -1):
                del self.break_after["ListTasks"]
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
            end = min(start + self.page_size, most)
            page = found[start:end]
            cursor = str(page[-1].number) if page and end < len(found) else ""
            yield pb.ListTasksResponse(task_ids=[task.view.task_id for task in page], cursor=cursor)

    def _listed(self, task: Task, request: pb.ListTasksRequest) -> bool:
        created = task.view.create_time.ToDatetime(UTC)
        return (
            task.workspace_id == request.workspace_id
            and (not request.node_addr or request.node_addr == NODE_ADDR)
            and (not request.HasField("start_time") or created >= request.start_time.ToDatetime(UTC))
            and (not request.HasField("end_time") or created < request.end_time.ToDatetime(UTC))
        )

    async def GetDetail(self, request: pb.GetDetailRequest, context: Any) -> pb.GetDetailResponse:  # noqa: N802
        await self._admit(context, "GetDetail")
        try:
            task = self._task(request)
        except Refused as refused:
            await self._refuse(context, refused)
        owned = bool(request.workspace_id)
        sent = pb.ScheduleRequest()
        sent.CopyFrom(task.request)
        detail = pb.GetDetailResponse(
            task=task.view,
            number=task.number,
            workspace_id=task.workspace_id if owned else "",
            workspace_name=self.workspaces[task.workspace_id].name,
            btc_address=sent.btc_address,
            port=task.port,
            origin=sent.origin,
            request=sent.request,
            response=self._cut(task.response, task.response_body, wire.ANSWER_INLINE_BYTES),
        )
        detail.request.body.Clear()
        detail.request.body.size = len(task.body)
        detail.request.body.inline = task.body[: wire.ANSWER_INLINE_BYTES]
        if task.view.attempt:
            attempt = detail.attempts.add(
                number=1, replica_id="r-000000000001", node_addr=NODE_ADDR, node_ip="43.240.1.180",
                assign_time=task.view.start_time, gpu_us=980_000, gpu_ids=["GPU-1"],
                http_status=task.response.status, reason="the only free slot",
            )  # fmt: skip
            if task.view.HasField("end_time"):
                attempt.end_time.CopyFrom(task.view.end_time)
                attempt.delivery = pb.DELIVERY_ANSWERED if task.response.status else pb.DELIVERY_SENT
            if task.view.HasField("failure"):
                attempt.failure.CopyFrom(task.view.failure)
        return detail

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        await self._admit(context, "Watch")
        try:
            task = self._task(request)
        except Refused as refused:
            await self._refuse(context, refused)
        body = task.body if request.part == pb.WatchRequest.PART_REQUEST else task.response_body
        yield pb.WatchResponse(task=task.view, head=task.response)
        for sent, start in enumerate(range(request.offset, len(body), wire.CHUNK_BYTES)):
            if sent == self.break_after.get("Watch", -1):
                del self.break_after["Watch"]
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
            yield pb.WatchResponse(data=body[start : start + wire.CHUNK_BYTES], offset=start)

    # AssetService, WorkspaceService

    async def CheckAddress(  # noqa: N802
        self, request: asset_pb2.CheckAddressRequest, context: Any
    ) -> asset_pb2.CheckAddressResponse:
        await self._admit(context, "CheckAddress")
        if not request.address.startswith(("bc1", "BC1", "1", "3")):
            await self._refuse(
                context, Refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "not a mainnet address")
            )
        held = self.holdings.get(request.address, {})
        return asset_pb2.CheckAddressResponse(
            holdings=[asset_pb2.Holding(ticker=ticker, balance=balance) for ticker, balance in held.items()]
        )

    async def GetWorkspace(  # noqa: N802
        self, request: workspace_pb2.GetWorkspaceRequest, context: Any
    ) -> workspace_pb2.GetWorkspaceResponse:
        await self._admit(context, "GetWorkspace")
        found = [pair for pair in self.workspaces.items() if request.workspace in (pair[0], pair[1].name)]
        if not found:
            await self._refuse(context, Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such workspace"))
        workspace_id, workspace = found[0]
        answer = workspace_pb2.Workspace(id=workspace_id, replicas=workspace.replicas)
        return workspace_pb2.GetWorkspaceResponse(workspace=answer)

    # The rest of the contract is not the bridge's to call.

    def _uncalled(self, request: Any, context: Any) -> Any:
        raise AssertionError(f"the bridge has no business calling this with {request!r}")

    Schedule = Query = Cancel = GetFlights = RedeliverWebhook = _uncalled

    def Connect(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise AssertionError("the bridge has no business calling this")

    CreateWorkspace = UpdateWorkspace = ListWorkspaces = ScaleWorkspace = DeleteWorkspace = WatchWorkspace = _uncalled
    PublishRoute = ListRoutes = DeleteRoute = GetWebhookSecret = RotateWebhookSecret = _uncalled

    async def _admit(self, context: Any, method: str = "") -> None:
        metadata = dict(context.invocation_metadata())
        if metadata.get(wire.AUTHORIZATION) != f"Bearer {self.token}":
            refused = Refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "unknown token")
            await self._refuse(context, refused)
        if method in self.refuse:
            await self._refuse(context, self.refuse[method])

    def _refusal(self, method: str) -> None:
        if method in self.refuse:
            raise self.refuse[method]

    async def _refuse(self, context: Any, refused: Refused) -> NoReturn:
        code = next(code for code in grpc.StatusCode if code.value[0] == refused.error.code)
        trailing = ((wire.ERROR, refused.error.SerializeToString()),)
        await context.abort(code, refused.error.message, trailing_metadata=trailing)
        raise AssertionError("abort raises")

    def _task(self, request: Any) -> Task:
        task = self.tasks.get(request.task_id)
        if task is None or request.workspace_id not in ("", task.workspace_id):
            raise Refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "There is no such task, or it is not yours.")
        return task

    def _check_asset(self, address: str) -> None:
        if not address:
            return
        if not address.startswith(("bc1", "BC1", "1", "3")):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "btc_address is not an address")
        if address not in self.holdings:
            raise Refused(grpc.StatusCode.PERMISSION_DENIED, "ASSET_MISSING", "The address holds no AINN")

    def _cut(self, response: http_pb2.HttpResponse, body: bytes, most: int) -> http_pb2.HttpResponse:
        cut = http_pb2.HttpResponse()
        cut.CopyFrom(response)
        if response.status:
            cut.body.inline = body[:most]
            cut.body.size = len(body)
            try:
                body.decode()
                cut.body.is_utf8 = True
            except UnicodeDecodeError:
                pass
        return cut


def _forget(calls: "dict[int, asyncio.Task[None]]", call_id: int, _: object) -> None:
    calls.pop(call_id, None)
