"""What was done and is not yet acknowledged: results, and bodies too large to ride inside them.

A result lives in memory while its acknowledgement is awaited, which takes milliseconds; one that has waited longer than
SETTLE_S, or that is there when the daemon stops, is written to a file of its own and survives the daemon. Bodies are
append-only files from their first byte. The directory holds `<attempt>.result` and `<attempt>.body`; a body without a
result is of an attempt that a killed daemon left (see `journal`) and is deleted.

Nothing here is unbounded. Bodies and result files together take at most `limit_bytes` of disk; past that the writer of a
body waits, and so its container does. One exception keeps a full spool from standing still for ever: the oldest body may
always grow, so it is the limit and one body at most. Results in memory take at most MEMORY_BYTES; `full` then says that
no further attempt may start here.
"""

import asyncio
import contextlib
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

import structlog

from ngpu import wire
from ngpu.v1 import node_pb2

log = structlog.get_logger()

#: A result that has waited this long for its acknowledgement goes to disk.
SETTLE_S: Final = 1.0
#: Results in memory; past it no further attempt may start.
MEMORY_BYTES: Final = 64 * 1024 * 1024
#: A write or read of this size or less is done in the event loop: the page cache takes it faster than a thread is woken.
IN_LOOP_BYTES: Final = 16 * 1024
_MAGIC: Final = b"NGPU1"


class Body:
    """A response body on disk: one writer, one reader that follows it."""

    def __init__(self, spool: "Spool", path: Path, size: int, *, ended: bool) -> None:
        self._spool = spool
        self._path = path
        self._fd = -1
        self._grown: asyncio.Future[None] | None = None
        self.size = size
        self.ended = ended
        self.dropped = False

    async def write(self, data: bytes) -> None:
        """Append; waits while the spool is full. Raises OSError (disk full, say)."""
        await self._spool.room_for(self, len(data))
        fd = self._open()
        if len(data) <= IN_LOOP_BYTES:
            _write_all(fd, data)
        else:
            await asyncio.to_thread(_write_all, fd, data)
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
        fd = self._open()
        if wanted <= IN_LOOP_BYTES:
            return os.pread(fd, wanted, offset)
        return await asyncio.to_thread(os.pread, fd, wanted, offset)

    def rest(self) -> None:
        """Let go of the file until the next read: many bodies may wait for a control plane that is gone."""
        if self._fd >= 0 and self.ended:
            os.close(self._fd)
            self._fd = -1

    def drop(self) -> None:
        """Delete it. Reader and writer have ended or are being cancelled."""
        if self.dropped:
            return
        self.dropped = self.ended = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._path.unlink(missing_ok=True)
        self._tell()
        self._spool.body_dropped(self)

    def _open(self) -> int:
        if self.dropped:
            raise FileNotFoundError(f"{self._path.name} was given up")
        if self._fd < 0:
            flags = os.O_RDWR | os.O_APPEND | (0 if self.ended or self.size else os.O_CREAT | os.O_TRUNC)
            self._fd = os.open(self._path, flags | os.O_CLOEXEC, 0o600)
        return self._fd

    def _tell(self) -> None:
        if self._grown is not None and not self._grown.done():
            self._grown.set_result(None)
