"""The connection keeper: a small program that holds duplicates of the daemon's connections, so that they outlive it.

A connection is open as long as any process has it. This one never reads or writes any of them: it takes them from the
daemon, one message each, lets go of those that are dead, and gives all that it has to the next daemon, together with
the piece of memory in which the last one noted what each was for (see `held`). Whatever is to be decided, the daemon
decides; so there is nothing here that could need an upgrade, and little that could fail.

`python -I -S keeper.py RETURN_LIMIT_S`, in a session of its own, its socket as descriptor LISTENER. It ends when it is
told to, or when no daemon has come back for so long: the kernel then closes what it held.

A message is a packet, its first byte says which. An earlier keeper may meet a later daemon: so these never change, and
who adds one counts VERSION up.

* TAKE, daemon to keeper. Answered by a MEMORY if there is one, a HOLD for each connection, and an END.
* HOLD, both ways: number and serial of a connection, and the connection. It replaces one of the same number.
* MEMORY, both ways: with the descriptor of the memory. It replaces an earlier one.
* END, to the keeper: let go of everything and end. From it: that was all, and VERSION.
"""

import os
import select
import socket
import struct
import sys
from typing import Final

VERSION: Final = 1
TAKE, HOLD, MEMORY, END = b"THME"
#: Kind, number and serial of a connection.
HOLD_MESSAGE: Final = struct.Struct("<BIQ")
MESSAGE_BYTES: Final = 64
LISTENER: Final = 3
_PEER: Final = struct.Struct("iII")


class Keeper:
    """Serves one daemon after the other."""

    def __init__(self, listener: socket.socket, return_limit_s: float) -> None:
        self._listener = listener
        self._return_limit_s = return_limit_s
        self._poll = select.epoll()
        self._memory = -1
        #: By number: serial, descriptor.
        self._held: dict[int, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}

    def run(self) -> None:
        """Until told to end, or left alone for too long."""
        while (daemon := self._next_daemon()) is not None:
            with daemon:
                try:
                    if self._serve(daemon):
                        return
                except OSError:
                    # It was killed while we spoke to it.
                    pass

    def _next_daemon(self) -> socket.socket | None:
        # Connections that die meanwhile are kept.
        while True:
            self._listener.settimeout(self._return_limit_s)
            try:
                daemon, _ = self._listener.accept()
            except TimeoutError:
                return None
            _, user, _ = _PEER.unpack(daemon.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if user == os.geteuid():
                daemon.setblocking(True)
                return daemon
            daemon.close()

    def _serve(self, daemon: socket.socket) -> bool:
        """True: it told us to end. False: it has gone."""
        self._poll.register(daemon, select.EPOLLIN)
        spoken = False
        while True:
            # Before it has taken what there is, what is dead is for it to see.
            ready = [descriptor for descriptor, _ in self._poll.poll()] if spoken else [daemon.fileno()]
            if daemon.fileno() not in ready:
                # Closed in both directions, by the daemon or by a container's reset.
                for descriptor in ready:
                    self._let_go(self._numbers[descriptor])
                continue
            # First: if it is gone, then what is dead is for the next one to see.
            message, descriptors, _, _ = socket.recv_fds(daemon, MESSAGE_BYTES, 1)
            if not message:
                return False
            if message[0] == END:
                return True
            spoken = True
            self._hear(daemon, message, descriptors)

    def _hear(self, daemon: socket.socket, message: bytes, descriptors: list[int]) -> None:
        if message[0] == TAKE:
            self._give(daemon)
        elif message[0] == HOLD and descriptors:
            _, number, serial = HOLD_MESSAGE.unpack(message)
            self._let_go(number)
            self._held[number] = (serial, descriptors[0])
            self._numbers[descriptors[0]] = number
            # Asked for nothing, it tells of dead connections alone.
            self._poll.register(descriptors[0], 0)
        elif message[0] == MEMORY and descriptors:
            if self._memory >= 0:
                os.close(self._memory)
            self._memory = descriptors[0]

    def _give(self, daemon: socket.socket) -> None:
        if self._memory >= 0:
            socket.send_fds(daemon, [bytes([MEMORY])], [self._memory])
        for number, (serial, descriptor) in self._held.items():
            socket.send_fds(daemon, [HOLD_MESSAGE.pack(HOLD, number, serial)], [descriptor])
        daemon.send(bytes([END, VERSION]))

    def _let_go(self, number: int) -> None:
        _, descriptor = self._held.pop(number, (0, -1))
        if descriptor >= 0:
            del self._numbers[descriptor]
            self._poll.unregister(descriptor)
            os.close(descriptor)


def main() -> None:
    """The program."""
    # A descriptor of the daemon's that came along would outlive it.
    os.closerange(LISTENER + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    with socket.socket(fileno=LISTENER) as listener:
        Keeper(listener, float(sys.argv[1])).run()


if __name__ == "__main__":
    main()
