"""What a receiver is told of a task's end: the very JSON that `queryTask` gives, and what a webhook has besides.

The names and numbers are those of the documented REST surface, of which this is a part that goes the other way; a test
holds them against the bridge's. A long response is not in it: its size is, and where to get it.
"""

from base64 import b64encode
from datetime import UTC
from typing import Final
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from controlplane.model import State, Task
from controlplane.tasks import content_type_of

#: A response up to this is in the notice. 65536: what the task's row keeps itself.
INLINE_BYTES: Final = 65_536

_TYPES: Final = {State.COMPLETED: "task.completed", State.FAILED: "task.failed", State.CANCELLED: "task.cancelled"}
_STATES: Final = {State.COMPLETED: 3, State.FAILED: -1, State.CANCELLED: -2}
_CAUSES: Final = {1: "customer", 2: "platform"}


class _Error(Struct):
    cause: str
    reason: str
    message: str


class Notice(Struct):
    """The JSON."""

    type: str
    #: Of the task's end; RFC 3339.
    timestamp: str
    result_code: int
    msg: str
    task_id: str = field(name="taskID")
    data: str
    data_encoding: str | UnsetType
    #: The response is longer than what comes along: `data` is empty, `result_url` has it.
    data_omitted: bool | UnsetType
    result_size: int
    seconds: int = field(name="task_dursion")
    state: int
    http_status: int
    content_type: str
    result_url: str
    error: _Error | None


_encode: Final = msgspec.json.Encoder().encode


def notice_of(row: Task, bridge_url: str = "") -> bytes:
    """What is told of a task that has ended. `bridge_url`: where callers reach the bridge; else paths are told."""
    assert row.end_time is not None
    state = State(row.state)
    result_code, msg = _ruling(row, state)
    size = row.response_size
    body = row.response_body if size <= INLINE_BYTES else None
    data, encoding = ("", UNSET) if body is None else _text(body)
    failed = state is not State.COMPLETED
    return _encode(
        Notice(
            type=_TYPES[state],
            timestamp=row.end_time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            result_code=result_code,
            msg=msg,
            task_id=row.id,
            data=data,
            data_encoding=encoding,
            data_omitted=True if size and body is None else UNSET,
            result_size=size,
            seconds=max(0, int((row.end_time - row.create_time).total_seconds())),
            state=_STATES[state],
            http_status=row.response_status,
            content_type=content_type_of(row),
            result_url=f"{bridge_url.rstrip('/')}/user/queryTask?taskID={quote(row.id)}",
            error=_Error(_CAUSES.get(row.cause, "unspecified"), row.failure_reason, row.failure_message)
            if failed
            else None,
        )
    )


def _ruling(row: Task, state: State) -> tuple[int, str]:
    """`result_code` and `msg`, as the bridge's."""
    if state is State.FAILED:
        return 504 if row.failure_reason.endswith("TIME_LIMIT") else 500, row.failure_message or "The task failed"
    if state is State.CANCELLED:
        return 499, row.failure_message or "The task was cancelled"
    status = row.response_status
    if 200 <= status < 300 or status == 101:
        return 200, "success"
    return status, f"The container answered with HTTP status {status}; its answer is in data"


def _text(body: bytes) -> tuple[str, str | UnsetType]:
    try:
        return body.decode(), UNSET
    except UnicodeDecodeError:
        return b64encode(body).decode(), "base64"
