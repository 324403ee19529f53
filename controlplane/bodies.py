"""Bodies too large for a row: append-only files, one writer each, any number of readers that follow their growth.

What a body holds is what its file holds, so that after a restart an unsealed body is gone on with from its length; but
who says so (`behind`) has its last pieces written a little later and together, and readers have them from memory until
then. File work (`body_files`) runs in a few threads of its own, but for reads of what the page cache has; waiting for
growth does not poll: an append wakes those who follow.
"""

import asyncio
import errno
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import structlog
from ngpu import wire

from controlplane import body_files
from controlplane.body_files import File, Found
from controlplane.body_pieces import Behind, Held, Memory
from controlplane.errors import NgpuError, OutOfRange, Unavailable

#: Threads for file work.
THREADS: Final = 4
#: Pieces that come behind are written when there is so much of them, ...
BEHIND_BYTES: Final = 4 * wire.CHUNK_BYTES
#: ... or after this time, in seconds, ...
BEHIND_S: Final = 0.05
#: ... or at once while there is so much of all bodies together; then appends wait, too.
ALL_BEHIND_BYTES: Final = 16 * 1024 * 1024
#: Sealed files that readers keep open; further ones are opened for each piece.
KEPT_OPEN: Final = 128
#: What was just sealed is in memory for its first reader for so long, in seconds.
HELD_S: Final = 2.0

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


