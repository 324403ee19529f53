"""Bodies too large for a row: append-only files, one writer each, any number of readers that follow their growth.

What a body holds is what its file holds, so that after a restart an unsealed body is gone on with from its length; but
who says so (`behind`) has its last pieces written a little later and together, and readers have them from memory until
then. A growing body has the suffix `.part`; sealing it takes that away. File work runs in a few threads of its own, but
for reads of what the page cache has; waiting for growth does not poll: an append wakes those who follow.
"""

import asyncio
import errno
import os
import re
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, TypeVar

import structlog
from ngpu import wire

from controlplane.errors import Conflict, NgpuError, NotFound, OutOfRange, TooLarge, Unavailable

#: Threads for file work.
THREADS: Final = 4
#: Pieces that come behind are written when there is so much of them, ...
BEHIND_BYTES: Final = 4 * wire.CHUNK_BYTES
#: ... or after this time, in seconds, ...
BEHIND_S: Final = 0.05
#: ... or at once while there is so much of all bodies together; then appends wait, too.
ALL_BEHIND_BYTES: Final = 16 * 1024 * 1024
#: Pieces given to the kernel in one call, which takes no more than 1024.
WRITTEN_AT_ONCE: Final = 256
#: Sealed files that readers keep open; further ones are opened for each piece.
KEPT_OPEN: Final = 128
#: What came behind of a body up to this size, in so many pieces at most, is held in memory for its first reader, who
#: mostly comes at once, ...
HELD_BYTES: Final = 8 * 1024 * 1024
HELD_PIECES: Final = 256
#: ... as long as there is no more of all bodies together, and for so long after it is sealed, in seconds.
ALL_HELD_BYTES: Final = 32 * 1024 * 1024
HELD_S: Final = 2.0
#: Bodies leave so much of their disk free, or RESERVE_SHARE of it if that is less: the database may be there, too.
RESERVE_BYTES: Final = 512 * 1024 * 1024
RESERVE_SHARE: Final = 0.05
#: Bodies deleted in one step of a sweep.
SWEPT: Final = 1000

