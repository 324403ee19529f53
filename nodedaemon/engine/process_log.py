"""What a process writes, kept in two files of bounded size."""

import asyncio
import contextlib
from pathlib import Path

#: The newest of two files is begun anew at this size.
FILE_BYTES = 8 * 1024 * 1024
PIECE_BYTES = 64 * 1024
#: Between two pieces: who writes more than some 6 MB/s waits, not the daemon.
PAUSE_S = 0.01


class ProcessLog:
    """The log of one replica: `path`, and before it `path`.1."""

    def __init__(self, path: Path, *, file_bytes: int = FILE_BYTES) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._older = path.with_name(path.name + ".1")
        path.parent.mkdir(parents=True, exist_ok=True)

    async def take(self, stream: asyncio.StreamReader) -> None:
        """Write down all that comes, to the end of the stream."""
        while piece := await stream.read(PIECE_BYTES):
            # A full disk must not stop the process that writes.
            with contextlib.suppress(OSError):
                self._append(piece)
            await asyncio.sleep(PAUSE_S)

    def last(self, lines: int, limit_bytes: int) -> str:
        """The last lines."""
        data = b""
        for path in (self._path, self._older):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - limit_bytes))
                data = file.read() + data
            if len(data) >= limit_bytes:
                break
        return "\n".join(data[-limit_bytes:].decode(errors="replace").splitlines()[-lines:])

    def erase(self) -> None:
        """The replica is gone."""
        self._path.unlink(missing_ok=True)
        self._older.unlink(missing_ok=True)

    def _append(self, piece: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(piece)
            full = file.tell() >= self._file_bytes
        if full:
            self._path.replace(self._older)
