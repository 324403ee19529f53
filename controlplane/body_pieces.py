"""What of bodies is in memory: the last pieces, that their files do not have yet, and those that were just sealed."""

import asyncio
from typing import Final

from ngpu import wire

from controlplane.body_files import File

#: What came behind of a body up to this size, in so many pieces at most, is held in memory for its first reader, who
#: mostly comes at once, ...
HELD_BYTES: Final = 8 * 1024 * 1024
HELD_PIECES: Final = 256
#: ... as long as there is no more of all bodies together.
ALL_HELD_BYTES: Final = 32 * 1024 * 1024


class Memory:
    """What all bodies together hold."""

    used_bytes = 0


class Held:
    """All pieces of a body, from its first byte on; counted as long as somebody has them."""

    __slots__ = ("__weakref__", "_memory", "_pieces", "is_cached", "size")

    def __init__(self, memory: Memory) -> None:
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


class Behind:
    """The last pieces of a growing body: what its file does not have yet, or is just getting.

    `held`: these and all before them.
    """

    def __init__(self, file: File, size: int, held: Held | None) -> None:
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
