"""What an answer about a task says: the rulings on result codes as one table, the JSON around the container's body."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final, NamedTuple

from msgspec import UNSET, UnsetType
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from httpbridge import envelope
from httpbridge.calls import ControlPlane
from httpbridge.errors import BridgeError
from httpbridge.reply import Reply

ACCEPTED_MSG: Final = "SUCCESS! The task is currently in the queue waiting to be processed"
RUNNING_MSG: Final = "The task is being processed"
SUCCESS_MSG: Final = "success"

#: The documented number of each state; only 3 is documented by the original, 1, 2 and -1 are its own all the same.
STATES: Final = {
    pb.TASK_STATE_QUEUED: 1,
    pb.TASK_STATE_RUNNING: 2,
    pb.TASK_STATE_COMPLETED: 3,
    pb.TASK_STATE_FAILED: -1,
    pb.TASK_STATE_CANCELLED: -2,
}


class Ruling(NamedTuple):
    """`status`: HTTP's, for who waits for the container's answer. Who asks after a task gets 200 and `result_code`."""

    status: int
    result_code: int
    msg: str


_SUCCESS: Final = Ruling(200, 200, SUCCESS_MSG)
_QUEUED: Final = Ruling(202, 100, ACCEPTED_MSG)
_RUNNING: Final = Ruling(202, 101, RUNNING_MSG)


def ruling(task: pb.Task, response: http_pb2.HttpResponse) -> Ruling:
    """How a task stands, in the documented numbers."""
    if task.state == pb.TASK_STATE_COMPLETED:
        status = response.status
        # 101: a connection that was passed through, and is over.
        if 200 <= status < 300 or status == 101:
            return _SUCCESS
        msg = f"The container answered with HTTP status {status}; its answer is in data"
        return Ruling(status if 400 <= status < 500 else 502, status, msg)
    if task.state == pb.TASK_STATE_FAILED:
        late = task.failure.reason.endswith("TIME_LIMIT")
        return Ruling(504 if late else 502, 504 if late else 500, task.failure.message or "The task failed")
    if task.state == pb.TASK_STATE_CANCELLED:
        return Ruling(502, 499, task.failure.message or "The task was cancelled")
    return _RUNNING if task.state == pb.TASK_STATE_RUNNING else _QUEUED


def seconds_taken(task: pb.Task, now: datetime) -> float:
    """From acceptance to the end, or to now."""
    begun = task.create_time
    if not task.HasField("end_time"):
        return max(0.0, (now - begun.ToDatetime(UTC)).total_seconds())
    # In whole microseconds, as above; protobuf's own way there takes longer than the rest of a query.
    end = task.end_time
    return max(0, (end.seconds - begun.seconds) * 1_000_000 + end.nanos // 1000 - begun.nanos // 1000) / 1e6


def expected_wait_s(task: pb.Task) -> float:
    """How long it will likely wait still, to the millisecond; 0: not known."""
    return task.expected_wait.ToMilliseconds() / 1000


class Answers:
    """Writes a task's answer with the container's body in it: at once where it came along, else streamed behind it."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def called(self, task: pb.Task, response: http_pb2.HttpResponse, workspace_id: str) -> Reply:
        """To a synchronous call."""
        status, result_code, msg = ruling(task, response)
        body, task_id = response.body, task.task_id
        data, encoding = text_of(body)
        json = envelope.encode(envelope.Answered(result_code, msg, data, encoding, task_id))
        headers = {"Retry-After": _retry_after(response)} if status == 429 else None
        content = json if _is_whole(response, body) else await self._streamed(json, task_id, workspace_id, body)
        return Reply(content, status=status, task_id=task_id, headers=headers)

    async def queried(self, task: pb.Task, response: http_pb2.HttpResponse, workspace_id: str, now: datetime) -> Reply:
        """To `queryTask`."""
        _, result_code, msg = ruling(task, response)
        body, task_id = response.body, task.task_id
        data, encoding = text_of(body)
        seconds = int(seconds_taken(task, now))
        answer = envelope.Queried(result_code, msg, task_id, data, encoding, body.size, seconds)
        if task.state == pb.TASK_STATE_QUEUED:
            answer.queue_position, answer.waiting_for = task.queue_position, task.waiting_for
            answer.expected_wait_s = expected_wait_s(task) or UNSET
        json = envelope.encode(answer)
        content = json if _is_whole(response, body) else await self._streamed(json, task_id, workspace_id, body)
        return Reply(content, task_id=task_id)

    async def _streamed(
        self, json: bytes, task_id: str, workspace_id: str, body: http_pb2.Body
    ) -> AsyncGenerator[bytes, None]:
        try:
            return await self.with_response(json, "data", task_id, workspace_id, body)
        except BridgeError as error:
            error.task_id = task_id
            raise

    async def with_response(
        self, json: bytes, key: str, task_id: str, workspace_id: str, body: http_pb2.Body
    ) -> AsyncGenerator[bytes, None]:
        """`json`, the empty string under `key` filled with the response as it comes from the control plane.

        Raises BridgeError while it still can: before anything of the answer is sent.
        """
        rest = self._control_plane.body(
            task_id, workspace_id, offset=len(body.inline), size=body.size, part=pb.WatchRequest.PART_UNSPECIFIED
        )
        begun = body.inline + await anext(rest)
        return _filled(json, key, _and_then(begun, rest), is_utf8=body.is_utf8)


async def _filled(
    json: bytes, key: str, body: AsyncGenerator[bytes, None], *, is_utf8: bool
) -> AsyncGenerator[bytes, None]:
    # Inside a JSON string quotes are escaped, so this is found nowhere but where it is meant.
    before, mark, after = json.partition(b'"%b":"' % key.encode())
    yield before + mark
    async with aclosing(envelope.stream_string(body, is_utf8=is_utf8)) as pieces:
        async for piece in pieces:
            yield piece
    yield after


async def _and_then(begun: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield begun
        async for chunk in rest:
            yield chunk


def text_of(body: http_pb2.Body) -> tuple[str, str | UnsetType]:
    """`(data, data_encoding)` of what came along; of a body that was cut the encoding alone."""
    if is_cut(body):
        return "", UNSET if body.is_utf8 else envelope.BASE64
    return envelope.text(body.inline)


def is_cut(body: http_pb2.Body) -> bool:
    """Whether the body is longer than what came along."""
    return body.size > len(body.inline)


def _is_whole(response: http_pb2.HttpResponse, body: http_pb2.Body) -> bool:
    """Whether all of it came along. Of a connection that was passed through only the size is kept."""
    return not is_cut(body) or response.status == 101


def _retry_after(response: http_pb2.HttpResponse) -> str:
    """The container's own, if it is a number."""
    for header in response.headers:
        if header.name.lower() == "retry-after" and header.value.isdigit():
            return header.value[:6].decode()
    return "1"