#: Sub-directories, so that none has millions of files.
_SHARDS: Final = 256
_GROWING: Final = ".part"
_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")

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
        await asyncio.to_thread(_make, directory)
        return cls(directory)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._root = str(directory)
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bodies")
        # Appends to one body happen one after the other, also when an abandoned one is still under way in its thread.
        self._locks = [threading.Lock() for _ in range(_SHARDS)]
        # By name, those who wait for growth.
        self._followers: dict[str, set[asyncio.Future[None]]] = {}
        self._readers: Counter[str] = Counter()
        self._behind: dict[str, _Behind] = {}
        #: Of what came behind, all that is not in a file yet.
        self.behind_bytes = 0
        self._kept_open: weakref.WeakSet[_File] = weakref.WeakSet()
        self._memory = _Memory()
        # Just sealed and not read since.
        self._fresh: dict[str, _Held] = {}
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

        def append() -> tuple[_File, int]:
            with self._locks[_shard(name)]:
                return _append(path, offset, [data], limit_bytes)

        await self._settle(name)
        file, size = await self._run(append, name)
        if behind:
            self._goes_on_behind(name, file, size, data)
        return size

    async def begin(self, name: str) -> tuple[int, bool]:
        """Make it, unless it is there, to go on with it `behind`. Gives its size, and whether it is sealed."""
        path = self._path(name)

        def begin() -> tuple[_File | None, int]:
            with self._locks[_shard(name)]:
                return _begin(path)

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
        found = await self._run(partial(_find, self._path(name)))
        return None if found is None else found[0]

    async def sealed(self, name: str) -> bool:
        """True once it is complete; False while it grows, or if it is not there."""
        if name in self._behind:
            return False
        found = await self._run(partial(_find, self._path(name)))
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
            with self._locks[_shard(name)]:
                return _seal(path, target, file, durable=durable, forget=forget)

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
        whole: _File | None = None
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
                    self._threads.submit(_let_go, whole or path)

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
                with self._locks[_shard(name)]:
                    for file in (path + _GROWING, path):
                        with suppress(FileNotFoundError):
                            os.unlink(file)

        await self._run(delete, *names)

    async def sweep(self, before: datetime, prefix: str = "") -> int:
        """Delete bodies last written before `before` whose name begins with `prefix`; gives how many.

        With `upload-` those that no task took; without, what a crash may have left behind.
        """
        count = 0
        while names := await self._run(partial(_stale, self._directory, before.timestamp(), prefix)):
            await self.delete(*names)
            count += len(names)
        return count

    async def unfinished(self, before: datetime) -> AsyncGenerator[list[str], None]:
        """The names of bodies that are not sealed and were last written before `before`, some at a time."""
        for shard in range(_SHARDS):
            if names := await self._run(partial(_unfinished, self._directory / f"{shard:02x}", before.timestamp())):
                yield names

    async def _append_behind(self, name: str, pieces: "_Behind", offset: int, data: bytes, limit_bytes: int) -> int:
        if pieces.fault is not None:
            await self._settle(name)
        if offset != pieces.size:
            raise OutOfRange(f"The body's stored size is {pieces.size}: go on from there.")
        _check_limit(offset + len(data), limit_bytes)
        pieces.add(data)
        self.behind_bytes += len(data)
        self._wake(name)
        crowded = self.behind_bytes > ALL_BEHIND_BYTES
        if crowded or pieces.waiting_bytes >= BEHIND_BYTES:
            self._write(name, pieces)
            if pieces.writing is not None and (crowded or pieces.waiting_bytes >= BEHIND_BYTES):
                await asyncio.wait({pieces.writing})
        return pieces.size

    def _write(self, name: str, pieces: "_Behind") -> None:
        """Begin to write what waits, unless that is under way."""
        if pieces.writing is not None or not pieces.waiting_bytes:
            return
        path, file, start, batch = self._path(name), pieces.file, pieces.start, pieces.begin()

        def write() -> None:
            with self._locks[_shard(name)]:
                _extend(path, file, start, batch)

        pieces.writing = asyncio.create_task(self._run(write), name=f"write-{name}")
        pieces.writing.add_done_callback(partial(self._written, name, pieces))

    def _written(self, name: str, pieces: "_Behind", writing: asyncio.Task[None]) -> None:
        fault = Unavailable("The control plane is stopping.") if writing.cancelled() else writing.exception()
        self.behind_bytes -= pieces.end(fault)
        self._wake(name)

    def _let_fresh_go(self, name: str, held: "weakref.ref[_Held]") -> None:
        if (fresh := self._fresh.get(name)) is not None and fresh is held():
            del self._fresh[name]

    def _goes_on_behind(self, name: str, file: "_File", size: int, last: bytes) -> None:
        held = _Held(self._memory) if size == len(last) else None
        self._behind[name] = pieces = _Behind(file, size, held if held is not None and held.add(last) else None)
        self._write_later(name, pieces)

    def _write_later(self, name: str, pieces: "_Behind") -> None:
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

    async def _settle(self, name: str, *, write: bool = True, keep: bool = False) -> "_Behind | None":
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

    async def _read(self, body: "str | _File", offset: int, *, at_hand: bool) -> "_Found":
        """The next bytes: `at_hand` in the event loop, which must not wait for a disk, if the page cache has them."""
        found = None
        if at_hand and not self._closed:
            with suppress(OSError):
                found = _read_cached(body, offset, self._page)
        if found is None:
            found = await self._run(partial(_read, body, offset))
        data, left, whole = found
        return data, left, self._kept(whole)

    def _kept(self, whole: "_File | None") -> "_File | None":
        """The same, to be kept open; None if too many are."""
        if whole is None or (whole not in self._kept_open and len(self._kept_open) >= KEPT_OPEN):
            return None
        self._kept_open.add(whole)
        return whole

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name) or name.endswith(_GROWING):
            raise ValueError(f"not a body's name: {name[:80]!r}")
        return f"{self._root}/{_shard(name):02x}/{name}"

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


class _File:
    """An open file, closed when the last who has it is done, be he a thread whose caller has gone."""

    __slots__ = ("__weakref__", "file", "inode", "size")

    def __init__(self, path: str, flags: int = os.O_RDONLY) -> None:
        """Raises OSError."""
        self.file = -1
        self.file = os.open(path, flags | os.O_CLOEXEC, 0o600)
        found = os.fstat(self.file)
        #: When it was opened, which for one that is sealed is its size.
        self.size = found.st_size
        self.inode = found.st_ino

    def close(self) -> None:
        """At once: who has it may be the traceback of an error."""
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)

    __del__ = close


class _Memory:
    """What all bodies together hold."""

    used_bytes = 0


class _Held:
    """All pieces of a body, from its first byte on; counted as long as somebody has them."""

    __slots__ = ("__weakref__", "_memory", "_pieces", "is_cached", "size")

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._pieces: list[bytes] = []
        self.size = 0
        #: Its file is in the page cache, too.
        self.is_cached = True

    def add(self, data: bytes) -> bool:
        """The next piece. False: there is no room for it, and so no use for the others."""
        size = len(data)
        if self.size + size > HELD_BYTES or self._memory.used_bytes + size > ALL_HELD_BYTES:
            return False
        if size:
            self._memory.used_bytes += size
            self.size += size
            self._pieces.append(data)
        return len(self._pieces) <= HELD_PIECES

    def read(self, offset: int) -> bytes:
        """From `offset` on, a chunk at most; empty at the end."""
        return wire.chunk_at(self._pieces, offset)

    def __del__(self) -> None:
        self._memory.used_bytes -= self.size


