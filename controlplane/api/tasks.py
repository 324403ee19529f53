"""TaskService: give work, ask after it, get its result. What Batch does is in batch.py, with the same `begin`."""

import asyncio
import hashlib
import re
from collections.abc import Callable
from typing import Final, Protocol, TypedDict

from msgspec import structs
from ngpu import wire
from ngpu.parcels import Parcel
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane import destinations, ids
from controlplane.access import Kind, Principal
from controlplane.api import translate
from controlplane.api.gate import Caller, Stream
from controlplane.api.owners import Owners
from controlplane.api.questions import Questions
from controlplane.api.requests import TARGET_BYTES, check_size, chunk_of, request_of
from controlplane.api.stored import body_of_request, body_of_response, read_whole
from controlplane.bodies import Bodies
from controlplane.destinations import Rules
from controlplane.dispatcher import Dispatcher, NewTask, TaskView
from controlplane.errors import (
    AssetMissing,
    AssetUnknown,
    Conflict,
    InvalidArgument,
    NgpuError,
    NotFound,
)
from controlplane.fleet import Fleet, Workspace
from controlplane.jobs import Question, question_of
from controlplane.model import ENDED
from controlplane.slots import Request
from controlplane.spec import Spec
from controlplane.store import Store
from controlplane.tasks import PRIORITY

#: Longest time an answer is held, in seconds.
WAIT_S: Final = 3600.0
IDEMPOTENCY_KEY_BYTES: Final = 255
#: What is kept for the record only is cut to this.
RECORD_CHARS: Final = 256
_UPLOAD_ID: Final = re.compile(r"upload-[0-9a-f]{32}")


class Assets(Protocol):
    """Who says what an address holds."""

    async def check(self, address: str) -> tuple[object, ...]:
        """What it holds; empty: nothing. Raises InvalidArgument, AssetUnknown."""


class _Waiting(TypedDict):
    """How a caller waits."""

    wait_s: float
    cancel_on_hangup: bool


