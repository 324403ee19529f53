"""The soak's callers: each does one kind of call over and over, and notes what must have been recorded of every one."""

import asyncio
import hashlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from ngpu.v1 import task_pb2 as pb

from scripts.bench.soak_container import SMALL

KIB, MIB = 1024, 1024 * 1024
#: A caller who waits longer than this for anything has failed.
LIMIT_S: Final = 120.0
MESSAGE_BYTES: Final = KIB
TASK_ID: Final = "X-NGPU-Task-Id"


class Wrong(Exception):
    """An answer is not what it should be."""


@dataclass(frozen=True)
class Done:
    """A call, and what must be on record of it; None: that is not known here."""

    kind: str
    state: "pb.TaskState.ValueType"
    request_bytes: int | None
    response_bytes: int | None


@dataclass
class Book:
    """What the callers have counted."""

    #: By task.
    done: dict[str, Done] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    #: The first of each kind.
    words: dict[str, str] = field(default_factory=dict)
    #: Seconds of each call.
    took: dict[str, list[float]] = field(default_factory=dict)


class Callers:
    """Calls to one workspace, over `session`, whose base is the bridge and whose headers have the bearer."""

    def __init__(self, session: aiohttp.ClientSession, book: Book) -> None:
        self._session = session
        self._book = book
        self._block = os.urandom(4 * MIB)
        self._text = self._block[: 512 * KIB].hex()

    def kinds(self) -> dict[str, tuple[Callable[[], Awaitable[str]], int, float]]:
        """By kind: the call, how many callers do it at once, and their pause after each, in seconds."""
        return {
            "small, waiting": (self._small, 4, 0.02),
            "small, asked after": (self._submitted, 2, 0.02),
            "small, /run": (self._small_raw, 2, 0.02),
            "1 MiB both ways": (self._large, 2, 0.5),
            "4 MiB both ways, /run": (self._large_raw, 2, 0.5),
            "events": (self._events, 4, 0.1),
            "hang-up among events": (self._hang_up, 2, 0.5),
            "slow sender": (self._slow_sender, 2, 0.1),
            "slow reader": (self._slow_reader, 2, 0.1),
            "WebSocket": (self._socket, 3, 0.1),
        }

    async def run(self, seconds: float) -> None:
        """All of them for so long; returns when the last calls are over."""
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for kind, (call, count, pause_s) in self.kinds().items():
                for number in range(count):
                    group.create_task(self._again(kind, call, pause_s, end), name=f"{kind} {number}")

    async def _again(self, kind: str, call: Callable[[], Awaitable[str]], pause_s: float, end: float) -> None:
        book = self._book
        while time.monotonic() < end:
            began = time.monotonic()
            book.calls[kind] += 1
            try:
                async with asyncio.timeout(LIMIT_S):
                    await call()
            except (aiohttp.ClientError, OSError, TimeoutError, Wrong, ValueError, KeyError) as error:
                book.errors[kind] += 1
                book.words.setdefault(kind, f"{type(error).__name__}: {error}"[:300])
            else:
                book.took.setdefault(kind, []).append(time.monotonic() - began)
            await asyncio.sleep(pause_s)

    def _note(
        self,
        task_id: str,
        kind: str,
        sent: int | None,
        got: int | None,
        state: "pb.TaskState.ValueType" = pb.TASK_STATE_COMPLETED,
    ) -> str:
        if not task_id or task_id in self._book.done:
            raise Wrong(f"not a new task's id: {task_id!r}")
        self._book.done[task_id] = Done(kind, state, sent, got)
        return task_id

    # Through the envelope.

    async def _enveloped(self, kind: str, path: str, data: str, wanted: str) -> str:
        async with self._session.post(f"/user/{path}", json={"data": data}) as answer:
            said: dict[str, Any] = await answer.json()
        if (answer.status, said["result_code"]) != (200, 200) or said["data"] != wanted:
            raise Wrong(f"HTTP {answer.status}: {str(said)[:200]}")
        return self._note(said["taskID"], kind, len(data), len(wanted))

    async def _small(self) -> str:
        return await self._enveloped("small, waiting", "small", "x" * 300, SMALL.decode())

    async def _large(self) -> str:
        return await self._enveloped("1 MiB both ways", "mirror", self._text, self._text)

    async def _submitted(self) -> str:
        async with self._session.post("/user/schedulingTask?paramUrl=small", json={"data": "x" * 300}) as answer:
            task_id = (await answer.json())["taskID"]
        # Whatever becomes of the question: it has been accepted.
        self._note(task_id, "small, asked after", 300, len(SMALL))
        async with self._session.get(f"/user/queryTask?taskID={task_id}&wait=60") as answer:
            said = await answer.json()
        if said["result_code"] != 200 or said["data"] != SMALL.decode():
            raise Wrong(str(said)[:200])
        return str(task_id)

    # Raw.

    async def _raw(self, kind: str, path: str, body: Any, sent: int, wanted: bytes) -> str:
        async with self._session.post(f"/run/{path}", data=body) as answer:
            got = await answer.read()
        if answer.status != 200 or got != wanted:
            raise Wrong(f"HTTP {answer.status}, {len(got)} bytes: {got[:100]!r}")
        return self._note(answer.headers[TASK_ID], kind, sent, len(got))

    async def _small_raw(self) -> str:
        return await self._raw("small, /run", "small", b"x" * 300, 300, SMALL)

    async def _large_raw(self) -> str:
        return await self._raw("4 MiB both ways, /run", "mirror", self._block, len(self._block), self._block)

    async def _slow_sender(self) -> str:
        body = self._block[:MIB]

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 64 * KIB):
                yield body[at : at + 64 * KIB]
                await asyncio.sleep(0.2)

        return await self._raw("slow sender", "mirror", pieces(), len(body), body)

    async def _slow_reader(self) -> str:
        size = 8 * MIB
        digest, got = hashlib.sha256(), 0
        async with self._session.get(f"/run/bytes?n={size}") as answer:
            while piece := await answer.content.read(256 * KIB):
                digest.update(piece)
                got += len(piece)
                await asyncio.sleep(0.05)
        if answer.status != 200 or digest.digest() != hashlib.sha256(bytes(size)).digest():
            raise Wrong(f"HTTP {answer.status}, {got} of {size} bytes")
        return self._note(answer.headers[TASK_ID], "slow reader", 0, size)

    async def _events(self) -> str:
        count, got = 40, b""
        async with self._session.get(f"/run/events?n={count}&gap=0.1") as answer:
            async for piece in answer.content.iter_any():
                got += piece
        if answer.status != 200 or got != b"".join(b"data: %d\n\n" % number for number in range(count)):
            raise Wrong(f"HTTP {answer.status}: {got[:200]!r}")
        return self._note(answer.headers[TASK_ID], "events", 0, len(got))

    async def _hang_up(self) -> str:
        async with self._session.get("/run/events?n=10000&gap=0.1") as answer:
            for number in range(5):
                if await answer.content.readuntil(b"\n\n") != b"data: %d\n\n" % number:
                    raise Wrong(f"HTTP {answer.status}, not event {number}")
            answer.close()
        # What has come of an answer that was broken off is not counted.
        return self._note(answer.headers[TASK_ID], "hang-up among events", 0, None, pb.TASK_STATE_CANCELLED)

    async def _socket(self) -> str:
        turns = 20
        async with self._session.ws_connect("/run/socket", max_msg_size=0, autoping=False) as connection:
            for turn in range(turns):
                message = turn.to_bytes(4, "big") * (MESSAGE_BYTES // 4)
                await connection.send_bytes(message)
                if await connection.receive_bytes() != message:
                    raise Wrong(f"another message than the one sent, in turn {turn}")
                await asyncio.sleep(0.1)
            await connection.close()
        # Frames: two bytes of head, two of length, from the caller four of mask; and at the end each side's close.
        sent, got = turns * (MESSAGE_BYTES + 8) + 8, turns * (MESSAGE_BYTES + 4) + 4
        # The head of the answer is not kept by aiohttp's connection, but by its response.
        task_id = connection._response.headers[TASK_ID]
        return self._note(task_id, "WebSocket", sent, got)
