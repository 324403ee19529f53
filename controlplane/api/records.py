"""What is kept of tasks: ListTasks and GetDetail."""

from collections.abc import AsyncIterator

from ngpu import wire
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.access import Kind
from controlplane.api import translate
from controlplane.api.gate import Caller
from controlplane.api.owners import Owners
from controlplane.api.stored import body_of_request, body_of_response, read_whole
from controlplane.api.webhooks import webhook_of
from controlplane.bodies import Bodies
from controlplane.dispatcher import Dispatcher
from controlplane.errors import InvalidArgument, NotFound
from controlplane.fleet import Fleet
from controlplane.model import State, Task
from controlplane.store import Store, TaskQuery


class Records:
    """Reads rows and stored bodies."""

    def __init__(self, owners: Owners, fleet: Fleet, dispatcher: Dispatcher, store: Store, bodies: Bodies) -> None:
        self._owners = owners
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._store = store
        self._bodies = bodies

    async def list_tasks(self, request: pb.ListTasksRequest, caller: Caller) -> AsyncIterator[pb.ListTasksResponse]:
        """See task.proto."""
        query = TaskQuery(
            workspace_uid=self._owners.workspace_uid(request.workspace_id, caller.principal),
            start=translate.time_of(request.start_time) if request.HasField("start_time") else None,
            end=translate.time_of(request.end_time) if request.HasField("end_time") else None,
            node_addr=self._as_recorded(request.node_addr),
            states=_states_of(request),
            limit=request.limit,
            cursor=request.cursor,
            full=request.full,
        )
        async for page in self._store.list_tasks(query):
            yield pb.ListTasksResponse(
                task_ids=page.task_ids, tasks=[self._task(row) for row in page.tasks], cursor=page.cursor
            )

    def _as_recorded(self, node_addr: str) -> str:
        """An address may be written in any case."""
        try:
            return self._fleet.node(node_addr).addr
        except NotFound:
            return node_addr

    async def get_detail(self, request: pb.GetDetailRequest, caller: Caller) -> pb.GetDetailResponse:
        """See task.proto."""
        owner = self._owners.owner(request.workspace_id, caller.principal)
        row = await self._store.task(request.task_id)
        if row is None or (owner and row.workspace_uid != owner):
            raise NotFound
        workspace = self._fleet.workspace(row.workspace_uid)
        # The one that was answered comes last, whatever its number: where there was a second attempt, either may be it.
        ended = sorted(await self._store.attempts(row.id), key=lambda one: not one.failure_reason)
        # A task's id opens its result, and not whose it is.
        owned = bool(owner) or caller.principal.kind is Kind.OPERATOR
        answer = pb.GetDetailResponse(
            task=self._task(row),
            number=row.number or 0,
            workspace_id=workspace.id if owned else "",
            workspace_name=workspace.name,
            btc_address=row.btc_address,
            port=row.port,
            origin=pb.Origin(user_ip=row.user_ip if owned else "", url=row.origin_url, operation=row.operation),
            request=http_pb2.HttpRequest(method=row.method, path=row.path, query=row.query),
            attempts=[translate.attempt_of_row(attempt) for attempt in ended],
        )
        translate.fill_headers(answer.request.headers, translate.headers_of_row(row.request_headers_json))
        if row.callback_url:
            answer.webhook.CopyFrom(webhook_of(row, await self._store.webhook(row.id), owned=owned))
        limit = min(request.max_inline_bytes or wire.ANSWER_INLINE_BYTES, wire.ANSWER_INLINE_BYTES)
        name = body_of_request(row.id)
        await self._fill_body(answer.request.body, row, row.request_body, size=row.request_size, name=name, limit=limit)
        if row.state is State.COMPLETED:
            answer.response.status = row.response_status
            translate.fill_headers(answer.response.headers, translate.headers_of_row(row.response_headers_json))
            answer.response.body.is_utf8 = row.response_is_utf8
            name, size = body_of_response(row.id, row.attempt), row.response_size
            await self._fill_body(answer.response.body, row, row.response_body, size=size, name=name, limit=limit)
        if row.state is State.RUNNING:
            answer.attempts.add(
                number=row.attempt,
                replica_id=row.replica_id,
                node_addr=row.node_addr,
                queue_time=translate.timestamp(ended[-1].end_time if ended else row.create_time),
                assign_time=translate.timestamp(row.assign_time),
                reason=row.assign_reason,
            )
        if workspace.spec.jobs:
            jobs = {job.attempt: job.id for job in await self._store.jobs_of(row.id)}
            for attempt in answer.attempts:
                attempt.job_id = jobs.get(attempt.number, "")
        return answer

    async def _fill_body(
        self, message: http_pb2.Body, row: Task, inline: bytes | None, *, size: int, name: str, limit: int
    ) -> None:
        """Set a body within a message that is being built, wholly or, over `limit` or past its retention, its size."""
        message.size = size
        if size > limit:
            return
        if inline is not None:
            message.inline = inline
        elif size and row.expire_time is None:
            message.inline = await read_whole(self._bodies, name)

    def _task(self, row: Task) -> pb.Task:
        message = translate.task_of_row(row)
        if row.state is State.QUEUED and (view := self._dispatcher.waiting(row.id)) is not None:
            translate.fill_wait(message, view)
        return message


def _states_of(message: pb.ListTasksRequest) -> frozenset[State]:
    try:
        return frozenset(State(state) for state in message.states)
    except ValueError:
        raise InvalidArgument("states: there is no such state.") from None
