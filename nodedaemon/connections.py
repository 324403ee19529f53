"""The connections to containers that are kept between exchanges, and how new ones are made."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from nodedaemon.connection import IDLE_S, Address, Connection
from nodedaemon.course import PLATFORM, Course, NoAnswer
from nodedaemon.held import Held, Taken

#: To reach a container on this machine.
CONNECT_LIMIT_S: Final = 5.0
#: Unused connections kept per container and port.
IDLE_CONNECTIONS: Final = 256


class Connections:
    """Connections to the containers of this node, by container and address: an address may become another's.

    `held`: has them outlive the daemon.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, held: Held | None = None) -> None:
        self._monotonic = monotonic
        self.held = held
        # The last one used comes first: the others grow old and are closed.
        self._idle: dict[tuple[str, Address], list[Connection]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    def idle(self, container_id: str, address: Address) -> Connection | None:
        """A connection that may be used again, if there is one."""
        kept = self._idle.get((container_id, address))
        while kept:
            connection = kept.pop()
            if connection.fresh():
                return connection
            connection.abort()
        return None

    async def new(self, address: Address) -> Connection:
        """A new connection. Raises NoAnswer."""
        try:
            return await self._connect(address)
        except TimeoutError:
            words = f"it did not answer within {CONNECT_LIMIT_S:g} s"
        except ConnectionRefusedError:
            words = "nothing listens on its port"
        except OSError as fault:
            words = fault.strerror or str(fault)
        raise NoAnswer("CONNECT_FAILED", PLATFORM, f"No connection to the container could be made: {words}.")

    async def _connect(self, address: Address) -> Connection:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        hold = None if self.held is None else self.held.hold(sock)
        return await self._made(Connection(sock, address, self._monotonic, hold), sock)

    async def take_up(self, taken: Taken, address: Address, method: str, course: Course) -> Connection:
        """A connection on which an earlier daemon has sent a request; its answer is awaited."""
        sock = taken.hold.sock
        connection = Connection(sock, address, self._monotonic, taken.hold)
        connection.go_on(method, course, taken)
        return await self._made(connection, sock)

    async def _made(self, connection: Connection, sock: socket.socket) -> Connection:
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, sock=sock)
        except BaseException:
            connection.discard()
            raise
        return connection

    def keep(self, container_id: str, connection: Connection) -> None:
        """The exchange on it is over: keep it for the next, or close it."""
        if not connection.reusable:
            connection.abort()
            return
        kept = self._idle.setdefault((container_id, connection.address), [])
        if len(kept) >= IDLE_CONNECTIONS:
            kept.pop(0).abort()
        connection.rest()
        kept.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_S, self._close_old)

    def close(self) -> None:
        """Close all that are kept."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for kept in self._idle.values():
            for connection in kept:
                connection.abort()
        self._idle.clear()

    def _close_old(self) -> None:
        self._sweep = None
        for key, kept in list(self._idle.items()):
            while kept and not kept[0].young():
                kept.pop(0).abort()
            if not kept:
                del self._idle[key]
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_S, self._close_old)