class _Behind:
    """The last pieces of a growing body: what its file does not have yet, or is just getting.

    `held`: these and all before them.
    """

    def __init__(self, file: _File, size: int, held: _Held | None) -> None:
        self.file = file
        self.held = held
        #: What the file has, ...
        self.start = size
        #: ... and what there is with the pieces.
        self.size = size
        self.waiting_bytes = 0
        self.writing: asyncio.Task[None] | None = None
        self.fault: BaseException | None = None
        self._pieces: list[bytes] = []
        # Of them, in `writing`.
        self._begun = 0

    def add(self, data: bytes) -> None:
        """The next piece."""
        if data:
            self._pieces.append(data)
            self.size += len(data)
            self.waiting_bytes += len(data)
            if self.held is not None and not self.held.add(data):
                self.held = None

    def begin(self) -> list[bytes]:
        """What is to be written now."""
        self._begun = len(self._pieces)
        self.waiting_bytes = 0
        return self._pieces.copy()

    def end(self, fault: BaseException | None) -> int:
        """It was written, or not; gives how many bytes are let go."""
        self.writing = None
        if fault is not None:
            # The writer will be told; what he sends again comes from the file's size on.
            self.fault, self._begun, self.held = fault, len(self._pieces), None
        size = sum(map(len, self._pieces[: self._begun]))
        del self._pieces[: self._begun]
        if fault is not None:
            self.size, self.waiting_bytes = self.start, 0
        else:
            self.start += size
        return size

    def has(self, offset: int) -> bool:
        """Whether it can be read from there on."""
        return offset >= self.start or self.held is not None

    def read(self, offset: int) -> bytes:
        """What is at `offset`, a piece or more; empty at the end, and past it."""
        if self.held is not None:
            return self.held.read(offset)
        at = self.start
        for piece in self._pieces:
            if offset < at + len(piece):
                return piece[offset - at :]
            at += len(piece)
        return b""


# What is done to files, in a thread.


def _append(path: str, offset: int, pieces: Sequence[bytes], limit_bytes: int) -> tuple[_File, int]:
    """Gives the file and its new size."""
    if os.path.exists(path):
        raise Conflict("The body is complete already.")
    _check_limit(offset + sum(map(len, pieces)), limit_bytes)
    try:
        # Only the first append makes it: one that comes after a deletion must not bring it back.
        file = _File(path + _GROWING, os.O_WRONLY | (os.O_CREAT if offset == 0 else 0))
    except FileNotFoundError:
        raise OutOfRange("The body's stored size is 0: go on from there.") from None
    try:
        return file, _extend(path, file, offset, pieces)
    except BaseException:
        file.close()
        raise


def _begin(path: str) -> tuple[_File | None, int]:
    """The growing file and its size; None for one that is sealed."""
    with suppress(FileNotFoundError):
        return None, os.stat(path).st_size
    file = _File(path + _GROWING, os.O_WRONLY | os.O_CREAT)
    return file, file.size


def _extend(path: str, file: _File, offset: int, pieces: Sequence[bytes]) -> int:
    """Gives the new size."""
    try:
        found = os.stat(path + _GROWING)
    except FileNotFoundError:
        if os.path.exists(path):
            raise Conflict("The body is complete already.") from None
        raise OutOfRange("The body's stored size is 0: go on from there.") from None
    size = found.st_size
    # What was deleted by another process, and perhaps made anew, can still be written to.
    if size != offset or found.st_ino != file.inode:
        raise OutOfRange(f"The body's stored size is {size}: go on from there.")
    if not (length := sum(map(len, pieces))):
        return size
    try:
        _check_room(file.file, length)
        # At its place, not at the end: one that stood still since the look at the size, and whose work another
        # process has taken over, must not spoil what that one has appended.
        _write_all(file.file, pieces, size)
    except BaseException:
        os.ftruncate(file.file, size)
        raise
    return size + length


def _check_room(file: int, length: int) -> None:
    disk = os.fstatvfs(file)
    reserve = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize * RESERVE_SHARE)
    if disk.f_bavail * disk.f_frsize - length < reserve:
        raise OSError(errno.ENOSPC, f"only the {reserve / 2**20:.0f} MiB are left that bodies leave free")