class Bodies:
    """The body store: a directory.

    Errors of every method: ValueError (a name that is none: a bug of the caller), Unavailable (the disk is full or
    fails, or the store is closed).
    """

    @classmethod
    async def open(cls, directory: Path) -> Self:
        """Open or make the store."""
        await asyncio.to_thread(body_files.make, str(directory))
        return cls(str(directory))

    def __init__(self, root: str) -> None:
        self._root = root
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bodies")
        # Appends to one body happen one after the other, also when an abandoned one is still under way in its thread.
        self._locks = [threading.Lock() for _ in range(body_files.SHARDS)]
        # By name, those who wait for growth.
        self._followers: dict[str, set[asyncio.Future[None]]] = {}
        self._readers: Counter[str] = Counter()
        self._behind: dict[str, Behind] = {}
        #: Of what came behind, all that is not in a file yet.
        self.behind_bytes = 0
        self._kept_open: weakref.WeakSet[File] = weakref.WeakSet()
        self._memory = Memory()
        # Just sealed and not read since.
        self._fresh: dict[str, Held] = {}
        self._page = bytearray(wire.CHUNK_BYTES)
        self._closed = False

    async def close(self) -> None:
        """Finish what runs; followers that wait for growth get Unavailable."""
        for name in list(self._behind):
            with suppress(NgpuError):
                await self._settle(name)
        self._closed = True
        for name in list(self._followers):
            self._wake(name)
        await asyncio.to_thread(self._threads.shutdown)

    @property
    def held_bytes(self) -> int:
        """Of bodies, growing and just sealed, what is in memory for their first readers."""
        return self._memory.used_bytes

    @property
    def followers(self) -> int:
        """Readers that wait for growth, or are about to."""
        return sum(map(len, self._followers.values()))

    async def append(self, name: str, offset: int, data: bytes, *, limit_bytes: int, behind: bool = False) -> int:
        """Write `data` at `offset`, which must be the body's size; makes the body at offset 0. Gives the new size.

        Wholly there or not at all, also when the caller is cancelled: ask `size` then. With `behind` it may be written
        up to BEHIND_S later, and the next call for this body (`seal`, say) tells if that failed.
        Raises OutOfRange (the message says the size), TooLarge (it would pass `limit_bytes`), Conflict (it is sealed).
        """
        if behind and (pieces := self._behind.get(name)) is not None:
            return await self._append_behind(name, pieces, offset, data, limit_bytes)
        path = self._path(name)

        def append() -> tuple[File, int]:
            with self._lock(name):
                return body_files.append(path, offset, [data], limit_bytes)

        await self._settle(name)
        file, size = await self._run(append, name)
        if behind:
            self._goes_on_behind(name, file, size, data)
        return size

    async def begin(self, name: str) -> tuple[int, bool]:
        """Make it, unless it is there, to go on with it `behind`. Gives its size, and whether it is sealed."""
        path = self._path(name)

        def begin() -> tuple[File | None, int]:
            with self._lock(name):
                return body_files.begin(path)

        await self._settle(name)
        file, size = await self._run(begin)
        if file is not None:
            self._goes_on_behind(name, file, size, b"")
        return size, file is None

    async def flush(self, name: str) -> None:
        """What came `behind` is with the kernel."""
        await self._settle(name, keep=True)

    async def size(self, name: str, *, written: bool = True) -> int | None:
        """Its length so far; None: there is no such body. `written`: what came behind is with the kernel."""
        if not written and (pieces := self._behind.get(name)) is not None and pieces.fault is None:
            return pieces.size
        await self._settle(name, keep=True)
        found = await self._run(partial(body_files.find, self._path(name)))
        return None if found is None else found[0]

    async def sealed(self, name: str) -> bool:
        """True once it is complete; False while it grows, or if it is not there."""
        if name in self._behind:
            return False
        found = await self._run(partial(body_files.find, self._path(name)))
        return found is not None and found[1]

    async def seal(self, name: str, new_name: str | None = None, *, durable: bool = True) -> int:
        """It is complete, and with `new_name` is called so from now on. Gives its size. Again is no error.

        Followers come to its end, or find nothing by the old name. `durable`: returns when it is on disk, else when it
        is with the kernel. Raises NotFound.
        """
        path, target = self._path(name), self._path(new_name or name)
        behind = await self._settle(name)
        file = held = None
        if behind is not None:
            file, held, behind.held = behind.file, behind.held, None
        # Who reads it from memory needs no page cache; who has begun to read the file does.
        forget = durable and held is not None and name not in self._readers

        def seal() -> int:
            with self._lock(name):
                return body_files.seal(path, target, file, durable=durable, forget=forget)

        size = await self._run(seal, name)
        if held is not None and held.size == size:
            held.is_cached = not forget
            self._fresh[new_name or name] = held
            self._loop.call_later(HELD_S, self._let_fresh_go, new_name or name, weakref.ref(held))
        return size

    async def follow(
        self, name: str, offset: int = 0, *, until: asyncio.Future[Any] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Its bytes from `offset` to its end, in chunks of at most wire.CHUNK_BYTES; waits for growth till sealed.

        Of one that grows `offset` may be past its size: what came behind and was read may have been lost with an
        earlier process, and comes again. Ends early once `until` is done. Raises NotFound (there is no such body, or it
        was deleted before it was whole or read from), OutOfRange (it is whole, and `offset` past its end).
        """
        path = self._path(name)
        self._readers[name] += 1

        def wake(_: object) -> None:
            self._wake(name)

        if until is not None:
            until.add_done_callback(wake)
        # A file that was read just now opens without a look at the disk; one that is sealed need not be opened again.
        at_hand = complete = False
        whole: File | None = None
        try:
            while until is None or not until.done():
                # Before the read, so that no growth after it is missed.
                with self._following(name) as growth:
                    pieces, fresh = self._behind.get(name), self._fresh.get(name)
                    if pieces is not None and pieces.has(offset):
                        data, complete = pieces.read(offset), False
                    elif fresh is not None and offset <= fresh.size:
                        data = fresh.read(offset)
                        complete = offset + len(data) == fresh.size
                    else:
                        data, left, whole = await self._read(whole or path, offset, at_hand=at_hand)
                        complete, at_hand = left == 0, True
                    if not data and not complete:
                        await growth
                        continue
                if data:
                    yield data
                offset += len(data)
                if complete:
                    return
        finally:
            if until is not None:
                until.remove_done_callback(wake)
            self._readers[name] -= 1
            if not self._readers[name]:
                del self._readers[name]
                fresh = self._fresh.pop(name, None) if complete else None
                if complete and (fresh is None or fresh.is_cached) and not self._closed:
                    self._threads.submit(body_files.let_go, whole or path)

    def is_read(self, name: str) -> bool:
        """Somebody follows it just now."""
        return name in self._readers

    async def delete(self, *names: str) -> None:
        """No error for those that are not there. Followers get NotFound."""
        paths = [self._path(name) for name in names]
        for name in names:
            self._fresh.pop(name, None)
            with suppress(NgpuError):
                await self._settle(name, write=False)

        def delete() -> None:
            for name, path in zip(names, paths, strict=True):
                with self._lock(name):
                    body_files.remove(path)

        await self._run(delete, *names)

    async def sweep(self, before: datetime, prefix: str = "") -> int:
        """Delete bodies last written before `before` whose name begins with `prefix`; gives how many.

        With `upload-` those that no task took; without, what a crash may have left behind.
        """
        count = 0
        while names := await self._run(partial(body_files.stale, self._root, before.timestamp(), prefix)):
            await self.delete(*names)
            count += len(names)
        return count

    async def unfinished(self, before: datetime) -> AsyncGenerator[list[str], None]:
        """The names of bodies that are not sealed and were last written before `before`, some at a time."""
        for shard in range(body_files.SHARDS):
            if names := await self._run(partial(body_files.unfinished, self._root, shard, before.timestamp())):
                yield names

    async def _append_behind(self, name: str, pieces: Behind, offset: int, data: bytes, limit_bytes: int) -> int:
        if pieces.fault is not None:
            await self._settle(name)
        if offset != pieces.size:
            raise OutOfRange(f"The body's stored size is {pieces.size}: go on from there.")
        body_files.check_limit(offset + len(data), limit_bytes)
        pieces.add(data)
        self.behind_bytes += len(data)
        self._wake(name)
        crowded = self.behind_bytes > ALL_BEHIND_BYTES
        if crowded or pieces.waiting_bytes >= BEHIND_BYTES:
            self._write(name, pieces)
            if pieces.writing is not None and (crowded or pieces.waiting_bytes >= BEHIND_BYTES):
                await asyncio.wait({pieces.writing})
        return pieces.size

    def _write(self, name: str, pieces: Behind) -> None:
        """Begin to write what waits, unless that is under way."""
        if pieces.writing is not None or not pieces.waiting_bytes:
            return
        path, file, start, batch = self._path(name), pieces.file, pieces.start, pieces.begin()

        def write() -> None:
            with self._lock(name):
                body_files.extend(path, file, start, batch)

        pieces.writing = asyncio.create_task(self._run(write), name=f"write-{name}")
        pieces.writing.add_done_callback(partial(self._written, name, pieces))

    def _written(self, name: str, pieces: Behind, writing: asyncio.Task[None]) -> None:
        fault = Unavailable("The control plane is stopping.") if writing.cancelled() else writing.exception()
        self.behind_bytes -= pieces.end(fault)
        self._wake(name)

    def _let_fresh_go(self, name: str, held: "weakref.ref[Held]") -> None:
        if (fresh := self._fresh.get(name)) is not None and fresh is held():
            del self._fresh[name]

    def _goes_on_behind(self, name: str, file: File, size: int, last: bytes) -> None:
        held = Held(self._memory) if size == len(last) else None
        self._behind[name] = pieces = Behind(file, size, held if held is not None and held.add(last) else None)
        self._write_later(name, pieces)

    def _write_later(self, name: str, pieces: Behind) -> None:
        """See that nothing waits for longer, and that nothing is left of a writer who has gone."""
        size = pieces.size

        def look() -> None:
            # A fault is kept until somebody asks, or the body is swept: nobody may take for whole what is not.
            if self._behind.get(name) is not pieces or pieces.fault is not None:
                return
            self._write(name, pieces)
            if pieces.size == size and pieces.writing is None:
                del self._behind[name]
            else:
                self._write_later(name, pieces)

        self._loop.call_later(BEHIND_S, look)

    async def _settle(self, name: str, *, write: bool = True, keep: bool = False) -> Behind | None:
        """What came behind is in the file, or with `write=False` given up. Raises what went wrong with it.

        Gives what there was, if something had come; with `keep` more may.
        """
        while (pieces := self._behind.get(name)) is not None:
            if write:
                self._write(name, pieces)
            if pieces.writing is not None:
                await asyncio.wait({pieces.writing})
                continue
            if self._behind.get(name) is not pieces:
                continue
            if keep and pieces.fault is None:
                return pieces
            del self._behind[name]
            if pieces.fault is not None:
                pieces.file.close()
                raise pieces.fault
            self.behind_bytes -= pieces.waiting_bytes
            return pieces
        return None

    async def _read(self, body: str | File, offset: int, *, at_hand: bool) -> Found:
        """The next bytes: `at_hand` in the event loop, which must not wait for a disk, if the page cache has them."""
        found = None
        if at_hand and not self._closed:
            with suppress(OSError):
                found = body_files.read_cached(body, offset, self._page)
        if found is None:
            found = await self._run(partial(body_files.read, body, offset))
        data, left, whole = found
        return data, left, self._kept(whole)

    def _kept(self, whole: File | None) -> File | None:
        """The same, to be kept open; None if too many are."""
        if whole is None or (whole not in self._kept_open and len(self._kept_open) >= KEPT_OPEN):
            return None
        self._kept_open.add(whole)
        return whole

    def _path(self, name: str) -> str:
        return body_files.path_of(self._root, name)

    def _lock(self, name: str) -> threading.Lock:
        return self._locks[body_files.shard_of(name)]

    async def _run(self, work: Callable[[], Result], *names: str) -> Result:
        """Do it in a thread. Who follows `names` looks at them then, also if the caller has gone away meanwhile."""
        if self._closed:
            raise Unavailable("The control plane is stopping.", retry_after_s=1.0)
        working = self._loop.run_in_executor(self._threads, work)
        if names:
            working.add_done_callback(lambda _: self._wake(*names))
        try:
            return await (asyncio.shield(working) if names else working)
        except OSError as error:
            log.warning("bodies_disk_failed", error=error.strerror)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            message = "The control plane's disk is full" if full else "The control plane's disk does not answer"
            raise Unavailable(f"{message}; try again later.", retry_after_s=5.0) from error

    @contextmanager
    def _following(self, name: str) -> Iterator[asyncio.Future[None]]:
        growth: asyncio.Future[None] = self._loop.create_future()
        self._followers.setdefault(name, set()).add(growth)
        try:
            yield growth
        finally:
            others = self._followers.get(name, set())
            others.discard(growth)
            if not others:
                self._followers.pop(name, None)

    def _wake(self, *names: str) -> None:
        for name in names:
            for growth in self._followers.get(name, ()):
                if not growth.done():
                    growth.set_result(None)
