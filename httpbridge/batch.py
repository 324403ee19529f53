"""One Batch stream to the control plane and a table of futures: what makes a call cost a dictionary entry, not an RPC.

Whatever waits when the writer is free goes in one frame, without a timer: a lone call leaves at once, many share the
60-120 us that a gRPC operation costs. When the stream breaks every call without an answer ends as Unavailable, because
only the caller can know whether asking again is safe; the stream is then opened anew for as long as `run` runs.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Final, Protocol

import grpc
import structlog
from ngpu import wire
from ngpu.v1 import task_pb2 as pb

from httpbridge.errors import Unavailable

FIRST_BACKOFF_S: Final = 0.2
MOST_BACKOFF_S: Final = 5.0

log = structlog.get_logger(__name__)


class Stream(Protocol):
    """What we ask of a bidirectional gRPC call."""

    async def read(self) -> object:
        """The next frame, or grpc.aio.EOF."""

    async def write(self, request: pb.BatchRequest) -> None:
        """Send a frame; returns when the transport takes it."""

    def cancel(self) -> bool:
        """End the call."""


class Batch:
    """Calls in, answers out; at most `outstanding` without an answer.

    `open_stream` waits until the control plane can be reached and opens the stream; it may fail, and is then tried again.
    """

    def __init__(
        self,
        open_stream: Callable[[], "asyncio.Future[Stream]"] | Callable[[], "asyncio.Task[Stream]"],
        *,
        outstanding: int = wire.BATCH_OUTSTANDING,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._open_stream = open_stream
        self._outstanding = outstanding
        self._chance = chance
        self._answers: dict[int, asyncio.Future[pb.Answer]] = {}
        self._calls: dict[int, pb.Call] = {}
        self._abandoned: list[int] = []
        self._something = asyncio.Event()
        self._last_id = 0
        self.is_up = False
        #: Frames and calls sent, for the metrics.
        self.frames = 0
        self.calls = 0
