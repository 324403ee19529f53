"""Bodies too large for a row: append-only files, one writer each, any number of readers that follow their growth.

What a body holds is what its file holds: nothing is kept in memory, so that after a restart an unsealed body is gone on
with from its length. A growing body has the suffix `.part`; sealing it takes that away. File work runs in a few threads
of its own; waiting for growth does not poll: an append wakes those who follow.
"""

import asyncio
import errno
import os
import re
import threading
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, ParamSpec, Self, TypeVar

import structlog
from ngpu import wire

from controlplane.errors import Conflict, NotFound, OutOfRange, TooLarge, Unavailable

#: Threads for file work.
THREADS: Final = 4
#: What a reader takes from a file at once, to be given on in chunks: a hop to a thread costs as much as 256 KiB.
READ_BYTES: Final = 4 * wire.CHUNK_BYTES
#: Bodies deleted in one step of a sweep.
SWEPT: Final = 1000

#: Sub-directories, so that none has millions of files.
_SHARDS: Final = 256
_GROWING: Final = ".part"
_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")

log = structlog.get_logger(__name__)

Arguments = ParamSpec("Arguments")
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
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bodies")
        # Appends to one body happen one after the other, also when an abandoned one is still under way in its thread.
        self._locks = [threading.Lock() for _ in range(_SHARDS)]
        # By name, those who wait for growth.
        self._followers: dict[str, set[asyncio.Future[None]]] = {}
        self._closed = False

    async def close(self) -> None:
        """Finish what runs; followers that wait for growth get Unavailable."""
        self._closed = True
        for name in list(self._followers):
            self._wake(name)
        await asyncio.to_thread(self._threads.shutdown)

    @property
    def followers(self) -> int:
        """Readers that wait for growth, or are about to."""
        return sum(map(len, self._followers.values()))

    async def append(self, name: str, offset: int, data: bytes, *, limit_bytes: int) -> int:
        """Write `data` at `offset`, which must be the body's size; makes the body at offset 0. Gives the new size.

        Wholly there or not at all, also when the caller is cancelled: ask `size` then.
        Raises OutOfRange (the message says the size), TooLarge (it would pass `limit_bytes`), Conflict (it is sealed).
        """
        path = self._path(name)

        def append() -> int:
            with self._locks[_shard(name)]:
                size = _append(path, offset, data, limit_bytes)
            self._grown(name)
            return size

        return await self._run(append)

    async def size(self, name: str) -> int | None:
        """Its length so far; None: there is no such body."""
        found = await self._run(_find, self._path(name))
        return None if found is None else found[0]

    async def sealed(self, name: str) -> bool:
        """True once it is complete; False while it grows, or if it is not there."""
        found = await self._run(_find, self._path(name))
        return found is not None and found[1]

    async def seal(self, name: str, *, durable: bool = True) -> int:
        """It is complete: followers come to its end. Gives its size. Again is no error.

        `durable`: returns when it is on disk, else when it is with the kernel. Raises NotFound.
        """
        path = self._path(name)

        def seal() -> int:
            with self._locks[_shard(name)]:
                size = _seal(path, durable=durable)
            self._grown(name)
            return size

        return await self._run(seal)

    async def follow(self, name: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """Its bytes from `offset` to its end, in chunks of at most wire.CHUNK_BYTES; waits for growth till sealed.

        Raises NotFound (there is no such body, or it was deleted meanwhile), OutOfRange (`offset` is past its size).
        """
        path = self._path(name)
        while True:
            # Before the read, so that no growth after it is missed.
            with self._following(name) as growth:
                data, complete = await self._run(_read, path, offset)
                if not data and not complete:
                    await growth
                    continue
            for at in range(0, len(data), wire.CHUNK_BYTES):
                yield data[at : at + wire.CHUNK_BYTES]
            offset += len(data)
            if complete:
                return

    async def rename(self, name: str, new_name: str) -> None:
        """Give a sealed body another name, durably. No error if that was done before.

        Raises NotFound, Conflict (it is not sealed).
        """
        path, new_path = self._path(name), self._path(new_name)

        def rename() -> None:
            _rename(path, new_path)
            # Who follows under the old name finds it gone.
            self._grown(name)

        await self._run(rename)

    async def delete(self, *names: str) -> None:
        """No error for those that are not there. Followers get NotFound."""
        paths = [self._path(name) for name in names]

        def delete() -> None:
            for name, path in zip(names, paths, strict=True):
                with self._locks[_shard(name)]:
                    _growing(path).unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
                self._grown(name)

        await self._run(delete)

    async def sweep(self, before: datetime, prefix: str = "") -> int:
        """Delete bodies last written before `before` whose name begins with `prefix`; gives how many.

        With `upload-` those that no task took; without, what a crash may have left behind.
        """
        count = 0
        while names := await self._run(_stale, self._directory, before.timestamp(), prefix):
            await self.delete(*names)
            count += len(names)
        return count

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.endswith(_GROWING):
            raise ValueError(f"not a body's name: {name[:80]!r}")
        return self._directory / f"{_shard(name):02x}" / name

    async def _run(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        if self._closed:
            raise Unavailable("The control plane is stopping.", retry_after_s=1.0)
        try:
            return await self._loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
        except OSError as error:
            log.warning("bodies_disk_failed", work=work.__name__, error=error.strerror)
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

    def _grown(self, name: str) -> None:
        """In a thread: the body has changed. Said from there, so that it is said even if the caller has gone away."""
        self._loop.call_soon_threadsafe(self._wake, name)

    def _wake(self, name: str) -> None:
        for growth in self._followers.get(name, ()):
            if not growth.done():
                growth.set_result(None)


# What is done to files, in a thread.


def _append(path: Path, offset: int, data: bytes, limit_bytes: int) -> int:
    if path.exists():
        raise Conflict("The body is complete already.")
    if offset + len(data) > limit_bytes:
        raise TooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")
    # Only the first append makes it: one that comes after a deletion must not bring it back.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if offset == 0 else 0)
    try:
        file = os.open(_growing(path), flags, 0o600)
    except FileNotFoundError:
        raise OutOfRange("The body's stored size is 0: go on from there.") from None
    try:
        size = os.fstat(file).st_size
        if size != offset:
            raise OutOfRange(f"The body's stored size is {size}: go on from there.")
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
        except BaseException:
            os.ftruncate(file, size)
            raise
        return size + len(data)
    finally:
        os.close(file)


def _seal(path: Path, *, durable: bool) -> int:
    growing = _growing(path)
    found = _find(path)
    if found is None:
        raise NotFound
    size, sealed = found
    if durable:
        # Also one that was sealed before, perhaps not durably.
        _flush(path if sealed else growing)
    if not sealed:
        growing.rename(path)
    if durable:
        _flush(path.parent)
    return size


def _rename(path: Path, new_path: Path) -> None:
    try:
        path.rename(new_path)
    except FileNotFoundError:
        if _growing(path).exists():
            raise Conflict("The body is not complete yet.") from None
        if not new_path.exists():
            raise NotFound from None
    # The new name first: between the two a crash may leave both, never none.
    _flush(new_path.parent)
    _flush(path.parent)


def _read(path: Path, offset: int) -> tuple[bytes, bool]:
    """The next bytes, and whether the body ends with them."""
    for name in _both(path):
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            size = os.fstat(file).st_size
            if offset > size:
                raise OutOfRange(f"The body's stored size is {size}: there is nothing at {offset} yet.")
            data = os.pread(file, min(READ_BYTES, size - offset), offset)
            return data, name == path and offset + len(data) >= size
        finally:
            os.close(file)
    raise NotFound("There is no such body, or it was given up before it was complete.")


def _find(path: Path) -> tuple[int, bool] | None:
    """Its size, and whether it is sealed; None: it is not there."""
    for name in _both(path):
        try:
            return name.stat().st_size, name == path
        except FileNotFoundError:
            continue
    return None


def _both(path: Path) -> tuple[Path, ...]:
    """The names it may have. The sealed one twice: it may be sealed between the looks at the one and at the other."""
    return path, _growing(path), path


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


def _make(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for shard in range(_SHARDS):
        (directory / f"{shard:02x}").mkdir(exist_ok=True, mode=0o700)
    _flush(directory)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _growing(path: Path) -> Path:
    return path.with_name(path.name + _GROWING)


def _shard(name: str) -> int:
    return zlib.crc32(name.encode()) % _SHARDS
