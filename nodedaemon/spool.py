"""What was done and is not yet acknowledged: results, and bodies too large to ride inside them.

A result lives in memory while its acknowledgement is awaited, which takes milliseconds; one that has waited longer than
SETTLE_S, or that is there when the daemon stops, is written to a file of its own and survives the daemon. So it is with
bodies, as long as they are small and few: past HELD_BYTES, or ALL_HELD_BYTES of all together, a body is an append-only
file, and from its beginning if it is said to become as large. The directory holds `<attempt>.result` and
`<attempt>.body`; a body without a result is of an attempt that a killed daemon left (see `journal`) and is deleted.

Nothing here is unbounded. Bodies and result files together take at most `limit_bytes` of disk, bodies in memory counted
as if they were there; past that the writer of a body waits, and so its container does. One exception keeps a full spool
from standing still for ever: the oldest body may always grow, so it is the limit and one body at most. Results in
memory take at most MEMORY_BYTES; past that, too, no further attempt may start here (`full`).
"""

import asyncio
import itertools
import os
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple
from urllib.parse import quote, unquote

import structlog
from google.protobuf.message import DecodeError
from ngpu import wire
from ngpu.v1 import node_pb2, task_pb2

Arguments = TypeVarTuple("Arguments")
Returned = TypeVar("Returned")

log = structlog.get_logger()

#: A result that has waited this long for its acknowledgement goes to disk.
SETTLE_S: Final = 1.0
#: Results in memory; past it no further attempt may start.
MEMORY_BYTES: Final = 64 * 1024 * 1024
#: A body is held in memory up to this size, ...
HELD_BYTES: Final = 8 * 1024 * 1024
#: ... and as long as all that are held have no more than this.
ALL_HELD_BYTES: Final = 48 * 1024 * 1024
#: A write or read of this size or less is done in the event loop: the page cache takes it faster than a thread wakes.
IN_LOOP_BYTES: Final = 16 * 1024
#: At the beginning of a result's file, before its CRC-32 (4 bytes, big-endian) and the message.
_MAGIC: Final = b"NGPU1"
_NUMBERS: Final = itertools.count()


class Body:
    """A response body, in memory or on disk: one writer, one reader that follows it.

    Opens its file anew for each piece: so nothing is left open while a control plane is gone for long, and a thread
    that still writes for an attempt that was cancelled can never hit a file that is not its own.
    """

    def __init__(self, spool: "Spool", path: Path, size: int, *, ended: bool, on_disk: bool = False) -> None:
        self._spool = spool
        self._path = path
        self._grown: asyncio.Future[None] | None = None
        # None once it is on disk.
        self._held: list[bytes] | None = None if on_disk else []
        self._has_file = on_disk
        self._storing = asyncio.Lock()
        self.size = size
        self.ended = ended

    async def write(self, data: bytes) -> None:
        """Append; waits while the spool is full. Raises OSError: the disk is full, say."""
        await self._spool.room(self)
        if self._held is not None and not self._spool.hold(self, len(data)):
            await self.store()
        if self._held is not None:
            self._held.append(data)
        elif len(data) <= IN_LOOP_BYTES:
            _append(self._path, [data])
        else:
            await self._spool.in_thread(_append, self._path, [data])
        self.size += len(data)
        self._spool.used_bytes += len(data)
        self._tell()

    def end(self) -> None:
        """No more will come."""
        self.ended = True
        self._tell()

    async def read(self, offset: int) -> bytes:
        """The next bytes from `offset`, at most a chunk; waits for them. Empty at the end. Raises OSError."""
        while offset >= self.size and not self.ended:
            self._grown = asyncio.get_running_loop().create_future()
            await self._grown
        wanted = min(wire.CHUNK_BYTES, self.size - offset)
        if wanted <= 0:
            return b""
        if self._held is not None:
            return wire.chunk_at(self._held, offset)
        if wanted <= IN_LOOP_BYTES:
            return _read_at(self._path, offset, wanted)
        return await self._spool.in_thread(_read_at, self._path, offset, wanted)

    async def store(self) -> None:
        """Bring to disk what is in memory, and from now on what comes. Raises OSError: it stays in memory."""
        async with self._storing:
            if self._held is None:
                return
            self._has_file = True
            _make(self._path)
            await self._spool.in_thread(_append, self._path, self._held)
            self._let_go()

    def delete(self) -> None:
        """Give its room back. What still writes or reads it fails with OSError."""
        if self._has_file:
            # Taking a large file's pages away takes a while, and nobody waits for it.
            self._spool.in_thread(self._path.unlink, True)
        self._let_go()
        self._spool.used_bytes -= self.size
        self.size = 0
        self.end()

    def _let_go(self) -> None:
        if self._held is not None:
            self._spool.held_bytes -= sum(map(len, self._held))
            self._held = None

    def _tell(self) -> None:
        if self._grown is not None and not self._grown.done():
            self._grown.set_result(None)


