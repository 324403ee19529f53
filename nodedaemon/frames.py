"""What a node says on its Execute stream: results, requests that were sent, jobs that were begun, in batches.

Whatever waits goes in one frame; while that is on its way, more comes to wait.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import grpc
from ngpu import wire
from ngpu.v1 import node_pb2

from nodedaemon.dial import write

ExecuteCall: TypeAlias = "grpc.aio.StreamStreamCall[node_pb2.ExecuteRequest, node_pb2.ExecuteResponse]"

#: That a request is sent is told with the next result, or after this long. Most results come sooner and say it too.
SENT_DELAY_S: Final = 0.02


class Frames:
    """Which attempts there is something to say of. `result` and `job_id` give what: None, "": nothing any more."""

    def __init__(self, result: Callable[[str], node_pb2.Result | None], job_id: Callable[[str], str]) -> None:
        self._result = result
        self._job_id = job_id
        self._results: deque[str] = deque()
        self._begun: deque[str] = deque()
        self._sent: dict[str, None] = {}
        self._sent_ripe = False
        self._sent_timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()

    def restate(self, *, results: Iterable[str], sent: Iterable[str], begun: Iterable[str]) -> None:
        """A new stream has heard nothing yet: this is all."""
        self._results = deque(results)
        self._sent = dict.fromkeys(sent)
        self._sent_ripe = True
        self._begun = deque(begun)
        self._due.set()

    def ended(self, attempt_id: str) -> None:
        """Its result is there."""
        self._results.append(attempt_id)
        self._due.set()

    def begun(self, attempt_id: str) -> None:
        """It has become a job."""
        self._begun.append(attempt_id)
        self._due.set()

    def sent(self, attempt_id: str) -> None:
        """Its request was sent whole."""
        self._sent[attempt_id] = None
        if self._sent_timer is None:
            self._sent_timer = asyncio.get_running_loop().call_later(SENT_DELAY_S, self._ripen_sent)

    def forget(self, attempt_id: str) -> None:
        """Nobody needs to hear that it was sent."""
        self._sent.pop(attempt_id, None)

    async def tell(self, call: ExecuteCall) -> None:
        """On this stream, until it ends. Raises LinkLost or AioRpcError."""
        while True:
            await self._due.wait()
            self._due.clear()
            while self._results or self._begun or (self._sent and self._sent_ripe):
                await write(call, self._frame())

    def _frame(self) -> node_pb2.ExecuteRequest:
        frame = node_pb2.ExecuteRequest()
        items = size = 0
        while self._begun and items < wire.BATCH_ITEMS:
            attempt_id = self._begun.popleft()
            # The result of one that has ended says it, too.
            if job_id := self._job_id(attempt_id):
                frame.jobs.add(attempt_id=attempt_id, job_id=job_id)
                items += 1
        while self._results and items < wire.BATCH_ITEMS and size < wire.BATCH_BYTES:
            attempt_id = self._results.popleft()
            result = self._result(attempt_id)
            if result is not None:
                # It says that the request was sent, too.
                self._sent.pop(attempt_id, None)
                frame.results.append(result)
                items += 1
                size += len(result.response.body.inline)
        if self._sent_ripe:
            for attempt_id in list(itertools.islice(self._sent, wire.BATCH_ITEMS - items)):
                del self._sent[attempt_id]
                frame.sent.append(attempt_id)
            self._sent_ripe = bool(self._sent)
        return frame

    def _ripen_sent(self) -> None:
        self._sent_timer = None
        if self._sent:
            self._sent_ripe = True
            self._due.set()
