"""Which attempts a container has seen: so that a daemon that was killed can say so when it is back.

One line before the first byte of a request goes out, one when the attempt's end is acknowledged or safely on disk.
The lines are written, not synced: what a killed process wrote survives it, and a machine that lost its power took the
containers with it.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

#: Past this, and with most lines settled, the journal is written anew.
REWRITE_BYTES: Final = 1024 * 1024


class Journal:
    """Lines `S attempt` (sent) and `E attempt` (ended) in one file. `interrupted`: what a killed daemon left open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: dict[str, None] = dict.fromkeys(_read(path))
        self.interrupted = tuple(self._open)
        self._ended = b""
        self._fd = -1
        self._bytes = 0
        self._rewrite()

    def begin(self, attempt_id: str) -> None:
        """A container is about to see this attempt. Raises OSError (disk full): then it must not."""
        if attempt_id in self._open:
            return
        if self._bytes > REWRITE_BYTES and len(self._open) * 2 * len(attempt_id) < self._bytes:
            self._rewrite()
        # Ends ride along: one that is lost costs a report that the control plane knows already and ignores.
        lines = b"%sS %s\n" % (self._ended, attempt_id.encode())
        written = os.write(self._fd, lines)
        if written != len(lines):
            raise OSError(28, "the journal could not be written whole")
        self._ended = b""
        self._bytes += written
        self._open[attempt_id] = None

    def end(self, attempt_id: str) -> None:
        """The attempt's end is acknowledged, or safe elsewhere. No error if it never began."""
        if self._open.pop(attempt_id, "") is None:
            self._ended += b"E %s\n" % attempt_id.encode()

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        if self._fd >= 0:
            self._rewrite()
            os.close(self._fd)
            self._fd = -1

    def _rewrite(self) -> None:
        """Only what is open, in a new file in place of the old."""
        new = self._path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        lines = b"".join(b"S %s\n" % attempt_id.encode() for attempt_id in self._open)
        os.write(fd, lines)
        new.replace(self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._bytes, self._ended = fd, len(lines), b""


def _read(path: Path) -> list[str]:
    """Attempts that began and did not end, oldest first. A last line without its end was never acted upon."""
    began: dict[str, None] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            kind, _, attempt_id = line.decode(errors="replace").partition(" ")
            if kind == "S" and attempt_id:
                began[attempt_id] = None
            elif kind == "E":
                began.pop(attempt_id, None)
    return list(began)
