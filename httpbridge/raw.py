"""Raw pass-through: `ANY /run/<path>` is the container's own HTTP, in both directions as it comes; no envelope.

What is the same at the other end: method, path, query, status, end-to-end fields with their order and repetitions, and
every byte of the bodies. What is of one connection only is each hop's own: framing, keep-alive, the reason phrase,
interim responses (100 is said by us, others are dropped) and trailers (dropped). `Authorization` and `X-NGPU-*` are
ours and end here.

A request's body is stored by the control plane as it comes, and the task begins when it is complete: so a slow sender
holds a connection and never a GPU, and a second attempt has all of it. A response is passed on from its head on, as
fast as its reader reads and no faster; the container need not wait for him.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from ngpu import wire
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from httpbridge import credentials, envelope, headers, origin, params
from httpbridge.answers import is_cut, ruling
from httpbridge.app import RUN, Call
from httpbridge.bodies import BodyReader
from httpbridge.calls import ControlPlane, Part, TaskEnded
from httpbridge.envelope import Payload, Stored
from httpbridge.errors import BadGateway, NotFound, Unauthorized
from httpbridge.passed import Live, Passed
from httpbridge.plain import PlainRequest, Request
from httpbridge.reply import Reply
from httpbridge.submit import CALLBACK_URL, PRIORITY
from httpbridge.tunnel import Tunnel

OPERATION: Final = "run"
#: How long one question to the control plane may wait for the beginning of an answer: its own limit.
WAIT_S: Final = 3600
_WEBSOCKET: Final = "websocket"


class Raw:
    """The pass-through."""

    def __init__(
        self, control_plane: ControlPlane, reader: BodyReader, *, trusted_proxies: origin.Networks = ()
    ) -> None:
        self._control_plane = control_plane
        self._reader = reader
        self._trusted_proxies = trusted_proxies

    async def run(self, call: Call) -> Reply:
        """Any method under `/run/`."""
        plan = call.once(self, self._plan)
        try:
            response = await self._control_plane.schedule(plan, await self._body(call.request, plan.workspace_id))
        except NotFound:
            raise Unauthorized("There is no workspace with this id") from None
        return await self._reply(call.request, response.task, response.response, plan.workspace_id)

    def _plan(self, call: Call) -> pb.ScheduleRequest:
        """All that the head says: the request but for its body."""
        fields = call.request.headers
        workspace_id = credentials.workspace_id(fields)
        if not workspace_id:
            raise Unauthorized
        request = pb.ScheduleRequest(
            workspace_id=workspace_id,
            port=params.port(fields.get("X-NGPU-Port"), "X-NGPU-Port"),
            streamed=True,
            cancel_on_hangup=True,
            callback_url=params.callback_url(None, fields.get(CALLBACK_URL)),
            priority=params.priority(fields.get(PRIORITY)),
        )
        request.wait.seconds = WAIT_S
        passed = request.request
        passed.method = call.request.method
        passed.path = params.as_it_may_stand(call.path[len(RUN) - 1 :])
        passed.query = params.as_it_may_stand(call.query)
        headers.forward(call.request.raw_headers, fields.get("Connection", ""), passed, envelope=False)
        if passed.method == "GET" and fields.get("Upgrade", "").lower() == _WEBSOCKET:
            passed.headers.add(name="Upgrade", value=_WEBSOCKET.encode())
        origin.fill(request.origin, call, OPERATION, self._trusted_proxies)
        return request

    async def _body(self, request: Request, workspace_id: str) -> Payload | Stored:
        """A small body as it is; a large one, or one of unknown length, is stored as it comes."""
        if isinstance(request, PlainRequest):
            return Payload(request.take(), "", "")
        content, length = request.content, request.content_length
        if content.is_eof() and content.total_bytes <= wire.INLINE_BYTES:
            return Payload(content.read_nowait(-1), "", "")
        async with aclosing(self._reader.pieces(request)) as pieces:
            begun = b""
            if length is None or length <= wire.INLINE_BYTES:
                async for piece in pieces:
                    begun += piece
                    if len(begun) > wire.INLINE_BYTES:
                        break
                else:
                    return Payload(begun, "", "")
            stored = await self._control_plane.store(begun, pieces, workspace_id=workspace_id, size=length or 0)
            return Stored(stored.upload_id, stored.size, "", "")

    async def _reply(
        self, request: Request, task: pb.Task, response: http_pb2.HttpResponse, workspace_id: str
    ) -> Reply:
        control_plane, task_id, method = self._control_plane, task.task_id, request.method
        if task.state in (pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELLED):
            return _failed(task)
        if task.state == pb.TASK_STATE_COMPLETED and not is_cut(response.body):
            if response.status == 101:
                raise BadGateway("The container closed the connection at once", task_id=task_id)
            return Passed(response, response.body.inline, method=method, task_id=task_id)
        if response.status == 101:
            if isinstance(request, PlainRequest):
                control_plane.batch.call_off(task_id)
                raise BadGateway("The container changed the protocol unasked", task_id=task_id)
            try:
                connection = await control_plane.connect(task_id, workspace_id)
            except BaseException:
                control_plane.batch.call_off(task_id)
                raise
            return Tunnel(request, response, connection, task_id=task_id)
        parts = control_plane.follow(task_id, workspace_id, attempt=task.attempt if response.status else 0)
        if not response.status:
            # In all that time it has not begun to answer.
            try:
                response = await _head_of(parts)
            except TaskEnded as ended:
                return _failed(ended.task)
        return Live(response, parts, method=method, task_id=task_id, call_off=control_plane.batch.call_off)


async def _head_of(parts: AsyncGenerator[Part, None]) -> http_pb2.HttpResponse:
    """The head of the response, once it comes."""
    async for part in parts:
        if isinstance(part, http_pb2.HttpResponse):
            return part
    raise BadGateway


def _failed(task: pb.Task) -> Reply:
    status, result_code, msg = ruling(task, http_pb2.HttpResponse())
    return Reply(envelope.encode(envelope.Said(result_code, msg)), status=status, task_id=task.task_id)
