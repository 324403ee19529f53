"""How a connection drives its calls, and when aiohttp takes it over."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ngpu.v1 import task_pb2 as pb

from httpbridge.batch import Waiting
from httpbridge.connection import AHEAD_BYTES, Connection, Server
from httpbridge.plain import PlainRequest
from httpbridge.reply import Reply
from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import Answer, Exchange, FakeControlPlane

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
CHUNKED = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class FakeTransport(asyncio.Transport):
    """The socket's side."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.written: list[bytes] = []
        self.closed = False
        self.pauses = 0

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.pauses += 1

    def resume_reading(self) -> None:
        self.pauses = 0

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()


class FakeAiohttp:
    """Makes one handler, and remembers what it got."""

    connections: tuple[object, ...] = ()

    def __init__(self) -> None:
        self.got = b""
        self.made = 0
        self.writing_paused = False

    def __call__(self) -> "FakeAiohttp":
        self.made += 1
        return self

    def connection_made(self, transport: FakeTransport) -> None: ...

    def connection_lost(self, error: Exception | None) -> None: ...

    def pause_writing(self) -> None:
        self.writing_paused = True

    def data_received(self, data: bytes) -> None:
        self.got += data

    def pre_shutdown(self) -> None: ...

    async def shutdown(self, timeout: float) -> None: ...


