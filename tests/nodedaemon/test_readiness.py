"""One look at a port, against small real servers."""

import asyncio
import contextlib
import socket

import pytest

from nodedaemon import readiness
from nodedaemon.engine import Readiness
from nodedaemon.readiness import probe


async def look(answer: bytes | None, path: str = "", *, close: bool = True) -> str:
    """Probe a server that reads once, answers that (None: nothing), and closes or waits."""
    asked: list[bytes] = []
    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if path:
            asked.append(await reader.read(1000))
        if answer:
            writer.write(answer)
        if not close:
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        served.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        words = await probe(Readiness(8080, path), server.sockets[0].getsockname())
        await served.wait()
    if path:
        assert asked[0].startswith(b"GET ")
    return words


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", ""),
        (b"HTTP/1.1 204\r\n\r\n", ""),
        (b"HTTP/1.1 500 Oh\r\n\r\n", "GET /ok on port 8080 is answered with status 500"),
        (b"HTTP/1.1 503 Wait\r\n\r\n", "GET /ok on port 8080 is answered with status 503"),
        (b"SSH-2.0-OpenSSH\r\n", "GET /ok on port 8080 is not answered in HTTP"),
        (b"x" * 100_000, "GET /ok on port 8080 is not answered in HTTP"),
        (b"\x00\n", "GET /ok on port 8080 is not answered in HTTP"),
        (None, "GET /ok on port 8080 is not answered in HTTP"),
    ],
)
async def test_http(answer: bytes | None, words: str) -> None:
    assert await look(answer, "/ok") == words


async def test_an_open_port_is_ready() -> None:
    assert await look(None, close=False) == ""
    assert await look(b"220 hello\r\n") == ""


async def test_a_port_that_closes_at_once_is_not() -> None:
    assert await look(None) == "port 8080 closes at once"


async def test_a_closed_port_is_not() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert await probe(Readiness(8080), free.getsockname()) == "port 8080: connection refused"


async def test_one_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LOOK_S", 0.1)
    assert await look(None, "/ok", close=False) == "port 8080 does not answer within 0 s"


async def test_a_path_cannot_smuggle_a_request() -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(1000))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        await probe(Readiness(8080, "/a b\r\nX: y?q=1&r=%20"), server.sockets[0].getsockname())
    assert asked[0].startswith(b"GET /a%20b%0D%0AX:%20y?q=1&r=%20 HTTP/1.1\r\n")
