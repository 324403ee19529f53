"""Connections that outlive the daemon: a keeper process holds them, and a piece of memory says what each is for.

So a daemon that is killed while a container works costs no second execution: the next one takes the connections back
and goes on waiting for the answers. It goes on with those alone whose request was sent whole and of whose answer
nothing was read. That is judged by the kernel's own counts of the connection's bytes, sent and received, against the
note that was written before the request and says what they will be (see `errand`):

    killed                                           note               sent    received  the next daemon
    before the attempt is in the journal             an earlier one's   same    more      knows nothing: not begun
    before the note is begun                         an earlier one's   same    more      reports it lost
    while the note is written                        not valid                            reports it lost
    before all of the request is sent                valid              less    same      reports it lost
    sent whole, nothing read                         valid              same    same      goes on
    a byte of the answer was read                    valid              same    more      reports it lost
    the answer is complete, its result in memory     valid              same    more      reports it lost
    its result is on disk                            valid              same    more      gives the result
    a question about a job is sent on it             an earlier one's   more    more      follows the job (`jobs`)
    ended by us, before the note is made invalid     valid              same    same      goes on, and is told to end it
    ended by us, before or after it is shut          not valid                            reports it lost
    the keeper has not got the connection yet        valid              none    none      reports it lost
    ... but an older one of the same number          another serial                       reports it lost

"Reports it lost" is what became of all of them before there was a keeper, and still does where it cannot be had. A
connection that cannot be gone on with is shut: the container sees that its caller has gone.

The memory is no file: it lives and dies with the keeper, as the connections do. What would survive the machine would be
of no use, for the containers do not.
"""

import asyncio
import contextlib
import errno
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from nodedaemon.engine import Address
from nodedaemon.errand import ERRAND_BYTES, Errand, counts, unpack
from nodedaemon.keeper import HOLD, HOLD_MESSAGE, MEMORY, MESSAGE_BYTES, VERSION
from nodedaemon.keeper_link import Found, connect, end, start

log = structlog.get_logger()

#: Connections that are held; more of them are open, but would not survive.
CONNECTIONS: Final = 10_000
#: A keeper that no daemon comes back to ends after this long: by then the control plane has given up what ran here.
RETURN_LIMIT_S: Final = 300.0
#: From the loss of a keeper to the next one.
RESTART_S: Final = 10.0

_LINK_LOST: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
#: After the byte that says whether the note is valid: serial, sent, received, begun_at, length of the errand.
_HEAD: Final = struct.Struct("<7xQQQdH")
_ERRAND_AT: Final = 1 + _HEAD.size
#: Of one connection's note.
NOTE_BYTES: Final = _ERRAND_AT + ERRAND_BYTES
#: At the beginning of the memory, so that a daemon reads no notes that it does not understand.
_LAYOUT: Final = b"NGPU errands 1".ljust(NOTE_BYTES, b"\0")


class Hold:
    """A connection that is held. `begins_at`: the kernel's count of bytes sent on it when it was new."""

    __slots__ = ("_at", "_held", "begins_at", "left", "number", "serial", "sock")

    def __init__(self, held: "Held", sock: socket.socket, number: int, serial: int, begins_at: int = 0) -> None:
        self._held = held
        self._at = _offset(number)
        self.sock = sock
        self.number = number
        self.serial = serial
        self.begins_at = begins_at
        #: To the next daemon.
        self.left = False

    def note(self, errand: bytes, *, sent: int, received: int, now: float) -> None:
        """Its next request is this errand's; sent whole, and with nothing read, the kernel's counts will be these."""
        memory, at = self._held.memory, self._at
        size = len(errand)
        memory[at] = 0
        _HEAD.pack_into(memory, at + 1, self.serial, sent, received, now, size)
        memory[at + _ERRAND_AT : at + _ERRAND_AT + size] = errand
        memory[at] = 1

    def leave(self) -> bool:
        """Leave it to the next daemon: `let_go` does nothing any more. False: the keeper does not have it."""
        self.left = self._held.is_kept(self)
        return self.left

    def discard(self) -> None:
        """Nobody goes on with it: let go, and close."""
        self.let_go()
        self.sock.close()

    def let_go(self) -> None:
        """The connection is over, and nobody is to go on with it: shut it. Before it is closed, which is not enough."""
        if not self.left:
            self._held.let_go(self)