def _write_all(file: int, pieces: Sequence[bytes], offset: int) -> None:
    rest = [memoryview(piece) for piece in pieces if piece]
    while rest:
        written = os.pwritev(file, rest[:WRITTEN_AT_ONCE], offset)
        offset += written
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if written:
            rest[0] = rest[0][written:]


def _check_limit(size: int, limit_bytes: float) -> None:
    if size > limit_bytes:
        raise TooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")


def _seal(path: str, target: str, file: _File | None, *, durable: bool, forget: bool) -> int:
    """`file`: what it has grown in just now, if that is open. `forget`: it need not be in the page cache."""
    if file is None:
        try:
            file, _ = _opened(path)
        except NotFound:
            # Done before, perhaps not durably.
            file, _ = _opened(target)
    if durable:
        os.fsync(file.file)
    for name in _both(path):
        with suppress(FileNotFoundError):
            os.rename(name, target)
            break
    else:
        if not os.path.exists(target):
            raise NotFound
    if durable:
        # That an old name has gone need not be on disk: should a crash bring it back, the sweep takes it away.
        _flush(os.path.dirname(target))
    if forget:
        os.posix_fadvise(file.file, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.fstat(file.file).st_size


#: Of a body the next bytes, how many follow them, and in what; None and None: it still grows.
_Found: TypeAlias = tuple[bytes, int | None, _File | None]


def _read(body: str | _File, offset: int) -> _Found:
    """A chunk at most."""
    file, sealed = _opened(body)
    data = os.pread(file.file, min(wire.CHUNK_BYTES, max(0, file.size - offset)), offset)
    return _found(file, offset, data, sealed=sealed)


def _read_cached(body: str | _File, offset: int, page: bytearray) -> _Found:
    """The same, a page at most, into `page` first. Raises OSError if that would have to wait for a disk."""
    file, sealed = _opened(body)
    data = bytes(memoryview(page)[: os.preadv(file.file, [page], offset, os.RWF_NOWAIT)])
    return _found(file, offset, data, sealed=sealed)


def _found(file: _File, offset: int, data: bytes, *, sealed: bool) -> _Found:
    if not sealed:
        return data, None, None
    if offset > file.size:
        raise OutOfRange(f"The body has {file.size} bytes: there is nothing at {offset}.")
    return data, file.size - offset - len(data), file


def _opened(body: str | _File) -> tuple[_File, bool]:
    """The body's file as it is now, and whether it is sealed. Raises NotFound."""
    if isinstance(body, _File):
        return body, True
    for name in _both(body):
        with suppress(FileNotFoundError):
            return _File(name), name == body
    raise NotFound("There is no such body, or it was given up before it was complete.")


def _let_go(body: str | _File) -> None:
    """Out of the page cache: it was read to its end, and hardly any is read twice.

    The next one gets the same pages. New ones may have to come from a virtual machine's host first, at 1.2 ms a MiB.
    """
    with suppress(NotFound, OSError):
        file, sealed = _opened(body)
        if sealed:
            os.posix_fadvise(file.file, 0, 0, os.POSIX_FADV_DONTNEED)


def _find(path: str) -> tuple[int, bool] | None:
    """Its size, and whether it is sealed; None: it is not there."""
    for name in _both(path):
        try:
            return os.stat(name).st_size, name == path
        except FileNotFoundError:
            continue
    return None


def _both(path: str) -> tuple[str, ...]:
    """The names it may have. The sealed one twice: it may be sealed between the looks at the one and at the other."""
    return path, path + _GROWING, path


def _stale(directory: Path, before: float, prefix: str) -> list[str]:
    """Names of bodies last written before that time, SWEPT at most."""
    names: list[str] = []
    for shard in range(_SHARDS):
        with os.scandir(directory / f"{shard:02x}") as entries:
            for entry in entries:
                if len(names) == SWEPT:
                    return names
                name = entry.name.removesuffix(_GROWING)
                try:
                    # Not what somebody else may have put there.
                    if name.startswith(prefix) and _NAME.fullmatch(name) and entry.stat().st_mtime < before:
                        names.append(name)
                except FileNotFoundError:  # deleted or sealed meanwhile
                    continue
    return names


def _unfinished(directory: Path, before: float) -> list[str]:
    names: list[str] = []
    for path in directory.glob(f"*{_GROWING}"):
        try:
            if _NAME.fullmatch(path.stem) and path.stat().st_mtime < before:
                names.append(path.stem)
        except FileNotFoundError:  # deleted or sealed meanwhile
            continue
    return names


def _make(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for shard in range(_SHARDS):
        (directory / f"{shard:02x}").mkdir(exist_ok=True, mode=0o700)
    _flush(directory)


def _flush(path: Path | str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _shard(name: str) -> int:
    return zlib.crc32(name.encode()) % _SHARDS
