"""The files of the body store, and what is done to them in a thread.

A growing body has the suffix `.part`; sealing it takes that away. Errors of every function: OSError (the disk fails).
"""

import errno
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Final, TypeAlias

from ngpu import wire

from controlplane.errors import Conflict, NotFound, OutOfRange, TooLarge

#: Pieces given to the kernel in one call, which takes no more than 1024.
WRITTEN_AT_ONCE: Final = 256
#: Bodies leave so much of their disk free, or RESERVE_SHARE of it if that is less: the database may be there, too.
RESERVE_BYTES: Final = 512 * 1024 * 1024
RESERVE_SHARE: Final = 0.05
#: Sub-directories, so that none has millions of files.
SHARDS: Final = 256
#: Bodies deleted in one step of a sweep.
SWEPT: Final = 1000

_GROWING: Final = ".part"
_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")


def make(root: str) -> None:
    """The store's directories."""
    os.makedirs(root, exist_ok=True, mode=0o700)
    for shard in range(SHARDS):
        os.makedirs(_directory(root, shard), exist_ok=True, mode=0o700)
    _flush(root)


def path_of(root: str, name: str) -> str:
    """Where a body is once it is sealed. Raises ValueError: this is no body's name."""
    if not _NAME.fullmatch(name) or name.endswith(_GROWING):
        raise ValueError(f"not a body's name: {name[:80]!r}")
    return f"{_directory(root, shard_of(name))}/{name}"


def shard_of(name: str) -> int:
    """Which sub-directory it is in, below SHARDS."""
    return zlib.crc32(name.encode()) % SHARDS


class File:
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


def append(path: str, offset: int, pieces: Sequence[bytes], limit_bytes: int) -> tuple[File, int]:
    """Gives the file and its new size."""
    if os.path.exists(path):
        raise Conflict("The body is complete already.")
    check_limit(offset + sum(map(len, pieces)), limit_bytes)
    try:
        # Only the first append makes it: one that comes after a deletion must not bring it back.
        file = File(path + _GROWING, os.O_WRONLY | (os.O_CREAT if offset == 0 else 0))
    except FileNotFoundError:
        raise OutOfRange("The body's stored size is 0: go on from there.") from None
    try:
        return file, extend(path, file, offset, pieces)
    except BaseException:
        file.close()
        raise


def begin(path: str) -> tuple[File | None, int]:
    """The growing file and its size; None for one that is sealed."""
    with suppress(FileNotFoundError):
        return None, os.stat(path).st_size
    file = File(path + _GROWING, os.O_WRONLY | os.O_CREAT)
    return file, file.size


def extend(path: str, file: File, offset: int, pieces: Sequence[bytes]) -> int:
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


def check_limit(size: int, limit_bytes: int) -> None:
    """Raises TooLarge."""
    if size > limit_bytes:
        raise TooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")


def seal(path: str, target: str, file: File | None, *, durable: bool, forget: bool) -> int:
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
Found: TypeAlias = tuple[bytes, int | None, File | None]


def read(body: str | File, offset: int) -> Found:
    """A chunk at most."""
    file, sealed = _opened(body)
    data = os.pread(file.file, min(wire.CHUNK_BYTES, max(0, file.size - offset)), offset)
    return _found(file, offset, data, sealed=sealed)


def read_cached(body: str | File, offset: int, page: bytearray) -> Found:
    """The same, a page at most, into `page` first. Raises OSError if that would have to wait for a disk."""
    file, sealed = _opened(body)
    data = bytes(memoryview(page)[: os.preadv(file.file, [page], offset, os.RWF_NOWAIT)])
    return _found(file, offset, data, sealed=sealed)


def _found(file: File, offset: int, data: bytes, *, sealed: bool) -> Found:
    if not sealed:
        return data, None, None
    if offset > file.size:
        raise OutOfRange(f"The body has {file.size} bytes: there is nothing at {offset}.")
    return data, file.size - offset - len(data), file


def _opened(body: str | File) -> tuple[File, bool]:
    """The body's file as it is now, and whether it is sealed. Raises NotFound."""
    if isinstance(body, File):
        return body, True
    for name in _both(body):
        with suppress(FileNotFoundError):
            return File(name), name == body
    raise NotFound("There is no such body, or it was given up before it was complete.")


def let_go(body: str | File) -> None:
    """Out of the page cache: it was read to its end, and hardly any is read twice.

    The next one gets the same pages. New ones may have to come from a virtual machine's host first, at 1.2 ms a MiB.
    """
    with suppress(NotFound, OSError):
        file, sealed = _opened(body)
        if sealed:
            os.posix_fadvise(file.file, 0, 0, os.POSIX_FADV_DONTNEED)


def find(path: str) -> tuple[int, bool] | None:
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


def remove(path: str) -> None:
    """Growing or sealed. No error if it is not there."""
    for file in (path + _GROWING, path):
        with suppress(FileNotFoundError):
            os.unlink(file)


def stale(root: str, before: float, prefix: str) -> list[str]:
    """Names of bodies last written before that time, SWEPT at most."""
    return list(islice((name for shard in range(SHARDS) for name in _older(root, shard, before, prefix)), SWEPT))


def unfinished(root: str, shard: int, before: float) -> list[str]:
    """In that sub-directory, names of growing bodies last written before that time."""
    return list(_older(root, shard, before, suffix=_GROWING))


def _older(root: str, shard: int, before: float, prefix: str = "", suffix: str = "") -> Iterator[str]:
    """Names of bodies whose files begin and end so; only these are looked at."""
    with os.scandir(_directory(root, shard)) as entries:
        for entry in entries:
            if not (entry.name.startswith(prefix) and entry.name.endswith(suffix)):
                continue
            name = entry.name.removesuffix(_GROWING)
            with suppress(FileNotFoundError):  # deleted or sealed meanwhile
                # Not what somebody else may have put there.
                if _NAME.fullmatch(name) and entry.stat().st_mtime < before:
                    yield name


def _directory(root: str, shard: int) -> str:
    return f"{root}/{shard:02x}"


def _flush(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