@dataclass(frozen=True, slots=True)
class Taken:
    """A connection on which an earlier daemon waited for an answer. `begun_at`: when it began to send the request."""

    hold: Hold
    errand: Errand
    begun_at: float
    #: The counts as they are.
    sent: int
    received: int

    @property
    def address(self) -> Address:
        """Of the container; nobody's, if it has broken the connection off."""
        try:
            host, port = self.hold.sock.getpeername()[:2]
        except OSError:
            return "", 0
        return host, port


class Held:
    """The connections of one state directory, whose owner has it to himself. To be made within the event loop.

    `taken`: what an earlier daemon left, each to be gone on with or let go.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        limit: int = CONNECTIONS,
        return_limit_s: float = RETURN_LIMIT_S,
        restart_s: float = RESTART_S,
    ) -> None:
        self._directory = state_dir
        self._limit = limit
        self._return_limit_s = return_limit_s
        self._restart_s = restart_s
        self._loop = asyncio.get_running_loop()
        self._holds: dict[int, Hold] = {}
        # Low numbers first, and the last one used before all: so that little of the memory is ever touched.
        self._free = list(range(limit, 0, -1))
        self._serial = 0
        # Those that the keeper has not got yet, oldest first.
        self._unsent: dict[int, Hold] = {}
        self._link: socket.socket | None = None
        self._writing = False
        self._child = 0
        self._restart: asyncio.TimerHandle | None = None
        self._memory_fd = -1
        self.memory: mmap.mmap
        self.taken: list[Taken] = []
        self._take_up()

    # Connections.

    def hold(self, sock: socket.socket) -> Hold | None:
        """Have a connection held on which nothing has been sent yet. None: it cannot be. Does not wait."""
        now = counts(sock)
        if now is None or not self._free:
            return None
        self._serial += 1
        hold = Hold(self, sock, self._free.pop(), self._serial, now.sent)
        self.memory[_offset(hold.number)] = 0
        self._holds[hold.number] = self._unsent[hold.number] = hold
        if self._link is not None:
            self._send()
        elif self._restart is None:
            self._start()
        return hold

    def is_kept(self, hold: Hold) -> bool:
        """Does the keeper have it?"""
        return self._link is not None and self._holds.get(hold.number) is hold and hold.number not in self._unsent

    def let_go(self, hold: Hold) -> None:
        """See Hold."""
        if self._holds.get(hold.number) is hold:
            del self._holds[hold.number]
            self._unsent.pop(hold.number, None)
            self.memory[_offset(hold.number)] = 0
            _shut(hold.sock)
            self._free.append(hold.number)

    def close(self) -> None:
        """The daemon ends. So does the keeper, unless something was left to the next daemon."""
        if self._restart is not None:
            self._restart.cancel()
        if self._link is not None:
            link = self._let_go_of_link()
            if any(hold.left for hold in self._holds.values()):
                link.close()
            else:
                end(link)
        self.memory.close()
        os.close(self._memory_fd)

    # The keeper.

    def _take_up(self) -> None:
        """What the keeper has, if there is one."""
        link, found, version = None, Found(), 0
        try:
            link = connect(self._directory)
            version = found.take(link)
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        except OSError as fault:
            log.warning("keeper_silent", reason=str(fault) or type(fault).__name__)
        known = self._map(found.memory_fd)
        for number, serial, sock in found.socks:
            hold = Hold(self, sock, number, serial)
            taken = self._judge(hold) if known else None
            if taken is None:
                _shut(sock)
                sock.close()
            else:
                self._holds[number] = hold
                self.taken.append(taken)
            self._serial = max(self._serial, serial)
        self._free = [number for number in self._free if number not in self._holds]
        if found.socks:
            log.info("connections_taken_up", found=len(found.socks), under_way=len(self.taken))
        if link is not None and version == VERSION:
            self._adopt(link, new=not known)
        elif link is not None:
            # Another version's, or one that does not answer. It lets go when there is one that has them, too.
            self._start()
            end(link)

    def _map(self, memory_fd: int) -> bool:
        """Set up the memory. True: it is an earlier daemon's, with notes that can be read."""
        size = (1 + self._limit) * NOTE_BYTES
        if memory_fd >= 0:
            if os.fstat(memory_fd).st_size == size:
                self._memory_fd, self.memory = memory_fd, mmap.mmap(memory_fd, size)
                if self.memory[:NOTE_BYTES] == _LAYOUT:
                    return True
                self.memory.close()
            os.close(memory_fd)
        self._memory_fd = os.memfd_create("ngpu-errands")
        os.ftruncate(self._memory_fd, size)
        self.memory = mmap.mmap(self._memory_fd, size)
        self.memory[:NOTE_BYTES] = _LAYOUT
        return False

    def _judge(self, hold: Hold) -> Taken | None:
        """Can one go on with what is under way on it? See the table above."""
        at = _offset(hold.number)
        if not 0 < hold.number <= self._limit or not self.memory[at]:
            return None
        serial, sent, received, begun_at, size = _HEAD.unpack_from(self.memory, at + 1)
        if serial != hold.serial or counts(hold.sock) != (sent, received):
            return None
        errand = unpack(self.memory[at + _ERRAND_AT : at + _ERRAND_AT + size])
        return None if errand is None else Taken(hold, errand, begun_at, sent, received)

    def _start(self) -> None:
        """Start a keeper, and give it all that it is to hold."""
        self._restart = None
        self._reap()
        try:
            self._child = start(self._directory, self._return_limit_s)
            link = connect(self._directory)
        except (OSError, NotImplementedError) as fault:
            log.warning("keeper_not_started", reason=str(fault), next_try_in_s=self._restart_s)
            self._restart = self._loop.call_later(self._restart_s, self._start_again)
            return
        self._adopt(link, new=True)

    def _start_again(self) -> None:
        self._restart = None
        if self._holds:
            self._start()

    def _adopt(self, link: socket.socket, *, new: bool) -> None:
        """Speak to the keeper over this one. `new`: it has nothing yet."""
        link.setblocking(False)
        self._link = link
        self._loop.add_reader(link, self._heard)
        if new:
            self._unsent = dict(self._holds)
            try:
                socket.send_fds(link, [bytes([MEMORY])], [self._memory_fd])
            except OSError:
                self._lost()
                return
            self._send()

    def _send(self) -> None:
        """Give the keeper what it has not got; what it cannot take now later."""
        assert self._link is not None
        while self._unsent:
            number, hold = next(iter(self._unsent.items()))
            try:
                socket.send_fds(self._link, [HOLD_MESSAGE.pack(HOLD, number, hold.serial)], [hold.sock.fileno()])
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._link, self._send)
                return
            except OSError as fault:
                if fault.errno in _LINK_LOST:
                    self._lost()
                    return
                # Too many descriptors under way, say: this one will not outlive the daemon.
                log.debug("connection_not_held", reason=fault.strerror)
            del self._unsent[number]
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._link)

    def _heard(self) -> None:
        """A keeper says nothing unless it is asked: it has ended."""
        assert self._link is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):
            if self._link.recv(MESSAGE_BYTES):
                return
        self._lost()

    def _lost(self) -> None:
        log.warning("keeper_lost", connections=len(self._holds), next_in_s=self._restart_s)
        self._let_go_of_link().close()
        self._reap()
        self._restart = self._loop.call_later(self._restart_s, self._start_again)

    def _reap(self) -> None:
        """A keeper of ours that has ended."""
        if self._child:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._child, os.WNOHANG)[0] == 0:
                    return
            self._child = 0

    def _let_go_of_link(self) -> socket.socket:
        assert self._link is not None
        link, self._link = self._link, None
        self._loop.remove_reader(link)
        self._loop.remove_writer(link)
        self._writing = False
        self._unsent = dict(self._holds)
        return link


def _offset(number: int) -> int:
    # Before the first one lies what the layout is.
    return number * NOTE_BYTES


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
