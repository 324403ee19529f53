"""Which attempts a container has seen: so that a daemon that was killed can say so when it is back.

One line before the first byte of a request goes out, one when the attempt's end is acknowledged or safely on disk, and
one with whatever it takes to go on with an attempt after a restart (see `jobs`).
The lines are written, not synced: what a killed process wrote survives it, and a machine that lost its power took the
containers with it.
"""

import contextlib
import os
import zlib
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Final

#: Past this, and with most lines settled, the journal is written anew.
REWRITE_BYTES: Final = 1024 * 1024


class Journal:
    """Lines `S attempt` (sent), `N attempt checksum note` and `E attempt` (ended) in one file.

    `interrupted`: what a killed daemon left open. `notes`: what it noted of those, by attempt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open, self.notes = _read(path)
        self.interrupted = tuple(self._open)
        self._ended = b""
        self._fd = -1
        self._bytes = 0
        self._rewrite_at_bytes = 0
        self._rewrite()

    def begin(self, attempt_id: str) -> None:
        """A container is about to see this attempt. Raises OSError (disk full): then it must not."""
        if attempt_id in self._open:
            return
        if self._bytes > self._rewrite_at_bytes:
            self._rewrite()
        # Ends ride along: one that is lost costs a report that the control plane knows already and ignores.
        lines = b"%sS %s\n" % (self._ended, attempt_id.encode())
        written = os.write(self._fd, lines)
        if written != len(lines):
            raise OSError(28, "the journal could not be written whole")
        self._ended = b""
        self._bytes += written
        self._open[attempt_id] = None

    def note(self, attempt_id: str, note: bytes) -> None:
        """What it takes to go on with an attempt that has begun. Raises OSError: it is not kept."""
        self.notes[attempt_id] = note
        line = self._ended + _note_line(attempt_id, note)
        self._ended = b""
        written = os.write(self._fd, line)
        self._bytes += written
        if written != len(line):
            # What follows must not become part of it.
            self._ended = b"\n"
            raise OSError(28, "the journal could not be written whole")

    def end(self, attempt_id: str) -> None:
        """The attempt's end is acknowledged, or safe elsewhere. No error if it never began."""
        if self._open.pop(attempt_id, "") is None:
            self._ended += b"E %s\n" % attempt_id.encode()
            if self.notes.pop(attempt_id, None) is not None:
                # With this one the next daemon would go on.
                self._write_ends()

    def _write_ends(self) -> None:
        """What could not be written is with the next line."""
        with contextlib.suppress(OSError):
            written = os.write(self._fd, self._ended)
            self._bytes += written
            self._ended = b"" if written == len(self._ended) else b"\n" + self._ended

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
        lines += b"".join(_note_line(attempt_id, note) for attempt_id, note in self.notes.items())
        os.write(fd, lines)
        new.replace(self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._bytes, self._ended = fd, len(lines), b""
        self._rewrite_at_bytes = max(REWRITE_BYTES, 2 * len(lines))


def _note_line(attempt_id: str, note: bytes) -> bytes:
    return b"N %s %08x %s\n" % (attempt_id.encode(), zlib.crc32(note), b64encode(note))


def _read(path: Path) -> tuple[dict[str, None], dict[str, bytes]]:
    """Attempts that began and did not end, oldest first, and their notes.

    A last line without its end was never acted upon.
    """
    began: dict[str, None] = {}
    notes: dict[str, bytes] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            kind, _, attempt_id = line.decode(errors="replace").partition(" ")
            if kind == "S" and attempt_id:
                began[attempt_id] = None
            elif kind == "E":
                began.pop(attempt_id, None)
                notes.pop(attempt_id, None)
            elif kind == "N":
                _take_note(notes, attempt_id)
    return began, notes


def _take_note(notes: dict[str, bytes], words: str) -> None:
    """Into `notes`, if it is whole."""
    with contextlib.suppress(ValueError):
        attempt_id, checksum, encoded = words.split(" ")
        note = b64decode(encoded, validate=True)
        if zlib.crc32(note) == int(checksum, 16):
            notes[attempt_id] = note
