"""Where the body store has a task's long bodies."""

from controlplane import ids
from controlplane.bodies import Bodies
from controlplane.errors import NotFound


def body_of_request(task_id: str) -> str:
    """A task's request."""
    return f"{task_id}.request"


def body_of_response(task_id: str, attempt: int) -> str:
    """An attempt's response."""
    return f"{ids.attempt_id(task_id, attempt)}.response"


async def read_whole(bodies: Bodies, name: str) -> bytes:
    """A complete body; empty if it is past its retention."""
    try:
        return b"".join([chunk async for chunk in bodies.follow(name)])
    except NotFound:
        return b""
