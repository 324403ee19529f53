"""Tasks are asked after: `queryTask`, the lists, `getDetailed` and `getTask`, and `DELETE /user/task`.

The unguessable task id is what opens a task; a header, if one is sent, must own it besides, and opens what says who
and whence.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from math import ceil
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import task_pb2 as pb

from httpbridge import credentials, envelope, params, times
from httpbridge.answers import STATES, SUCCESS_MSG, Answers, expected_wait_s, is_cut, seconds_taken, text_of
from httpbridge.app import Call
from httpbridge.bodies import Budget, Hold
from httpbridge.calls import ControlPlane
from httpbridge.errors import Gone, NotFound, Unauthorized
from httpbridge.reply import Reply

_QUERY: Final = frozenset({"taskID", "wait"})
_TASK: Final = frozenset({"taskID"})
_LIST: Final = frozenset({"startTime", "endTime", "limit", "cursor"})
_NODE_LIST: Final = _LIST | {"nodeAddr"}


def utcnow() -> datetime:
    """The time."""
    return datetime.now(UTC)


class Tasks:
    """The calls that look at tasks."""

    def __init__(
        self,
        control_plane: ControlPlane,
        answers: Answers,
        budget: Budget,
        *,
        zone: tzinfo,
        wait_limit_s: float,
        require_auth: bool,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._control_plane = control_plane
        self._answers = answers
        self._budget = budget
        self._zone = zone
        self._wait_limit_s = wait_limit_s
        self._require_auth = require_auth
        self._clock = clock

    async def query(self, call: Call) -> Reply:
        """`GET /user/queryTask?taskID=[&wait=]`."""
        request = call.once(self, self._question)
        response = await self._control_plane.query(request)
        return await self._answers.queried(response.task, response.response, request.workspace_id, self._clock())

    def _question(self, call: Call) -> pb.QueryRequest:
        workspace_id = self._workspace_id(call)
        own, _ = params.split_query(call.query, _QUERY)
        request = pb.QueryRequest(task_id=params.task_id(own.get("taskID")), workspace_id=workspace_id)
        wait_s = params.wait_s(own.get("wait"), self._wait_limit_s)
        if wait_s:
            request.wait.FromNanoseconds(int(wait_s * 1e9))
        return request

    async def cancel(self, call: Call) -> Reply:
        """`DELETE /user/task?taskID=`."""
        workspace_id = self._workspace_id(call)
        own, _ = params.split_query(call.query, _TASK)
        request = pb.CancelRequest(task_id=params.task_id(own.get("taskID")), workspace_id=workspace_id)
        task = (await self._control_plane.cancel(request)).task
        msg = SUCCESS_MSG if task.state == pb.TASK_STATE_CANCELLED else "The task had ended before"
        answer = envelope.Cancelled(200, msg, task.task_id, STATES[task.state])
        return Reply(envelope.encode(answer), task_id=task.task_id)

    async def list(self, call: Call) -> Reply:
        """`GET /user/queryTaskList?startTime=&endTime=[&limit=&cursor=]`."""
        own, _ = params.split_query(call.query, _LIST)
        return await self._list(call, own, pb.ListTasksRequest(workspace_id=self._owner(call)))

    async def list_of_node(self, call: Call) -> Reply:
        """`GET /user/getTasksFromNode?nodeAddr=&startTime=&endTime=[&limit=&cursor=]`."""
        owner = self._owner(call)
        own, _ = params.split_query(call.query, _NODE_LIST)
        request = pb.ListTasksRequest(workspace_id=owner, node_addr=params.node_addr(own.get("nodeAddr")))
        return await self._list(call, own, request)

    async def _list(self, call: Call, own: dict[str, str], request: pb.ListTasksRequest) -> Reply:
        if (start := times.start(own.get("startTime"), self._zone)) is not None:
            request.start_time.FromDatetime(start)
        if (end := times.end(own.get("endTime"), self._zone)) is not None:
            request.end_time.FromDatetime(end)
        request.limit = params.limit(own.get("limit"))
        request.cursor = params.cursor(own.get("cursor"))
        pages = self._control_plane.pages(request, call.request_id)
        try:
            # Before the head is sent: the first page is what tells whether the call is refused.
            first = await anext(pages, pb.ListTasksResponse())
        except NotFound:
            raise Unauthorized("There is no workspace with this id") from None
        paged = bool(own.keys() & {"limit", "cursor"})
        return Reply(_list_json(first, pages, paged=paged))

    async def detailed(self, call: Call) -> Reply:
        """`GET /user/getDetailed?taskID=`."""
        return await self._detail(call, "taskInfo")

    async def task(self, call: Call) -> Reply:
        """`GET /user/getTask?taskID=`."""
        return await self._detail(call, "task")

    async def _detail(self, call: Call, key: str) -> Reply:
        workspace_id = self._workspace_id(call)
        own, _ = params.split_query(call.query, _TASK)
        request = pb.GetDetailRequest(task_id=params.task_id(own.get("taskID")), workspace_id=workspace_id)
        detail = await self._control_plane.detail(request, call.request_id)
        task_id = detail.task.task_id
        with self._budget.hold() as hold:
            sent, is_gone = await self._sent(detail, workspace_id, hold)
            info = self._info(detail, sent, owned=bool(workspace_id))
        if is_gone:
            info.ext["requestGone"] = True
        answer = {"result_code": 200, "msg": SUCCESS_MSG, key: info}
        json = envelope.encode(answer)
        answered = detail.response.body
        # Of a connection that was passed through only the sizes are kept.
        if not is_cut(answered) or detail.response.status == 101:
            return Reply(json, task_id=task_id)
        try:
            content = await self._answers.with_response(json, "response", task_id, workspace_id, answered)
        except Gone:
            info.ext["responseGone"] = True
            return Reply(envelope.encode(answer), task_id=task_id)
        return Reply(content, task_id=task_id)

    async def _sent(self, detail: pb.GetDetailResponse, workspace_id: str, hold: Hold) -> tuple[bytes, bool]:
        """What the container got, and whether it is past its retention."""
        sent = detail.request.body
        if not is_cut(sent) or detail.response.status == 101:
            return sent.inline, False
        rest = self._control_plane.body(
            detail.task.task_id,
            workspace_id,
            offset=len(sent.inline),
            size=sent.size,
            part=pb.WatchRequest.PART_REQUEST,
        )
        async with aclosing(rest):
            try:
                first = await anext(rest)
                hold.grow_to(sent.size)
                return b"".join([sent.inline, first, *[chunk async for chunk in rest]]), False
            except Gone:
                return b"", True

    def _info(self, detail: pb.GetDetailResponse, sent: bytes, *, owned: bool) -> envelope.Detailed:
        task = detail.task
        last = detail.attempts[-1] if detail.attempts else pb.Attempt()
        request, request_encoding = envelope.text(sent)
        response, response_encoding = text_of(detail.response.body)
        # What the platform caused costs the customer nothing.
        charged = [a for a in detail.attempts if a.failure.cause != pb.CAUSE_PLATFORM]
        gpu_us = sum(a.gpu_us for a in charged)
        seconds = seconds_taken(task, self._clock())
        has_ended = task.HasField("end_time")
        ext: dict[str, object] = {
            "seconds": seconds,
            "gpuSeconds": sum(a.gpu_us * len(a.gpu_ids) for a in charged) / 1e6,
            "cost": f"{sum(Decimal(a.cost or 0) for a in charged):.9f}",
            "gpuIds": list(last.gpu_ids),
            "port": detail.port,
            "requestSize": detail.request.body.size,
            "responseSize": detail.response.body.size,
            "httpStatus": detail.response.status,
            "queuePosition": task.queue_position,
            "waitingFor": task.waiting_for,
            "expectedWait": expected_wait_s(task),
            "why": last.reason,
            "error": _failure(task.failure) if task.HasField("failure") else None,
            "attempts": [self._attempt(attempt) for attempt in detail.attempts],
        }
        if detail.HasField("webhook"):
            ext["webhook"] = self._webhook(detail.webhook)
        if request_encoding:
            ext["requestEncoding"] = request_encoding
        if response_encoding:
            ext["responseEncoding"] = response_encoding
        return envelope.Detailed(
            id=detail.number,
            userkey=detail.workspace_name if owned else "",
            btcaddress=detail.btc_address,
            workspaceid=detail.workspace_id if owned else "",
            taskid=task.task_id,
            requrl=detail.origin.url,
            method=detail.origin.operation,
            userip=detail.origin.user_ip if owned else "",
            nodeip=last.node_ip,
            nodeaddr=last.node_addr,
            requesttime=self._shown(task.create_time),
            responsetime=self._shown(task.end_time) if has_ended else "",
            request=request,
            state=STATES[task.state],
            response=response,
            record_dursion=int(seconds) if has_ended else 0,
            gpudursion=ceil(gpu_us / 1e6),
            ext=ext,
        )

    def _attempt(self, attempt: pb.Attempt) -> dict[str, object]:
        said: dict[str, object] = {
            "number": attempt.number,
            "replica": attempt.replica_id,
            "nodeAddr": attempt.node_addr,
            "nodeIp": attempt.node_ip,
            "delivery": pb.Delivery.Name(attempt.delivery).removeprefix("DELIVERY_").lower(),
            "queueTime": self._shown(attempt.queue_time) if attempt.HasField("queue_time") else "",
            "assignTime": self._shown(attempt.assign_time),
            "endTime": self._shown(attempt.end_time) if attempt.HasField("end_time") else "",
            "sentSeconds": attempt.sent_after_us / 1e6,
            "firstByteSeconds": attempt.first_byte_after_us / 1e6,
            "lastByteSeconds": attempt.last_byte_after_us / 1e6,
            "gpuSeconds": attempt.gpu_us / 1e6,
            "gpuIds": list(attempt.gpu_ids),
            "gpuModel": attempt.gpu_model,
            "cost": attempt.cost,
            "httpStatus": attempt.http_status,
            "why": attempt.reason,
            "error": _failure(attempt.failure) if attempt.HasField("failure") else None,
        }
        if attempt.job_id:
            said["job"] = attempt.job_id
        return said

    def _webhook(self, webhook: pb.Webhook) -> dict[str, object]:
        return {
            "id": webhook.id,
            "url": webhook.url,
            "state": pb.WebhookState.Name(webhook.state).removeprefix("WEBHOOK_STATE_").lower(),
            "tries": webhook.tries,
            "nextTime": self._shown(webhook.next_time) if webhook.HasField("next_time") else "",
            "log": [
                {
                    "number": one.number,
                    "time": self._shown(one.time),
                    "seconds": one.duration.ToTimedelta().total_seconds(),
                    "httpStatus": one.http_status,
                    "error": one.error,
                }
                for one in webhook.log
            ],
        }

    def _shown(self, moment: Timestamp) -> str:
        return times.show(moment.ToDatetime(UTC), self._zone)

    def _workspace_id(self, call: Call) -> str:
        """The header's, if there is one. Raises Unauthorized if there must be."""
        workspace_id = credentials.workspace_id(call.request.headers)
        if not workspace_id and self._require_auth:
            raise Unauthorized
        return workspace_id

    def _owner(self, call: Call) -> str:
        """The header's. Raises Unauthorized."""
        workspace_id = credentials.workspace_id(call.request.headers)
        if not workspace_id:
            raise Unauthorized
        return workspace_id


async def _list_json(
    first: pb.ListTasksResponse, pages: AsyncGenerator[pb.ListTasksResponse, None], *, paged: bool
) -> AsyncGenerator[bytes, None]:
    """The list as it comes. Its size is told last, because only then it is known."""
    async with aclosing(pages):
        json = b'{"result_code":200,"msg":"success","taskIds":['
        size = 0
        page = first
        while True:
            json += envelope.encode(list(page.task_ids))[1:-1]
            size += len(page.task_ids)
            cursor = page.cursor
            if (following := await anext(pages, None)) is None:
                break
            yield json
            page = following
            json = b"," if size and page.task_ids else b""
        more = b',"nextCursor":%b' % envelope.encode(cursor) if paged else b""
        yield json + b'],"result_size":%d%b}' % (size, more)


def _failure(failure: pb.Failure) -> dict[str, str]:
    cause = pb.Cause.Name(failure.cause).removeprefix("CAUSE_").lower()
    return {"cause": cause, "reason": failure.reason, "message": failure.message}
