"""Bodies too large for a row: append-only files, one writer each, any number of readers that follow their growth.

What a body holds is what its file holds: after a restart an unsealed body is gone on with from its length. Blocking file work runs in a
few threads of its own.
"""

from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Self


class Bodies:
    """The body store: a directory.

    Errors of every method: ValueError (a name that is none: a bug of the caller), Unavailable (the disk is full or fails).
    """

    @classmethod
    async def open(cls, directory: Path) -> Self:
        """Open or make the store."""
        raise NotImplementedError

    async def close(self) -> None:
        """Finish what runs; readers that wait for growth get Unavailable."""
        raise NotImplementedError

    async def append(self, name: str, offset: int, data: bytes, *, limit_bytes: int) -> int:
        """Write `data` at `offset`, which must be the body's size; makes the body at offset 0. Gives the new size.

        Wholly there or not at all, also when the caller is cancelled: ask `size` then.
        Raises OutOfRange (the message says the size), TooLarge (it would pass `limit_bytes`), Conflict (it is sealed).
        """
        raise NotImplementedError

    async def size(self, name: str) -> int | None:
        """Its length so far; None: there is no such body."""
        raise NotImplementedError

    async def sealed(self, name: str) -> bool:
        """True once it is complete; False if it grows or is not there."""
        raise NotImplementedError

    async def seal(self, name: str, *, durable: bool = True) -> int:
        """It is complete: readers come to their end. `durable`: returns when it is on disk. Gives its size; again is no error.

        Raises NotFound.
        """
        raise NotImplementedError

    def follow(self, name: str, offset: int = 0) -> AsyncIterator[bytes]:
        """Its bytes from `offset` in chunks of at most wire.CHUNK_BYTES, up to its end, waiting for it to grow as long as it is not sealed.

        Raises NotFound (there is no such body, or it was deleted meanwhile), OutOfRange (`offset` is past what is there).
        """
        raise NotImplementedError

    async def rename(self, name: str, new_name: str) -> None:
        """Give a sealed body another name, durably. No error if that was done before. Raises NotFound, Conflict (not sealed)."""
        raise NotImplementedError

    async def delete(self, *names: str) -> None:
        """No error for those that are not there. Readers get NotFound."""
        raise NotImplementedError

    async def sweep(self, before: datetime, prefix: str = "") -> int:
        """Delete bodies last written before `before` whose name begins with `prefix` (`upload-`: those that no task took). Gives their number."""
        raise NotImplementedError
