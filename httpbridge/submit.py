"""Work is given: `POST /user/<path>` waits for the container's answer, `schedulingTask` does not; else they are one.

Everything that can be refused is refused before the body is read, and everything else before a task exists.
"""

from collections.abc import Awaitable
from contextlib import aclosing
from typing import Final, NamedTuple
from urllib.parse import unquote

from aiohttp import web
from ngpu import wire
from ngpu.v1 import task_pb2 as pb

from httpbridge import credentials, envelope, headers, origin, params
from httpbridge.answers import ACCEPTED_MSG, Answers
from httpbridge.app import USER, Call
from httpbridge.bodies import BodyReader, Budget, Hold
from httpbridge.calls import ControlPlane
from httpbridge.envelope import Payload, Stored
from httpbridge.errors import BadRequest, NotFound, Unauthorized
from httpbridge.opening import HEAD_BYTES, WHOLE_BYTES, Opening, Superseded
from httpbridge.plain import PlainRequest
from httpbridge.reply import Reply

SCHEDULING_TASK: Final = "schedulingTask"
CALLBACK_URL: Final = "X-NGPU-Callback-Url"
PRIORITY: Final = "X-NGPU-Priority"
#: The parameters that are ours; all others are the container's.
OWN: Final = frozenset({"paramUrl", "paramPort", "taskMode", "callback_url"})