@dataclass(slots=True)
class _Entry:
    """`result` is None once it is only on disk."""

    result: node_pb2.Result | None
    size: int
    time: float
    on_disk: bool = False


class Spool:
    """Keeps results and bodies in `directory`, which it makes. Loads what an earlier daemon left there.

    `used_bytes`: disk taken by bodies and result files. `memory_bytes`: results in memory. `held_bytes`: bodies there.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int,
        memory_limit_bytes: int = MEMORY_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._memory_limit_bytes = memory_limit_bytes
        self._monotonic = monotonic
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="spool")
        self._entries: dict[str, _Entry] = {}
        self._bodies: dict[str, Body] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._settling = asyncio.Lock()
        self.used_bytes = 0
        self.memory_bytes = 0
        self.held_bytes = 0
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._load()

    @property
    def full(self) -> bool:
        """No further attempt may start here."""
        return self.memory_bytes >= self._memory_limit_bytes or self.used_bytes >= self._limit_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, attempt_id: str) -> bool:
        return attempt_id in self._entries

    def attempts(self) -> list[str]:
        """Ended and not acknowledged, oldest first."""
        return list(self._entries)

    def add(self, result: node_pb2.Result) -> None:
        """Keep it until `forget`."""
        entry = _Entry(result, result.ByteSize(), self._monotonic())
        self._entries[result.attempt_id] = entry
        self.memory_bytes += entry.size

    def result(self, attempt_id: str) -> node_pb2.Result | None:
        """What was added under that id, if it is still kept."""
        entry = self._entries.get(attempt_id)
        if entry is None:
            return None
        return entry.result or _load_result(self._path(attempt_id, "result")) or _lost(attempt_id)

    def begin_body(self, attempt_id: str, expected_bytes: int = 0) -> Body:
        """A new body, empty; 0: its size is not known yet. Raises OSError."""
        path, large = self._path(attempt_id, "body"), expected_bytes > HELD_BYTES
        if large:
            _make(path)
        body = self._bodies[attempt_id] = Body(self, path, 0, ended=False, on_disk=large)
        return body

    def hold(self, body: Body, size: int) -> bool:
        """Whether so much more of a body may be held in memory; if so it is counted."""
        if body.size + size > HELD_BYTES or self.held_bytes + size > ALL_HELD_BYTES:
            return False
        self.held_bytes += size
        return True

    def body(self, attempt_id: str) -> Body | None:
        """The body begun under that id, if it is still kept."""
        return self._bodies.get(attempt_id)

    def drop_body(self, attempt_id: str) -> None:
        """Delete the body of an attempt, if it has one."""
        if body := self._bodies.pop(attempt_id, None):
            body.delete()
            self._wake()

    def forget(self, attempt_id: str) -> None:
        """The attempt is acknowledged: delete all that is kept of it. No error if nothing is."""
        self.drop_body(attempt_id)
        if entry := self._entries.pop(attempt_id, None):
            if entry.result is not None:
                self.memory_bytes -= entry.size
            if entry.on_disk:
                self._path(attempt_id, "result").unlink(missing_ok=True)
                self.used_bytes -= entry.size
                self._wake()

    async def room(self, body: Body) -> None:
        """Wait until `body` may grow."""
        while self.used_bytes >= self._limit_bytes and next(iter(self._bodies.values()), body) is not body:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    async def run(self) -> None:
        """Bring to disk what waits too long, until cancelled."""
        while True:
            await asyncio.sleep(SETTLE_S)
            await self.settle(self._monotonic() - SETTLE_S)

    async def settle(self, before: float = float("inf")) -> None:
        """Write results added before that time to disk; leave in memory at most half of what may be there.

        What cannot be written stays in memory.
        """
        async with self._settling:
            await self._settle(before)

    async def _settle(self, before: float) -> None:
        failed = 0
        for attempt_id, entry in list(self._entries.items()):
            if entry.time > before:
                break
            if attempt_id not in self._entries:
                continue
            if not entry.on_disk and entry.result is not None:
                try:
                    if body := self._bodies.get(attempt_id):
                        await body.store()
                    await self.in_thread(_store, self._path(attempt_id, "result"), entry.result.SerializeToString())
                except OSError as fault:
                    failed += 1
                    reason = fault.strerror
                    continue
                if attempt_id not in self._entries:
                    # Acknowledged while it was being written.
                    self._path(attempt_id, "result").unlink(missing_ok=True)
                    continue
                entry.on_disk = True
                self.used_bytes += entry.size
            if entry.result is not None and self.memory_bytes > self._memory_limit_bytes // 2:
                entry.result = None
                self.memory_bytes -= entry.size
        if failed:
            log.warning("spool_write_failed", results=failed, reason=reason)

    def close(self) -> None:
        """After the last call."""
        self._threads.shutdown()

    def in_thread(self, call: Callable[[*Arguments], Returned], *arguments: *Arguments) -> Awaitable[Returned]:
        """Disk work outside the event loop, and apart from the threads that others may hold up."""
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _path(self, attempt_id: str, kind: str) -> Path:
        return self._directory / f"{quote(attempt_id, safe='')}.{kind}"

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _load(self) -> None:
        """Take up what is there: results oldest first, with their bodies; the rest is deleted."""
        results = sorted(self._directory.glob("*.result"), key=lambda path: path.stat().st_mtime_ns)
        for path in results:
            attempt_id = unquote(path.stem)
            result = _load_result(path)
            size = path.stat().st_size
            promised = result.response.body.size if result else 0
            body = path.with_suffix(".body")
            stored = body.stat().st_size if body.exists() else 0
            if result is None or (promised > len(result.response.body.inline) and stored != promised):
                log.error("spool_damaged", attempt=attempt_id, path=str(path))
                self.add(_lost(attempt_id))
                path.unlink()
                continue
            self._entries[attempt_id] = _Entry(None, size, float("-inf"), on_disk=True)
            self.used_bytes += size + stored
            if stored:
                self._bodies[attempt_id] = Body(self, body, stored, ended=True, on_disk=True)
        for path in self._directory.iterdir():
            if path.suffix == ".new" or (path.suffix == ".body" and unquote(path.stem) not in self._bodies):
                path.unlink()


def _lost(attempt_id: str) -> node_pb2.Result:
    failure = task_pb2.Failure(
        cause=task_pb2.CAUSE_PLATFORM,
        reason="INTERNAL",
        message="The container answered, but the answer was damaged on the node's disk.",
    )
    return node_pb2.Result(attempt_id=attempt_id, delivery=task_pb2.DELIVERY_SENT, failure=failure)


def _make(path: Path) -> None:
    """Empty; what was left by a try that failed goes."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)


def _append(path: Path, pieces: list[bytes]) -> None:
    # Never O_CREAT: a body that was deleted must not come back.
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        for data in pieces:
            with memoryview(data) as rest:
                written = 0
                while written < len(data):
                    written += os.write(fd, rest[written:])
    finally:
        os.close(fd)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def _store(path: Path, message: bytes) -> None:
    """Whole or not at all, also when the power fails."""
    # A name of its own: a write that was cancelled may still be under way.
    new = path.with_suffix(f".{next(_NUMBERS)}.new")
    try:
        with new.open("wb") as file:
            file.write(_MAGIC + zlib.crc32(message).to_bytes(4, "big") + message)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _load_result(path: Path) -> node_pb2.Result | None:
    """None if it is damaged."""
    try:
        data = path.read_bytes()
        message = data[len(_MAGIC) + 4 :]
        if data[: len(_MAGIC) + 4] == _MAGIC + zlib.crc32(message).to_bytes(4, "big"):
            return node_pb2.Result.FromString(message)
    except (OSError, DecodeError):
        pass
    return None
