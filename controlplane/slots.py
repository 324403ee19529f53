"""Who is connected, what each replica has in flight, and so what is free.

Knows nothing of SQL or protobuf. The set in flight is restated by the node at every connect and heartbeat, and what is
free is always counted from it: there is no counter that could drift.
"""

from datetime import datetime
from typing import Protocol

import msgspec

from controlplane.model import Cause, Delivery

Headers = tuple[tuple[str, bytes], ...]


class Request(msgspec.Struct, frozen=True):
    """A request as the container gets it. `body` is empty where `size` is over wire.INLINE_BYTES: then it lies in the body store."""

    method: str
    path: str
    query: str = ""
    headers: Headers = ()
    body: bytes = b""
    size: int = 0


class Response(msgspec.Struct, frozen=True):
    """A response as the container gave it. `body` is empty where `size` is over wire.INLINE_BYTES: then it lies in the body store."""

    status: int
    headers: Headers = ()
    body: bytes = b""
    size: int = 0
    is_utf8: bool = False


class Failure(msgspec.Struct, frozen=True):
    """Why there is no answer of the container. `reason` is one of the constants of task.proto (Failure)."""

    cause: Cause
    reason: str
    message: str


class Start(msgspec.Struct, frozen=True):
    """Begin an attempt. Given twice for the same id, the second changes nothing."""

    attempt_id: str
    replica_id: str
    port: int
    request: Request
    run_time_limit_s: float
    response_body_limit_bytes: int
    streamed: bool = False


class AttemptResult(msgspec.Struct, frozen=True):
    """The end of an attempt, as its node says: `response`, or `failure`. Times in microseconds; 0: not reached."""

    attempt_id: str
    delivery: Delivery
    response: Response | None = None
    failure: Failure | None = None
    sent_after_us: int = 0
    first_byte_after_us: int = 0
    last_byte_after_us: int = 0
    gpu_us: int = 0
    #: By the node's clock; for the record only.
    end_time: datetime | None = None


class Link(Protocol):
    """The way to one connected node: puts into a bounded outbox that a writer drains in batches. None of them waits."""

    def start(self, start: Start) -> None:
        """Begin an attempt."""

    def cancel(self, attempt_id: str) -> None:
        """End an attempt; its result still follows."""

    def ack(self, attempt_id: str) -> None:
        """The attempt's end is on disk, or it was given up: forget it."""