class Submission:
    """The two calls that give work."""

    def __init__(
        self,
        control_plane: ControlPlane,
        answers: Answers,
        reader: BodyReader,
        budget: Budget,
        *,
        accepted_result_code: int,
        require_auth: bool,
        sync_wait_s: float,
        trusted_proxies: origin.Networks = (),
    ) -> None:
        self._control_plane = control_plane
        self._answers = answers
        self._reader = reader
        self._budget = budget
        self._accepted_result_code = accepted_result_code
        self._require_auth = require_auth
        self._sync_wait_ns = int(sync_wait_s * 1e9)
        self._trusted_proxies = trusted_proxies

    def passthrough(self, call: Call) -> Awaitable[Reply]:
        """`POST /user/<path>`: to the caller's workspace, or without a header to the published route of that name."""
        return self._submit(call, call.once(self, self._passthrough))

    def scheduling_task(self, call: Call) -> Awaitable[Reply]:
        """`POST /user/schedulingTask?paramUrl=&paramPort=&taskMode=`."""
        return self._submit(call, call.once(self, self._scheduling_task))

    def _passthrough(self, call: Call) -> "_Plan":
        workspace_id = credentials.workspace_id(call.request.headers)
        path, _ = params.container_path(call.path[len(USER) - 1 :], "The path")
        request = pb.ScheduleRequest()
        own, request.request.query = params.split_query(call.query, OWN)
        port = params.port(own.get("paramPort"))
        sync = params.is_sync(own.get("taskMode"), default=True)
        request.callback_url = params.callback_url(own.get("callback_url"), call.request.headers.get(CALLBACK_URL))
        if workspace_id:
            request.workspace_id = workspace_id
            request.port = port
            request.request.path = path
        elif self._require_auth:
            raise Unauthorized
        else:
            # A published route names its own port and path, which a stranger may not choose.
            request.route = unquote(path[1:])
        return self._plan(call, request, unquote(path[1:].partition("/")[0]), sync=sync)

    def _scheduling_task(self, call: Call) -> "_Plan":
        workspace_id = credentials.workspace_id(call.request.headers)
        if not workspace_id:
            raise Unauthorized
        own, query = params.split_query(call.query, OWN)
        path, own_query = params.container_path(own.get("paramUrl", ""))
        request = pb.ScheduleRequest(workspace_id=workspace_id, port=params.port(own.get("paramPort")))
        request.callback_url = params.callback_url(own.get("callback_url"), call.request.headers.get(CALLBACK_URL))
        request.request.path = path
        request.request.query = f"{own_query}&{query}" if own_query and query else own_query or query
        sync = params.is_sync(own.get("taskMode"), default=False)
        return self._plan(call, request, SCHEDULING_TASK, sync=sync)

    def _plan(self, call: Call, request: pb.ScheduleRequest, operation: str, *, sync: bool) -> "_Plan":
        fields = call.request.headers
        request.priority = params.priority(fields.get(PRIORITY))
        key = params.idempotency_key(fields.get("Idempotency-Key"))
        if key:
            if request.route:
                raise BadRequest("An Idempotency-Key belongs to a workspace: send the Authorization header too")
            request.idempotency_key = key
        if request.callback_url and request.route:
            # What is posted is signed in the name of the workspace, and a stranger may not have that done.
            raise BadRequest("A callback_url belongs to a workspace: send the Authorization header too")
        request.request.method = "POST"
        headers.forward(call.request.raw_headers, fields.get("Connection", ""), request.request)
        origin.fill(request.origin, call, operation, self._trusted_proxies)
        if sync:
            request.wait.FromNanoseconds(self._sync_wait_ns)
            # Who sends a key means to ask again after a broken connection, and then wants his task, not its remains;
            # and who is told of its end need not wait for it.
            request.cancel_on_hangup = not (key or request.callback_url)
        sent_as = fields.get("Content-Type", ""), fields.get("Content-Encoding", "")
        return _Plan(request, sent_as, fields.get("BtcAddress", ""), sync)

    async def _submit(self, call: Call, plan: "_Plan") -> Reply:
        request = plan.request
        try:
            # The body is in no variable here: many calls may wait for long.
            response = await self._control_plane.schedule(
                request,
                self._opened(call.request, plan)
                if isinstance(call.request, PlainRequest)
                else await self._read(call.request, plan),
            )
        except NotFound:
            raise Unauthorized(
                f"Nothing is published under {request.route[:64]!r}: send `Authorization: Bearer <workspace id>`"
                if request.route
                else "There is no workspace with this id"
            ) from None
        task = response.task
        if plan.sync:
            return await self._answers.called(task, response.response, request.workspace_id)
        accepted = envelope.Accepted(self._accepted_result_code, ACCEPTED_MSG, task.task_id, task.task_id, task.task_id)
        return Reply(envelope.encode(accepted), task_id=task.task_id)

    def _opened(self, request: PlainRequest, plan: "_Plan") -> Payload:
        """The container's body out of the caller's."""
        body = request.take()
        self._reader.check(len(body))
        payload = envelope.open_(body, *plan.sent_as)
        if plan.btc_address and not payload.btc_address:
            return payload._replace(btc_address=credentials.btc_address(plan.btc_address))
        return payload

    async def _read(self, request: web.BaseRequest, plan: "_Plan") -> Payload | Stored:
        """The same of a body that may still be coming; what is large is stored."""
        into = plan.request
        with self._budget.hold() as hold:
            payload = await self._payload(request, plan, hold)
            btc_address = payload.btc_address or credentials.btc_address(plan.btc_address)
            if isinstance(payload, Stored) or len(payload.body) <= wire.INLINE_BYTES:
                return payload._replace(btc_address=btc_address)
            body = payload.body
            upload_id = await self._control_plane.upload(body, workspace_id=into.workspace_id, route=into.route)
        return Stored(upload_id, len(body), payload.content_type, btc_address)

    async def _payload(self, request: web.BaseRequest, plan: "_Plan", hold: Hold) -> Payload | Stored:
        """What the container gets; stored already, if it could go on as it came."""
        length = request.content_length
        if (length is not None and length <= WHOLE_BYTES) or request.content.is_eof():
            return envelope.open_(await self._reader.read(request, hold), *plan.sent_as)
        async with aclosing(self._reader.limited_pieces(request)) as pieces:
            opening = Opening(pieces, *plan.sent_as)
            if not await opening.begin(hold, HEAD_BYTES if length else WHOLE_BYTES):
                hold.grow_to(length or 0)
                return envelope.open_(await self._reader.hold(opening.begun, pieces, hold), *plan.sent_as)
            try:
                stored = await self._pass_on(opening, plan.request)
            except Superseded as other:
                return other.payload
            return Stored(stored.upload_id, stored.size, opening.content_type, opening.btc_address)

    async def _pass_on(self, opening: Opening, request: pb.ScheduleRequest) -> pb.UploadResponse:
        """Store the container's body as it comes."""
        async with aclosing(opening.pieces()) as pieces:
            return await self._control_plane.store(b"", pieces, workspace_id=request.workspace_id, route=request.route)


class _Plan(NamedTuple):
    """All that a call's head says. `request` has no body yet, and is copied, never changed."""

    request: pb.ScheduleRequest
    #: Content-Type and Content-Encoding.
    sent_as: tuple[str, str]
    #: The field; "" without it.
    btc_address: str
    #: The caller waits for the container's answer.
    sync: bool
