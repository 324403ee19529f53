"""One exchange with one container, and everything a container may do to it."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, task_pb2

from nodedaemon.connection import IDLE_S, Address
from nodedaemon.course import Course, NoAnswer
from nodedaemon.relay import Exchange, Relay
from tests.nodedaemon.fakes import SOON_S, Request, Wire, container, echo

MIB = 1024 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class MemorySink:
    """Takes a body; `gate` closed, it takes its time."""

    data: bytearray = field(default_factory=bytearray)
    ended: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fault: OSError | None = None

    async def write(self, data: bytes) -> None:
        await self.gate.wait()
        if self.fault:
            raise self.fault
        self.data += data

    def end(self) -> None:
        self.ended = True


class Asker:
    """Asks containers by way of one relay."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.relay = Relay(self.clock)
        self.sink = MemorySink()
        self.sink.gate.set()
        self.head: http_pb2.HttpResponse | None = None
        self.course = Course(lambda: None)
        self.sent = asyncio.Event()
        self.begun = 0

    def _begin(self) -> None:
        self.begun += 1

    def _open_body(self, head: http_pb2.HttpResponse) -> MemorySink:
        self.head = http_pb2.HttpResponse()
        self.head.CopyFrom(head)
        return self.sink

    async def ask(
        self,
        address: Address,
        body: bytes = b"",
        *,
        method: str = "POST",
        upload: AsyncGenerator[bytes, None] | None = None,
        upload_bytes: int = 0,
        streamed: bool = False,
        limit_bytes: int = 0,
        container_id: str = "c-1",
    ) -> http_pb2.HttpResponse:
        self.sent = asyncio.Event()
        self.course = Course(self.sent.set, self.clock)
        size = upload_bytes or len(body)
        payload = f"{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + body
        exchange = Exchange(
            container_id=container_id,
            address=address,
            method=method,
            payload=payload,
            begin=self._begin,
            open_body=self._open_body,
            upload=upload,
            limit_bytes=limit_bytes,
            streamed=streamed,
        )
        response = http_pb2.HttpResponse()
        async with asyncio.timeout(SOON_S):
            await self.relay.run(exchange, self.course, response)
        return response

    async def fails(self, address: Address, body: bytes = b"", **options: object) -> NoAnswer:
        with pytest.raises(NoAnswer) as fault:
            await self.ask(address, body, **options)  # type: ignore[arg-type]
        return fault.value


@pytest.fixture
async def asker() -> AsyncIterator[Asker]:
    asker = Asker()
    yield asker
    asker.relay.close()
    # Aborted transports close in the next step of the loop.
    await asyncio.sleep(0)


# Answers.


async def test_small_answer_rides_inline(asker: Asker) -> None:
    async with container(echo) as there:
        response = await asker.ask(there.address, "grüße".encode())
    assert (response.status, response.body.inline.decode()) == (200, "grüße")
    assert (response.body.size, response.body.is_utf8) == (7, True)
    assert asker.course.delivery == task_pb2.DELIVERY_ANSWERED
    assert asker.sent.is_set()


async def test_answer_that_is_no_text_says_so(asker: Asker) -> None:
    async with container(echo) as there:
        assert not (await asker.ask(there.address, b"\xff\xd8")).body.is_utf8


async def test_times_are_those_of_the_clock(asker: Asker) -> None:
    async def slow(wire_: Wire) -> None:
        await wire_.request()
        asker.clock.now += 5
        await wire_.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await wire_.writer.drain()
        asker.clock.now += 2
        await wire_.send(b"ok")

    async with container(slow) as there:
        await asker.ask(there.address)
    course = asker.course
    assert course.sent_at == 100.0
    assert 105.0 <= course.first_byte_at <= course.last_byte_at <= 107.0


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_answers_without_body(asker: Asker, method: str) -> None:
    async def handler(wire_: Wire) -> None:
        request = await wire_.request()
        status = 200 if request.method == "HEAD" else 304
        await wire_.send(f"HTTP/1.1 {status} X\r\nContent-Length: 1000\r\n\r\n".encode())
        await wire_.closed()

    async with container(handler) as there:
        response = await asker.ask(there.address, method=method)
    assert (response.body.size, response.body.inline) == (0, b"")
    # Nothing else tells the length of what there is none of.
    assert [(h.name, h.value) for h in response.headers] == [("Content-Length", b"1000")]


