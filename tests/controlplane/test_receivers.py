"""Receivers are strangers: what they may do to us, and where a post may go, over real sockets."""

import asyncio
import ipaddress
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from controlplane import receivers
from controlplane.destinations import Rules
from controlplane.receivers import ANSWER_BYTES, NOT_PUBLIC, PIECE_BYTES, HttpReceivers

HERE = Rules(http=True, networks=(ipaddress.ip_network("127.0.0.0/8"),))
LIMIT_S = 4.0

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def posting(rules: Rules = HERE) -> AsyncIterator[HttpReceivers]:
    made = HttpReceivers(rules, time_limit_s=LIMIT_S, concurrency=4, clock=lambda: datetime.now(UTC))
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def listening(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server on this machine; gives its port."""
    talks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        talks.add(task)
        try:
            await talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


def says(text: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text)
        await writer.drain()

    return talk


def floods(begin: bytes, piece: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begin)
        while True:
            writer.write(piece)
            await writer.drain()

    return talk


async def test_what_is_sent() -> None:
    got: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        got.append(await reader.readexactly(2))
        writer.write(b"HTTP/1.1 202 Accepted\r\nRetry-After: 7\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")

    async with posting() as post, listening(talk) as port:
        for _ in range(2):
            # The URL as it was given, escapes and all.
            answer = await post.post(f"http://127.0.0.1:{port}/a%7Eb?c=%2Fd&e=%20", b"{}", {"webhook-id": "msg_t"})
            assert (answer.status, answer.error, answer.retry_after_s) == (202, "", 7.0)
    lines = got[0].decode().split("\r\n")
    assert lines[0] == "POST /a%7Eb?c=%2Fd&e=%20 HTTP/1.1"
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    assert fields["host"] == f"127.0.0.1:{port}"
    assert (fields["content-type"], fields["content-length"], got[1]) == ("application/json", "2", b"{}")
    assert (fields["user-agent"], fields["webhook-id"]) == ("NGPU-Webhooks/1", "msg_t")
    # Nothing is taken along from one post to the next.
    assert b"cookie" not in got[2].lower()


@pytest.mark.parametrize(
    ("begin", "piece", "status"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000, 0),
        (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 65_536, 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"y" * 65_536, 200),
        (b"", b"garbage" * 1000, 0),
    ],
    ids=["interim", "fields", "line", "body", "garbage"],
)
async def test_endless_answer_is_soon_over(begin: bytes, piece: bytes, status: int) -> None:
    late: list[float] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(0.001)
            late.append(loop.time() - began)

    async with posting() as post, listening(floods(begin, piece)) as port:
        watching = asyncio.create_task(watch())
        answer = await post.post(f"http://127.0.0.1:{port}/", b"{}", {})
        watching.cancel()
    assert answer.status == status
    assert bool(answer.error) is not bool(status)
    # Not by the time limit, and everybody else's business goes on meanwhile.
    assert "No answer came" not in answer.error
    assert max(late, default=0.0) < LIMIT_S


async def test_no_more_is_taken_in_than_is_said() -> None:
    ours, theirs = socket.socketpair()
    taken = receivers._Socket(fileno=ours.detach())
    theirs.setblocking(False)
    taken.setblocking(False)
    got, buffer = 0, bytearray(ANSWER_BYTES)
    with taken, theirs:
        while got < ANSWER_BYTES:
            theirs.send(bytes(50_000))
            piece = taken.recv_into(buffer) if got else len(taken.recv(50_000))
            assert 0 < piece <= PIECE_BYTES
            got += piece
        assert got == ANSWER_BYTES
        for take in (lambda: taken.recv(1), lambda: taken.recv_into(buffer)):
            with pytest.raises(ConnectionAbortedError):
                take()


async def test_receiver_that_says_nothing() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with posting() as post, listening(silent) as port:
        answer = await post.post(f"http://127.0.0.1:{port}/", b"{}", {})
    assert (answer.status, answer.error) == (0, "No answer came within 4 s.")
    assert answer.duration_s >= LIMIT_S


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    asked = 0

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await says(b"HTTP/1.1 %d See\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n" % status)(reader, writer)

    async with posting() as post, listening(redirect) as port:
        assert (await post.post(f"http://127.0.0.1:{port}/", b"{}", {})).status == status
    assert asked == 1


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
async def test_nothing_inside_is_connected_to(host: str) -> None:
    connected = False

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected = True

    async with posting(Rules(http=True)) as post, listening(talk) as port:
        answer = await post.post(f"http://{host}:{port}/", b"{}", {})
    assert (answer.status, connected) == (0, False)
    assert "public" in answer.error


async def test_address_is_judged_at_every_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that gives a good address first and another then, or both at once, gains nothing."""
    connected: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer.get_extra_info("sockname")[0])
        await says(b"HTTP/1.1 204 No Content\r\n\r\n")(reader, writer)

    given = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2", "127.0.0.1"], ["::1", "fe80::1", "10.0.0.1"], []]

    def addresses(_host: str, port: int, _family: int) -> list[Any]:
        if not (found := given.pop(0)):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (one, port))
            for one in found
        ]

    monkeypatch.setattr(receivers, "_addresses", addresses)
    only = Rules(http=True, networks=(ipaddress.ip_network("127.0.0.1/32"),))
    async with posting(only) as post, listening(talk) as port:
        answers = [await post.post(f"http://example.com:{port}/", b"{}", {}) for _ in range(5)]
    # A name that leads inside and one that leads nowhere are told apart by nobody.
    assert [(one.status, one.error) for one in answers] == [
        (204, ""),
        (0, NOT_PUBLIC),
        (204, ""),
        (0, NOT_PUBLIC),
        (0, NOT_PUBLIC),
    ]
    assert connected == ["127.0.0.1", "127.0.0.1"]


async def test_url_is_judged_again() -> None:
    # The operator has changed his mind.
    async with posting(Rules()) as post:
        answer = await post.post("http://example.com/", b"{}", {})
    assert answer.error == "Must begin with https://."


async def test_certificate_must_be_one_to_believe(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not there")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    ok = says(b"HTTP/1.1 204 No Content\r\n\r\n")
    async with posting() as post, listening(ok, tls) as port, listening(ok) as plain:
        answer = await post.post(f"https://127.0.0.1:{port}/", b"{}", {})
        assert (answer.status, answer.error) == (0, "The receiver's certificate is not to be believed.")
        answer = await post.post(f"https://127.0.0.1:{plain}/", b"{}", {})
        assert answer.status == 0
        assert answer.error
