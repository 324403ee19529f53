"""What a connection holds of an answer. All that it does with containers: test_relay, test_execute."""

import asyncio
import socket
import tracemalloc
from collections.abc import Iterator

import pytest

from nodedaemon.connection import BUFFER_BYTES, Connection
from nodedaemon.course import Course


class Idle(asyncio.Transport):
    """Sends nothing by itself; says whether it reads."""

    reading = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    ours, other = socket.socketpair()
    with ours, other:
        yield ours


def come(connection: Connection, data: bytes) -> None:
    """As asyncio says it."""
    connection.get_buffer(-1)[: len(data)] = data
    connection.buffer_updated(len(data))


async def test_an_answer_that_comes_byte_by_byte_takes_little_more_than_its_bytes(sock: socket.socket) -> None:
    connection, transport = Connection(sock, ("", 0), lambda: 0.0), Idle()
    connection.connection_made(transport)
    connection.begin("GET", b"GET / HTTP/1.1\r\n\r\n", Course(lambda: None), whole=True)
    come(connection, b"HTTP/1.1 200 OK\r\n\r\n")
    tracemalloc.start()
    try:
        for at in range(BUFFER_BYTES):
            come(connection, bytes([at % 251]))
        held_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert not transport.reading
    assert held_bytes < 2 * BUFFER_BYTES
    assert connection.take() == bytes(at % 251 for at in range(BUFFER_BYTES))
    assert transport.reading