class TaskApi:
    """Schedule, Upload, Query and Cancel.

    `allow_unchecked`: tasks pass whose address could not be checked because no indexer answers. `destinations`: where
    their ends may be posted to.
    """

    def __init__(
        self,
        *,
        owners: Owners,
        fleet: Fleet,
        dispatcher: Dispatcher,
        store: Store,
        bodies: Bodies,
        assets: Assets,
        new_task_id: Callable[[], str],
        allow_unchecked: bool = False,
        destinations: Rules = Rules(),  # noqa: B008 frozen
    ) -> None:
        self._owners = owners
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._store = store
        self._bodies = bodies
        self._assets = assets
        self._questions = Questions(store, dispatcher)
        self._new_task_id = new_task_id
        self._allow_unchecked = allow_unchecked
        self._destinations = destinations

    # Schedule.

    async def schedule(self, request: pb.ScheduleRequest, caller: Caller) -> pb.ScheduleResponse:
        """See task.proto."""
        view = await self.begin(request, caller.principal)
        answer = pb.ScheduleResponse()
        translate.fill_task(answer.task, view)
        await self._fill_response(answer.response, view, request.max_inline_bytes)
        return answer

    def begin(self, message: pb.ScheduleRequest, principal: Principal) -> "asyncio.Future[TaskView]":
        """Accept a task; the future is its answer, and cancelling it is the caller's hang-up.

        A task of asyncio is only made where something must be waited for first: an indexer, an upload.
        Raises the errors of Schedule, at once or through the future.
        """
        workspace, port, path = self._target(message, principal)
        spec = workspace.spec
        if path is not None:
            message.request.path = path
        request = request_of(message.request, spec, streamed=message.streamed)
        wait_s = _wait_of(message)
        key = message.idempotency_key
        if len(key.encode()) > IDEMPOTENCY_KEY_BYTES:
            raise InvalidArgument(f"idempotency_key: longer than {IDEMPOTENCY_KEY_BYTES} bytes.")
        if message.callback_url:
            destinations.host_of(message.callback_url, self._destinations)
        if not -PRIORITY <= message.priority <= PRIORITY:
            raise InvalidArgument(f"priority: {message.priority} is not from -{PRIORITY} to {PRIORITY}.")
        origin = message.origin
        new = NewTask(
            task_id=self._new_task_id(),
            workspace_uid=workspace.uid,
            port=port,
            request=request,
            # Who gives a key has said that doing it twice is no harm.
            repeatable=message.repeatable if message.HasField("repeatable") else spec.repeatable or bool(key),
            btc_address=message.btc_address,
            idempotency_key=key or None,
            request_hash=_hash_of(port, request, message.callback_url) if key else None,
            user_ip=origin.user_ip[:RECORD_CHARS],
            origin_url=origin.url[:TARGET_BYTES],
            operation=origin.operation[:RECORD_CHARS],
            streamed=message.streamed,
            callback_url=message.callback_url,
            priority=message.priority,
        )
        waiting: _Waiting = {"wait_s": wait_s, "cancel_on_hangup": message.cancel_on_hangup}
        body = message.request.body
        rules = spec.jobs
        question = question_of(rules, request.method, request.path, request.query) if rules else None
        if not (body.upload_id or new.btc_address or question):
            return self._dispatcher.accept(new, **waiting)
        # Not given the message itself: it would keep its whole frame in memory.
        later = self._begin_later(new, spec, waiting, question, upload_id=body.upload_id, expected=body.size)
        return asyncio.create_task(later, name=f"schedule-{new.task_id}")

    def _target(self, message: pb.ScheduleRequest, principal: Principal) -> tuple[Workspace, int, str | None]:
        """The workspace, its port, and the container's path if a route gives it."""
        if message.route:
            if message.workspace_id:
                raise InvalidArgument("workspace_id and route: give one of them.")
            route = self._fleet.route(message.route)
            if route is None or (principal.kind is Kind.WORKSPACE and route.workspace_uid != principal.id):
                raise NotFound(f"There is no published route {message.route[:128]!r}.")
            workspace, port, path = self._fleet.workspace(route.workspace_uid), route.port, route.path
        else:
            workspace = self._fleet.workspace(self._owners.workspace_uid(message.workspace_id, principal))
            port, path = message.port, None
        if workspace.delete_time is not None:
            raise NotFound("The workspace has been deleted.")
        ports = workspace.spec.ports
        if port and port not in ports:
            raise InvalidArgument(
                f"port: {port} is not one that the workspace declares ({', '.join(map(str, ports))})."
            )
        return workspace, port or ports[0], path

    async def _begin_later(
        self,
        new: NewTask,
        spec: Spec,
        waiting: _Waiting,
        question: Question | None,
        *,
        upload_id: str,
        expected: int,
    ) -> TaskView:
        if new.btc_address:
            await self._check_assets(new.btc_address)
        if question is not None and not upload_id:
            return await self._questions.ask(new, question, **waiting)
        if not upload_id:
            return await self._dispatcher.submit(new, **waiting)
        if new.request.body:
            raise InvalidArgument("request.body: give `inline` or `upload_id`, not both.")
        _check_upload_id(upload_id)
        size = await self._bodies.size(upload_id, written=False)
        if size is None:
            raise _no_upload()
        if expected not in {0, size}:
            raise InvalidArgument(f"request.body.size: the upload has {size} bytes, not {expected}.")
        check_size(size, spec)
        if size <= wire.INLINE_BYTES:
            await self._seal_upload(upload_id, upload_id, size)
            data = await read_whole(self._bodies, upload_id)
            if len(data) != size:
                raise _no_upload()
            new = structs.replace(new, request=structs.replace(new.request, body=data, size=size))
            view = await self._dispatcher.submit(new, **waiting)
            await self._bodies.delete(upload_id)
            return view
        new = structs.replace(new, request=structs.replace(new.request, size=size))
        # The body first: a row must never speak of one that is not there. A crash between the two leaves a file that
        # no row names, which the retention of bodies finds by its age.
        name = body_of_request(new.task_id)
        await self._seal_upload(upload_id, name, size)
        if new.request_hash is not None:
            digest = hashlib.sha256(new.request_hash)
            async for chunk in self._bodies.follow(name):
                digest.update(chunk)
            new = structs.replace(new, request_hash=digest.digest())
        try:
            view = await self._dispatcher.submit(new, **waiting)
        except NgpuError:
            await self._drop_request(new.task_id)
            raise
        if view.task_id != new.task_id:
            # The idempotency key has led to an earlier task, which has its own.
            await self._bodies.delete(name)
        return view

    async def _seal_upload(self, upload_id: str, name: str, size: int) -> None:
        """Make it the body of that name. Raises NotFound: it is not there any more; Conflict: it has another size."""
        try:
            sealed = await self._bodies.seal(upload_id, name, durable=name != upload_id)
        except NotFound:
            raise _no_upload() from None
        if sealed != size:
            await self._bodies.delete(name)
            raise Conflict("request.body.upload_id: the upload was still growing; send it again.")

    async def _drop_request(self, task_id: str) -> None:
        """Delete the body of a task that was refused; not of one whose fate is only unknown to us."""
        if not self._dispatcher.is_open(task_id) and await self._store.task(task_id) is None:
            await self._bodies.delete(body_of_request(task_id))

    async def _check_assets(self, address: str) -> None:
        try:
            if not await self._assets.check(address):
                raise AssetMissing
        except AssetUnknown:
            if not self._allow_unchecked:
                raise

    async def _fill_response(self, message: http_pb2.HttpResponse, view: TaskView, max_inline_bytes: int) -> None:
        """The response of a unary call: larger bodies are read from the body store, up to the limit."""
        response = view.response
        if response is None:
            return
        limit = min(max_inline_bytes or wire.ANSWER_INLINE_BYTES, wire.ANSWER_INLINE_BYTES)
        translate.fill_response(message, response, limit)
        if view.state in ENDED and len(response.body) < response.size <= limit:
            message.body.inline = await read_whole(self._bodies, body_of_response(view.task_id, view.attempt))

    # Upload.

    async def upload(self, stream: Stream[Parcel[pb.UploadRequest], None], caller: Caller) -> pb.UploadResponse:
        """See task.proto."""
        parcel = await stream.read()
        if parcel is None:
            raise InvalidArgument("The first message is missing.")
        message = parcel.message
        if message.route:
            named = self._target(pb.ScheduleRequest(route=message.route), caller.principal)[0]
        else:
            named = self._fleet.workspace(self._owners.workspace_uid(message.workspace_id, caller.principal))
        limit = named.spec.limits.request_body_bytes
        check_size(message.size, named.spec)
        upload_id, size = message.upload_id, message.offset
        if not upload_id:
            upload_id = ids.upload_id()
        else:
            _check_upload_id(upload_id)
            if await self._bodies.size(upload_id) is None:
                raise NotFound("upload_id: there is no such upload, or a task has taken it.")
        await stream.accept(((wire.UPLOAD_ID, upload_id), (wire.UPLOAD_LIMIT, str(limit))))
        keep = not message.discard
        try:
            while parcel is not None:
                size = await self._bodies.append(upload_id, size, chunk_of(parcel), limit_bytes=limit, behind=True)
                keep = keep or parcel.message.last
                parcel = await stream.read()
            await self._bodies.flush(upload_id)
        finally:
            if not keep:
                # It waits for an append that may still be under way, even if we are cancelled once more meanwhile.
                await asyncio.shield(self._bodies.delete(upload_id))
        return pb.UploadResponse(upload_id=upload_id, size=size)

    # Query, Cancel.

    async def query(self, request: pb.QueryRequest, caller: Caller) -> pb.QueryResponse:
        """See task.proto."""
        view = await self.ask(request, caller.principal)
        answer = pb.QueryResponse()
        translate.fill_task(answer.task, view)
        await self._fill_response(answer.response, view, request.max_inline_bytes)
        return answer

    def begin_query(self, request: pb.QueryRequest, principal: Principal) -> "asyncio.Future[TaskView]":
        """For Batch: the task that a Query speaks of. Its owner is still to be checked: see `owner`.

        A task of asyncio is only made where the owner must be known before the wait, not to tell others that it exists,
        and is not known here.
        """
        wait_s = _wait_of(request)
        owner = self._owners.owner(request.workspace_id, principal) if wait_s else ""
        if owner and self._dispatcher.workspace_of(request.task_id) != owner:
            return asyncio.create_task(self.ask(request, principal), name=f"query-{request.task_id[:64]}")
        return self._dispatcher.ask(request.task_id, wait_s=wait_s)

    async def ask(self, request: pb.QueryRequest, principal: Principal) -> TaskView:
        """The task that a Query speaks of, when it has ended or the time is up."""
        wait_s = _wait_of(request)
        view = await self._owners.task(request.task_id, request.workspace_id, principal)
        return view if view.state in ENDED or not wait_s else await self._dispatcher.query(view.task_id, wait_s=wait_s)

    async def cancel(self, request: pb.CancelRequest, caller: Caller) -> pb.CancelResponse:
        """See task.proto."""
        answer = pb.CancelResponse()
        translate.fill_task(answer.task, await self.end(request, caller.principal))
        return answer

    async def end(self, request: pb.CancelRequest, principal: Principal) -> TaskView:
        """Cancel the task that a Cancel speaks of."""
        await self._owners.task(request.task_id, request.workspace_id, principal)
        if request.hangup:
            self._dispatcher.hang_up(request.task_id)
            return await self._dispatcher.query(request.task_id)
        return await self._dispatcher.cancel(request.task_id)


def _wait_of(message: pb.ScheduleRequest | pb.QueryRequest) -> float:
    wait_s = translate.seconds_of(message.wait)
    if not 0 <= wait_s <= WAIT_S:
        raise InvalidArgument(f"wait: must be from 0 to {WAIT_S:g} s.")
    return wait_s


def _no_upload() -> NotFound:
    """Another task may take an upload at any moment."""
    return NotFound("request.body.upload_id: there is no such upload, or a task has taken it.")


def _check_upload_id(upload_id: str) -> None:
    # It names a file: nothing but what we made ourselves.
    if not _UPLOAD_ID.fullmatch(upload_id):
        raise NotFound("upload_id: there is no such upload.")


def _hash_of(port: int, request: Request, callback_url: str) -> bytes:
    """Of what an idempotency key must always come with. Of headers only Content-Type: others change from try to try."""
    kinds = [value for name, value in request.headers if name.lower() == "content-type"]
    parts = (str(port), request.method, request.path, request.query, callback_url)
    digest = hashlib.sha256("\0".join(parts).encode() + b"\0" + b"\0".join(kinds) + b"\0")
    digest.update(request.body)
    return digest.digest()