class FakeBatch:
    """Of which a Waiting asks no more."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.abandoned: list[int] = []

    def abandon(self, call_id: int) -> None:
        self.abandoned.append(call_id)

    def unheard(self, answer: pb.ScheduleResponse) -> None: ...


class House:
    """A server without a socket. Its handler asks for an answer, and replies with the body and the answer's number."""

    def __init__(self, *, idle_s: float = 60.0, hold_s: float = 60.0) -> None:
        self.batch = FakeBatch()
        self.aiohttp = FakeAiohttp()
        self.asked: list[Waiting] = []
        self.then: Callable[[PlainRequest], Awaitable[object]] | None = None
        self.cancelled = 0
        server: Any = self.aiohttp
        self.server = Server(self.handle, server, most=3, idle_s=idle_s, line_bytes=8190, full=b"full", hold_s=hold_s)

    async def handle(self, request: PlainRequest) -> Reply:
        batch: Any = self.batch
        waiting = Waiting(batch, len(self.asked) + 1, 0.0)
        self.asked.append(waiting)
        try:
            answer = await waiting
            if self.then is not None:
                await self.then(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Reply(b"%b %d" % (request.take(), answer.id))

    def connect(self) -> tuple[Connection, FakeTransport]:
        transport = FakeTransport()
        made = transport.protocol = self.server()
        made.connection_made(transport)
        return made, transport

    def answer(self, number: int) -> None:
        self.asked[number - 1].end(pb.Answer(id=number))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_calls_are_driven_by_what_comes_and_by_answers_without_a_round_of_the_loop() -> None:
    house = House()
    caller, transport = house.connect()
    for number in (1, 2):
        caller.data_received(POST + b"body")
        assert len(house.asked) == number
        house.answer(number)
        assert len(transport.written) == number
        assert transport.written[-1].startswith(b"HTTP/1.1 200 OK\r\n")
        assert transport.written[-1].endswith(b"\r\n\r\nbody %d" % number)
    assert (transport.closed, house.aiohttp.made) == (False, 0)


async def test_body_that_comes_after_its_head_is_waited_for() -> None:
    house = House()
    caller, transport = house.connect()
    for piece in (POST, b"bo", b"d"):
        caller.data_received(piece)
        assert not house.asked
    caller.data_received(b"y")
    house.answer(1)
    assert transport.written[0].endswith(b"body 1")
    # And more than the body is no longer plain.
    caller.data_received(POST)
    caller.data_received(b"body" + GET)
    assert house.aiohttp.got == POST + b"body" + GET


async def test_body_that_does_not_come_is_for_aiohttp() -> None:
    house = House(hold_s=0.0)
    caller, transport = house.connect()
    caller.data_received(POST + b"b")
    await asyncio.sleep(0.01)
    assert house.aiohttp.got == POST + b"b"
    assert transport.protocol is house.aiohttp
    assert house.server.connections == []


@pytest.mark.parametrize("request_", [CHUNKED, GET[:10], GET + GET, GET.replace(b"1.1", b"1.0"), b"\0"])
async def test_what_is_not_plain_is_for_aiohttp(request_: bytes) -> None:
    house = House()
    caller, transport = house.connect()
    caller.data_received(GET)
    house.answer(1)
    caller.data_received(request_)
    assert (house.aiohttp.got, house.aiohttp.made, transport.protocol) == (request_, 1, house.aiohttp)
    assert not transport.closed


async def test_what_comes_ahead_waits_and_has_a_limit() -> None:
    house = House()
    caller, transport = house.connect()
    caller.data_received(GET)
    caller.data_received(POST)
    assert transport.pauses == 0
    caller.data_received(b"x" * AHEAD_BYTES)
    assert transport.pauses == 1
    assert house.aiohttp.got == b""
    house.answer(1)
    assert len(transport.written) == 1
    assert house.aiohttp.got == POST + b"x" * AHEAD_BYTES
    assert transport.pauses == 0


async def test_who_hangs_up_has_his_call_abandoned_at_once() -> None:
    house = House()
    caller, transport = house.connect()
    caller.data_received(GET)
    caller.connection_lost(None)
    assert (house.cancelled, house.batch.abandoned) == (1, [1])
    house.answer(1)
    assert transport.written == []
    assert house.server.connections == []


async def test_handler_that_waits_for_something_else_goes_on_as_a_task() -> None:
    house, release = House(), asyncio.Event()

    async def then(request: PlainRequest) -> None:
        await release.wait()
        async with asyncio.timeout(60):
            await asyncio.sleep(0)

    house.then = then
    caller, transport = house.connect()
    caller.data_received(GET)
    house.answer(1)
    await settle()
    assert transport.written == []
    release.set()
    await settle()
    assert transport.written[0].endswith(b" 1")
    caller.data_received(GET)
    house.answer(2)
    await settle()
    assert transport.written[1].endswith(b" 2")


@pytest.mark.parametrize("rounds", [0, 1])
async def test_task_of_a_caller_who_hangs_up_is_cancelled_where_it_waits(rounds: int) -> None:
    house = House()

    async def then(request: PlainRequest) -> None:
        await asyncio.Event().wait()

    house.then = then
    caller, _ = house.connect()
    caller.data_received(GET)
    house.answer(1)
    for _ in range(rounds):
        await asyncio.sleep(0)
    caller.connection_lost(None)
    await settle()
    assert house.cancelled == 1


async def test_fault_ends_its_connection_and_no_other() -> None:
    house = House()

    async def then(request: PlainRequest) -> None:
        if request.method == "GET":
            raise ValueError("a fault of ours")

    house.then = then
    (one, broken), (other, sound) = house.connect(), house.connect()
    one.data_received(GET)
    other.data_received(POST + b"body")
    house.answer(1)
    house.answer(2)
    assert (broken.closed, broken.written) == (True, [])
    assert (sound.closed, len(sound.written)) == (False, 1)


async def test_reader_who_is_behind_holds_his_next_call_and_nobody_else() -> None:
    house = House()
    caller, transport = house.connect()
    caller.data_received(GET)
    caller.pause_writing()
    house.answer(1)
    assert len(transport.written) == 1
    caller.data_received(POST + b"body")
    await settle()
    assert len(house.asked) == 1
    caller.resume_writing()
    await settle()
    # Ahead of time, so aiohttp's; which is told that all is well.
    assert (house.aiohttp.got, house.aiohttp.writing_paused) == (POST + b"body", False)


async def test_one_too_many() -> None:
    house = House()
    callers = [house.connect() for _ in range(4)]
    assert [transport.written for _, transport in callers] == [[], [], [], [b"full"]]
    assert [transport.closed for _, transport in callers] == [False, False, False, True]
    await settle()
    assert len(house.server.connections) == 3


async def test_idle_connection_is_closed_and_busy_one_is_not() -> None:
    house = House(idle_s=0.02)
    (busy, kept), (_, idle) = house.connect(), house.connect()
    busy.data_received(GET)
    await asyncio.sleep(0.1)
    assert (kept.closed, idle.closed) == (False, True)
    house.answer(1)
    await asyncio.sleep(0.1)
    assert kept.closed


async def test_stop_waits_for_calls_and_then_no_longer() -> None:
    house = House()
    (_, idle), (one, answered), (two, late) = house.connect(), house.connect(), house.connect()
    one.data_received(GET)
    two.data_received(GET)
    house.server.pre_shutdown()
    assert (idle.closed, answered.closed, late.closed) == (True, False, False)
    stopping = asyncio.create_task(house.server.shutdown(0.05))
    await settle()
    house.answer(1)
    assert (len(answered.written), answered.closed) == (1, True)
    await stopping
    assert (late.written, late.closed, house.cancelled, house.batch.abandoned) == ([], True, 1, [2])


async def test_requests_of_all_kinds_on_one_connection(bridge: Bridge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    plain = b'POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{"data":"%d"}'
    chunked = (
        b'POST /user/img2img HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nc\r\n{"data":"%d"}\r\n0\r\n\r\n'
    )
    requests = [request % number for number, request in enumerate((plain, plain, chunked, plain, chunked, plain))]
    for number, request in enumerate(requests):
        for at in (0, len(request) // 2):
            writer.write(request[at : at + len(request) // 2] if not at else request[at:])
            await asyncio.sleep(0.005)
        assert b'"data":"%d"' % number in await reader.readuntil(b"}")
    writer.close()


async def test_next_request_may_come_before_the_answer(bridge: Bridge, fake: FakeControlPlane) -> None:
    reached, release = asyncio.Event(), asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        reached.set()
        await release.wait()
        return Answer(exchange.body)

    fake.container = container
    request = b'POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{"data":"%d"}'
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(request % 1)
    await reached.wait()
    for number in (2, 3):
        writer.write(request % number)
        await asyncio.sleep(0.01)
    assert len(fake.tasks) == 1
    release.set()
    for number in (1, 2, 3):
        assert b'"data":"%d"' % number in await reader.readuntil(b"}")
    writer.close()


async def test_what_a_head_says_is_remembered_and_what_is_wrong_with_it_too(
    start_bridge: StartBridge, fake: FakeControlPlane
) -> None:
    bridge = await start_bridge()
    for _ in range(3):
        status, answer, _ = await bridge.post("/user/x", json={"data": "a"}, headers=BEARER | {"X-NGPU-Priority": "3"})
        assert (status, answer["data"]) == (200, "a")
        status, _, _ = await bridge.post("/user/x", json={"data": "a"}, headers=BEARER | {"X-NGPU-Priority": "30"})
        assert status == 400
    assert [request.priority for request in fake.scheduled] == [3, 3, 3]
    assert [exchange.body for exchange in fake.exchanges] == [b"a"] * 3
