"""How a daemon comes to its keeper: starts one, connects, takes what it has, ends it."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nodedaemon import keeper
from nodedaemon.keeper import END, HOLD, HOLD_MESSAGE, MEMORY, MESSAGE_BYTES, TAKE

#: A keeper that does not answer within this time is left alone.
TAKE_LIMIT_S: Final = 2.0
#: For a keeper to be told to end.
END_LIMIT_S: Final = 1.0


class Found:
    """What a keeper gives."""

    def __init__(self) -> None:
        self.memory_fd = -1
        #: Number, serial, connection.
        self.socks: list[tuple[int, int, socket.socket]] = []

    def take(self, link: socket.socket) -> int:
        """Take it all; the keeper has it, too. Gives the keeper's version. Raises OSError: there may be more."""
        link.settimeout(TAKE_LIMIT_S)
        link.send(bytes([TAKE]))
        while True:
            message, descriptors, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                raise ConnectionResetError("it has ended")
            if message[0] == END:
                return message[1]
            if message[0] == MEMORY and descriptors:
                self.memory_fd = descriptors[0]
            elif message[0] == HOLD and descriptors:
                _, number, serial = HOLD_MESSAGE.unpack(message)
                sock = socket.socket(fileno=descriptors[0])
                sock.setblocking(False)
                self.socks.append((number, serial, sock))


def start(directory: Path, return_limit_s: float) -> int:
    """Start one in a session of its own, in place of one that is no more or is replaced; its process id.

    Raises OSError. It can be connected to at once.
    """
    argv = [sys.executable, "-I", "-S", keeper.__file__, str(return_limit_s)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        (directory / "keeper").unlink(missing_ok=True)
        with _address(directory) as address:
            listener.bind(address)
        listener.listen()
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
            (os.POSIX_SPAWN_DUP2, listener.fileno(), keeper.LISTENER),
        ]
        # Not by `subprocess`, which wants to see its children end. No environment: there may be secrets in it.
        return os.posix_spawn(sys.executable, argv, {}, file_actions=actions, setsid=True)


def connect(directory: Path) -> socket.socket:
    """To the keeper of that directory. Raises FileNotFoundError or ConnectionRefusedError: there is none; OSError."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.settimeout(TAKE_LIMIT_S)
        with _address(directory) as address:
            link.connect(address)
    except BaseException:
        link.close()
        raise
    return link


def end(link: socket.socket) -> None:
    """Tell a keeper to end, and close."""
    with contextlib.suppress(OSError), link:
        link.settimeout(END_LIMIT_S)
        link.send(bytes([END]))


@contextlib.contextmanager
def _address(directory: Path) -> Iterator[str]:
    """Of the keeper's socket: the path of one must be short, and the directory's need not be."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/keeper"
    finally:
        os.close(descriptor)
