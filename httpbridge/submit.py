"""Work is given: `POST /user/<path>` waits for the container's answer, `schedulingTask` does not; else they are one.

Everything that can be refused is refused before the body is read, and everything else before a task exists.
"""

from contextlib import aclosing
from typing import Final
from urllib.parse import unquote

from ngpu import wire
from ngpu.v1 import task_pb2 as pb

from httpbridge import credentials, envelope, headers, origin, params
from httpbridge.answers import ACCEPTED_MSG, Answers
from httpbridge.app import USER, Call
from httpbridge.bodies import BodyReader, Budget, Hold
from httpbridge.calls import ControlPlane
from httpbridge.envelope import Payload
from httpbridge.errors import BadRequest, NotFound, Unauthorized
from httpbridge.opening import HEAD_BYTES, WHOLE_BYTES, Opening, Superseded
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

    async def passthrough(self, call: Call) -> Reply:
        """`POST /user/<path>`: to the caller's workspace, or without a header to the published route of that name."""
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
        return await self._submit(call, request, unquote(path[1:].partition("/")[0]), sync=sync)

    async def scheduling_task(self, call: Call) -> Reply:
        """`POST /user/schedulingTask?paramUrl=&paramPort=&taskMode=`."""
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
        return await self._submit(call, request, SCHEDULING_TASK, sync=sync)

    async def _submit(self, call: Call, request: pb.ScheduleRequest, operation: str, *, sync: bool) -> Reply:
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
        try:
            await self._add_body(call, request)
            response = await self._control_plane.schedule(request)
        except NotFound:
            raise Unauthorized(
                f"Nothing is published under {request.route[:64]!r}: send `Authorization: Bearer <workspace id>`"
                if request.route
                else "There is no workspace with this id"
            ) from None
        task = response.task
        if sync:
            return await self._answers.called(task, response.response, request.workspace_id)
        accepted = envelope.Accepted(self._accepted_result_code, ACCEPTED_MSG, task.task_id, task.task_id, task.task_id)
        return Reply(envelope.encode(accepted), task_id=task.task_id)

    async def _add_body(self, call: Call, request: pb.ScheduleRequest) -> None:
        """Read the caller's body and put the container's into `request`, or store it where it is large."""
        with self._budget.hold() as hold:
            payload = await self._payload(call, request, hold)
            if payload.btc_address:
                request.btc_address = payload.btc_address
            elif "BtcAddress" in call.request.headers:
                request.btc_address = credentials.btc_address(call.request.headers["BtcAddress"])
            if payload.content_type:
                request.request.headers.add(
                    name="Content-Type", value=payload.content_type.encode("utf-8", "surrogateescape")
                )
            body = request.request.body
            if body.upload_id:
                return
            body.size = len(payload.body)
            if body.size <= wire.INLINE_BYTES:
                body.inline = bytes(payload.body)
            else:
                body.upload_id = await self._control_plane.upload(
                    payload.body, workspace_id=request.workspace_id, route=request.route
                )

    async def _payload(self, call: Call, request: pb.ScheduleRequest, hold: Hold) -> Payload:
        """What the container gets; its body is not in it, but stored, if it could go on as it came."""
        fields, length = call.request.headers, call.request.content_length
        sent_as = fields.get("Content-Type", ""), fields.get("Content-Encoding", "")
        if (length is not None and length <= WHOLE_BYTES) or call.request.content.is_eof():
            return envelope.open_(await self._reader.read(call.request, hold), *sent_as)
        async with aclosing(self._reader.limited_pieces(call.request)) as pieces:
            opening = Opening(pieces, *sent_as)
            if not await opening.begin(hold, HEAD_BYTES if length else WHOLE_BYTES):
                hold.grow_to(length or 0)
                return envelope.open_(await self._reader.hold(opening.begun, pieces, hold), *sent_as)
            try:
                await self._pass_on(opening, request)
            except Superseded as other:
                return other.payload
            return Payload(b"", opening.content_type, opening.btc_address)

    async def _pass_on(self, opening: Opening, request: pb.ScheduleRequest) -> None:
        """Store the container's body as it comes."""
        async with aclosing(opening.pieces()) as pieces:
            stored = await self._control_plane.store(
                b"", pieces, workspace_id=request.workspace_id, route=request.route
            )
        request.request.body.upload_id, request.request.body.size = stored.upload_id, stored.size