async def test_redirect_is_an_answer_and_not_followed(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(status=302, headers="Location: http://169.254.169.254/\r\n")

    async with container(handler) as there:
        response = await asker.ask(there.address)
        assert there.connections == 1
    assert response.status == 302
    assert [(h.name, h.value) for h in response.headers] == [("Location", b"http://169.254.169.254/")]


async def test_compressed_answer_is_passed_on_as_it_is(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(b"\x1f\x8bnot really", headers="Content-Encoding: gzip\r\n")

    async with container(handler) as there:
        assert (await asker.ask(there.address)).body.inline == b"\x1f\x8bnot really"


async def test_large_answer_goes_to_the_sink(asker: Asker) -> None:
    body = bytes(range(256)) * 4096 * 3

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(body, headers="X-A: b\r\n")

    async with container(handler) as there:
        response = await asker.ask(there.address)
    assert asker.sink.data == body
    assert asker.sink.ended
    assert (response.body.inline, response.body.size, response.body.is_utf8) == (b"", len(body), False)
    assert asker.head is not None
    assert (asker.head.status, asker.head.headers[0].name) == (200, "X-A")
    assert asker.head.body.size == len(body), "the container had said how much it would be"


async def test_text_cut_within_a_character_is_still_text(asker: Asker) -> None:
    body = "€".encode() * (MIB // 3)

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 100_000):
            await wire_.send(body[start : start + 100_000])

    async with container(handler) as there:
        assert (await asker.ask(there.address)).body.is_utf8


async def test_answer_of_64_kib_is_inline_and_one_byte_more_is_not(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        for size in (wire.INLINE_BYTES, wire.INLINE_BYTES + 1):
            await wire_.request()
            await wire_.answer(b"x" * size)

    async with container(handler) as there:
        assert len((await asker.ask(there.address)).body.inline) == wire.INLINE_BYTES
        assert not asker.sink.ended
        assert not (await asker.ask(there.address)).body.inline
        assert len(asker.sink.data) == wire.INLINE_BYTES + 1


async def test_container_waits_while_the_sink_does(asker: Asker) -> None:
    """Memory does not grow with bodies: what the sink does not take stays with the container."""
    asker.sink.gate.clear()
    pushed = 0

    async def handler(wire_: Wire) -> None:
        nonlocal pushed
        await wire_.request()
        await wire_.send(f"HTTP/1.1 200 OK\r\nContent-Length: {64 * MIB}\r\n\r\n".encode())
        for _ in range(64):
            await wire_.send(b"x" * MIB)
            pushed += 1

    async with container(handler) as there:
        asking = asyncio.create_task(asker.ask(there.address))
        stalled = asyncio.create_task(_unchanging(lambda: pushed))
        assert await stalled < 32
        asker.sink.gate.set()
        assert (await asking).body.size == 64 * MIB


async def _unchanging(value: object) -> int:
    """A figure, once the loop has gone round often without its changing."""
    assert callable(value)
    last, rounds = -1, 0
    while rounds < 2000:
        now = value()
        last, rounds = (last, rounds + 1) if now == last else (now, 0)
        await asyncio.sleep(0)
    assert isinstance(last, int)
    return last


async def test_streamed_answer_is_delivered_as_it_comes(asker: Asker) -> None:
    go_on = asyncio.Event()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata 1\r\n")
        await go_on.wait()
        await wire_.send(b"6\r\ndata 2\r\n0\r\n\r\n")

    class Listening(MemorySink):
        async def write(self, data: bytes) -> None:
            await super().write(data)
            if self.data == b"data 1":
                go_on.set()

    asker.sink = Listening(gate=asker.sink.gate)
    async with container(handler) as there:
        response = await asker.ask(there.address, streamed=True)
    assert asker.sink.data == b"data 1data 2"
    assert asker.sink.ended
    assert response.body.size == 12


async def test_streamed_answer_that_is_over_at_once_needs_no_stream(asker: Asker) -> None:
    async with container(echo) as there:
        response = await asker.ask(there.address, b"short", streamed=True)
    assert response.body.inline == b"short"
    assert asker.head is None


# Bodies that come later.


async def pieces(total: int, size: int = 256 * 1024) -> AsyncGenerator[bytes, None]:
    while total:
        piece = min(size, total)
        total -= piece
        yield b"u" * piece


async def test_large_request_is_passed_on_piece_by_piece(asker: Asker) -> None:
    received: list[Request] = []

    async def handler(wire_: Wire) -> None:
        received.append(await wire_.request())
        await wire_.answer()

    async with container(handler) as there:
        await asker.ask(there.address, upload=pieces(5 * MIB), upload_bytes=5 * MIB)
    assert len(received[0].body) == 5 * MIB
    assert asker.sent.is_set()


async def test_upload_waits_for_a_container_that_does_not_read(asker: Asker) -> None:
    given = 0
    read_on = asyncio.Event()

    async def upload() -> AsyncGenerator[bytes, None]:
        nonlocal given
        for _ in range(64):
            yield b"u" * MIB
            given += 1

    async def handler(wire_: Wire) -> None:
        request = await wire_.head()
        await read_on.wait()
        await wire_.reader.readexactly(int(request.header("content-length") or 0))
        await wire_.answer()

    async with container(handler) as there:
        asking = asyncio.create_task(asker.ask(there.address, upload=upload(), upload_bytes=64 * MIB))
        assert await _unchanging(lambda: given) < 32
        assert asker.course.delivery == task_pb2.DELIVERY_SENT_PARTLY
        read_on.set()
        await asking


async def test_answer_to_half_a_request_is_an_answer(asker: Asker) -> None:
    """A container may refuse a body that it has not read: 413 and close."""

    async def handler(wire_: Wire) -> None:
        await wire_.head()
        await wire_.answer(b"too much", status=413, headers="Connection: close\r\n")

    async with container(handler) as there:
        response = await asker.ask(there.address, upload=pieces(64 * MIB), upload_bytes=64 * MIB)
    assert (response.status, response.body.inline) == (413, b"too much")
    assert not asker.sent.is_set()


async def test_container_may_answer_while_it_reads(asker: Asker) -> None:
    """Echoing a large body must not stall: both directions move at once."""

    async def handler(wire_: Wire) -> None:
        request = await wire_.head()
        left = int(request.header("content-length") or 0)
        await wire_.send(f"HTTP/1.1 200 OK\r\nContent-Length: {left}\r\n\r\n".encode())
        while left:
            data = await wire_.reader.read(65536)
            left -= len(data)
            await wire_.send(data)

    async with container(handler) as there:
        response = await asker.ask(there.address, upload=pieces(16 * MIB), upload_bytes=16 * MIB)
    assert response.body.size == 16 * MIB


async def test_upload_that_fails_fails_the_exchange(asker: Asker) -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"u"
        raise NoAnswer("CANCELLED", task_pb2.CAUSE_PLATFORM, "given up")

    async def handler(wire_: Wire) -> None:
        await wire_.closed()

    async with container(handler) as there:
        fault = await asker.fails(there.address, upload=broken(), upload_bytes=2)
    assert fault.reason == "CANCELLED"
    assert asker.course.delivery == task_pb2.DELIVERY_SENT_PARTLY


# Containers that misbehave.


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "head"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "4 of 10 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "5 bytes"),
    ],
)
async def test_early_close_says_where(asker: Asker, sent: bytes, words: str) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(sent)

    async with container(handler) as there:
        fault = await asker.fails(there.address)
    assert (fault.reason, fault.cause) == ("CONNECTION_CLOSED", task_pb2.CAUSE_CUSTOMER)
    assert words in str(fault)
    answered = b"\r\n\r\n" in sent
    assert asker.course.delivery == (task_pb2.DELIVERY_ANSWERED if answered else task_pb2.DELIVERY_SENT)


async def test_close_in_the_middle_of_a_large_body(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 300_000)

    async with container(handler) as there:
        fault = await asker.fails(there.address)
    assert "300000 of 1000000" in str(fault)
    assert not asker.sink.ended


async def test_reset_is_a_close(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        wire_.reset()

    async with container(handler) as there:
        assert (await asker.fails(there.address)).reason == "CONNECTION_CLOSED"


async def test_reset_ends_no_answer_that_ends_with_the_connection(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\n\r\nhalf of it")
        # Until it has been read, so that the reset takes nothing of it away.
        async with asyncio.timeout(SOON_S):
            while not asker.course.received_bytes:
                await asyncio.sleep(0)
        wire_.reset()

    async with container(handler) as there:
        fault = await asker.fails(there.address)
    assert fault.reason == "CONNECTION_CLOSED"
    assert "after 10 bytes" in str(fault)


async def test_garbage_is_a_bad_response(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"hello there\r\n\r\n")
        await wire_.closed()

    async with container(handler) as there:
        fault = await asker.fails(there.address)
    assert (fault.reason, fault.cause) == ("BAD_RESPONSE", task_pb2.CAUSE_CUSTOMER)
    assert "hello there" in str(fault)
    assert asker.course.delivery == task_pb2.DELIVERY_SENT


async def test_nobody_listens(asker: Asker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    fault = await asker.fails(address)
    assert (fault.reason, fault.cause) == ("CONNECT_FAILED", task_pb2.CAUSE_PLATFORM)
    assert "nothing listens" in str(fault)
    assert asker.course.delivery == task_pb2.DELIVERY_NOT_SENT
    assert asker.begun == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 101,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n",
    ],
)
async def test_answer_over_the_limit_is_refused(asker: Asker, answer: bytes) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(answer)
        if b"Length" in answer:
            await wire_.closed()

    async with container(handler) as there:
        # A body whose length is promised is refused once it would go to a sink, at the latest.
        fault = await asker.fails(there.address, limit_bytes=100, streamed=True)
    assert (fault.reason, fault.cause) == ("RESPONSE_TOO_LARGE", task_pb2.CAUSE_CUSTOMER)


async def test_endless_answer_is_refused_at_its_limit(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await wire_.send(b"x" * MIB)

    async with container(handler) as there:
        assert (await asker.fails(there.address, limit_bytes=3 * MIB)).reason == "RESPONSE_TOO_LARGE"
    assert len(asker.sink.data) <= 3 * MIB


async def test_full_disk_is_the_platforms_fault(asker: Asker) -> None:
    asker.sink.fault = OSError(28, "No space left on device")

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(b"x" * MIB)

    async with container(handler) as there:
        fault = await asker.fails(there.address)
    assert (fault.reason, fault.cause) == ("INTERNAL", task_pb2.CAUSE_PLATFORM)
    assert "No space left" in str(fault)


async def test_cancelling_closes_the_connection(asker: Asker) -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def handler(wire_: Wire) -> None:
        await wire_.request()
        asked.set()
        await wire_.closed()
        closed.set()

    async with container(handler) as there:
        asking = asyncio.create_task(asker.ask(there.address))
        await asked.wait()
        asking.cancel()
        async with asyncio.timeout(2):
            await closed.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert asker.course.delivery == task_pb2.DELIVERY_SENT


# Connections.


async def test_connection_is_reused(asker: Asker) -> None:
    async with container(echo) as there:
        for _ in range(5):
            await asker.ask(there.address, b"x")
        assert there.connections == 1


async def test_connection_is_no_other_containers_that_has_its_address(asker: Asker) -> None:
    async with container(echo) as there:
        await asker.ask(there.address, b"x")
        await asker.ask(there.address, b"x", container_id="c-2")
        assert there.connections == 2


async def test_connection_that_was_idle_for_long_is_not_reused(asker: Asker) -> None:
    async with container(echo) as there:
        await asker.ask(there.address, b"x")
        asker.clock.now += IDLE_S + 0.1
        await asker.ask(there.address, b"x")
        assert there.connections == 2


async def test_closed_connection_is_seen_before_it_is_reused(asker: Asker) -> None:
    closed = asyncio.Event()

    async def once(wire_: Wire) -> None:
        await wire_.answer((await wire_.request()).body)
        wire_.writer.close()
        await wire_.writer.wait_closed()
        closed.set()

    async with container(once) as there:
        for number in (b"1", b"2"):
            closed.clear()
            assert (await asker.ask(there.address, number)).body.inline == number
            await closed.wait()
        assert there.connections == 2


async def test_unasked_words_spoil_a_connection(asker: Asker) -> None:
    spoken = asyncio.Event()

    async def chatty(wire_: Wire) -> None:
        await wire_.answer((await wire_.request()).body)
        await wire_.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
        spoken.set()
        await wire_.closed()

    async with container(chatty) as there:
        for number in (b"1", b"2"):
            spoken.clear()
            assert (await asker.ask(there.address, number)).body.inline == number
            await spoken.wait()


async def test_reused_connection_that_breaks_is_not_asked_again(asker: Asker) -> None:
    """What was written may have been read: nothing is sent twice."""
    requests = 0

    async def handler(wire_: Wire) -> None:
        nonlocal requests
        await wire_.answer((await wire_.request()).body)
        await wire_.request()
        requests += 1
        wire_.reset()

    async with container(handler) as there:
        await asker.ask(there.address, b"x")
        fault = await asker.fails(there.address, b"y")
        assert (requests, there.connections) == (1, 1)
    assert fault.reason == "CONNECTION_CLOSED"
    assert asker.course.delivery == task_pb2.DELIVERY_SENT


async def test_connection_with_close_is_not_kept(asker: Asker) -> None:
    async def handler(wire_: Wire) -> None:
        while True:
            await wire_.answer((await wire_.request()).body, headers="Connection: close\r\n")

    async with container(handler) as there:
        await asker.ask(there.address, b"x")
        await asker.ask(there.address, b"x")
        assert there.connections == 2


async def test_many_at_once(asker: Asker) -> None:
    async with container(echo) as there:

        async def ask(number: int) -> None:
            exchange = Exchange(
                container_id="c-1",
                address=there.address,
                method="POST",
                payload=b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\n%04d" % number,
                begin=lambda: None,
                open_body=lambda _: MemorySink(),
            )
            response = http_pb2.HttpResponse()
            await asker.relay.run(exchange, Course(lambda: None), response)
            assert int(response.body.inline) == number

        async with asyncio.TaskGroup() as group:
            for number in range(500):
                group.create_task(ask(number))
