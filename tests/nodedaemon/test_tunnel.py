"""A container that changes its protocol: its bytes and the caller's, both ways, until either closes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from ngpu.v1 import http_pb2, node_pb2, task_pb2

from tests.nodedaemon.fakes import SOON_S, FakeControlPlane, Wire, control_plane
from tests.nodedaemon.test_execute import Node, serving

MIB = 1024 * 1024
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-A: 1\r\n\r\n"


@pytest.fixture
async def plane() -> AsyncIterator[FakeControlPlane]:
    async with control_plane() as fake:
        yield fake


@pytest.fixture
async def node(plane: FakeControlPlane, tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(plane, tmp_path)
    yield node
    await node.kill()


def upgrade(*, streamed: bool = True, limit_ms: int = 60_000) -> node_pb2.Start:
    headers = [http_pb2.Header(name=name, value=b"websocket") for name in ("Upgrade", "X-B")]
    request = http_pb2.HttpRequest(method="GET", path="/ws", headers=headers)
    return node_pb2.Start(
        attempt_id="t.1", replica_id="r-1", port=80, request=request, run_time_limit_ms=limit_ms, streamed=streamed
    )


async def shouting(wire_: Wire) -> None:
    """Changes its protocol, greets, and says back in capitals what it hears."""
    request = await wire_.head()
    assert (request.header("upgrade"), request.header("connection")) == ("websocket", "Upgrade")
    await wire_.send(SWITCHED + b"hello")
    while data := await wire_.reader.read(65536):
        await wire_.send(data.upper())


async def result_of(
    node: Node, handler: Callable[[Wire], Awaitable[None]], start: node_pb2.Start | None = None
) -> node_pb2.Result:
    """What becomes of one attempt."""
    async with serving(node, handler), asyncio.timeout(SOON_S):
        stream = await node.connect()
        stream.send(starts=[start or upgrade()])
        return await stream.result()


async def test_bytes_go_both_ways_and_the_container_closes(plane: FakeControlPlane, node: Node) -> None:
    heard = b""

    async def caller(container: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        nonlocal heard
        yield b"one "
        yield b"two"
        async for data in container:
            heard += data

    async def handler(wire_: Wire) -> None:
        await wire_.head()
        await wire_.send(SWITCHED + b"hello ")
        await wire_.send((await wire_.reader.readexactly(7)).upper())
        # More than can be on its way at once, and then it is gone.
        await wire_.send(bytes(3 * MIB))

    plane.caller = caller
    result = await result_of(node, handler)
    assert heard == b"hello ONE TWO" + bytes(3 * MIB)
    assert (result.response.status, result.delivery) == (101, task_pb2.DELIVERY_ANSWERED)
    assert not result.HasField("failure")
    assert result.last_byte_after_us >= result.first_byte_after_us > 0
    # The head went to the caller, the bytes nowhere else.
    assert [(h.name, h.value) for h in plane.heads["t.1"].headers] == [("X-A", b"1"), ("Upgrade", b"websocket")]
    assert not plane.stored
    assert result.response.body.size == 0


async def test_caller_closes(plane: FakeControlPlane, node: Node) -> None:
    ended = asyncio.Event()

    async def caller(container: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        assert await anext(container) == b"hello"
        for _ in range(20):
            yield bytes(200_000)

    got = 0

    async def handler(wire_: Wire) -> None:
        nonlocal got
        await wire_.head()
        await wire_.send(SWITCHED + b"hello")
        while data := await wire_.reader.read(MIB):
            got += len(data)
        ended.set()

    plane.caller = caller
    result = await result_of(node, handler)
    assert ended.is_set()
    assert got == 4_000_000
    assert (result.response.status, result.HasField("failure")) == (101, False)


async def test_container_that_does_not_let_go_is_left(plane: FakeControlPlane, node: Node) -> None:
    async def caller(container: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"bye"

    async def handler(wire_: Wire) -> None:
        await wire_.head()
        await wire_.send(SWITCHED)
        await asyncio.Event().wait()

    plane.caller = caller
    assert (await result_of(node, handler)).response.status == 101


async def test_connection_that_breaks_is_over_like_any_other(plane: FakeControlPlane, node: Node) -> None:
    async def caller(container: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for data in container:
            yield data

    async def handler(wire_: Wire) -> None:
        await wire_.head()
        await wire_.send(SWITCHED)
        await wire_.send(b"x")
        await wire_.reader.readexactly(1)
        wire_.reset()

    plane.caller = caller
    result = await result_of(node, handler)
    assert (result.response.status, result.HasField("failure")) == (101, False)


async def test_refusal_is_an_answer(plane: FakeControlPlane, node: Node) -> None:
    async def handler(wire_: Wire) -> None:
        await wire_.request()
        await wire_.answer(b"no", status=426)

    result = await result_of(node, handler)
    assert (result.response.status, result.response.body.inline) == (426, b"no")


async def test_nobody_takes_the_connection(plane: FakeControlPlane, node: Node) -> None:
    closed = asyncio.Event()

    async def handler(wire_: Wire) -> None:
        await wire_.head()
        await wire_.send(SWITCHED)
        await wire_.closed()
        closed.set()

    async with serving(node, handler), asyncio.timeout(SOON_S):
        stream = await node.connect()
        stream.send(starts=[upgrade()])
        result = await stream.result()
        await closed.wait()
    assert (result.failure.reason, result.failure.cause) == ("CANCELLED", task_pb2.CAUSE_CUSTOMER)
    assert not result.HasField("response")


@pytest.mark.parametrize("why", ["CANCELLED", "RUN_TIME_LIMIT"])
async def test_attempt_ends_under_it(plane: FakeControlPlane, node: Node, why: str) -> None:
    talking, closed = asyncio.Event(), asyncio.Event()

    async def caller(container: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"x"
        async for _ in container:
            talking.set()

    async def handler(wire_: Wire) -> None:
        await shouting(wire_)
        closed.set()

    plane.caller = caller
    async with serving(node, handler), asyncio.timeout(SOON_S):
        stream = await node.connect()
        stream.send(starts=[upgrade(limit_ms=60_000 if why == "CANCELLED" else 300)])
        await talking.wait()
        if why == "CANCELLED":
            stream.send(cancels=["t.1"])
        result = await stream.result()
        await closed.wait()
    assert (result.failure.reason, result.delivery) == (why, task_pb2.DELIVERY_ANSWERED)


async def test_slow_caller_holds_the_container_back(plane: FakeControlPlane, node: Node) -> None:
    reading = asyncio.Event()
    sent = heard = 0

    async def caller(container: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        nonlocal heard
        yield b"x"
        await reading.wait()
        async for data in container:
            heard += len(data)

    async def handler(wire_: Wire) -> None:
        nonlocal sent
        await wire_.head()
        await wire_.send(SWITCHED)
        for _ in range(64):
            await wire_.send(bytes(MIB))
            sent += MIB

    plane.caller = caller
    async with serving(node, handler), asyncio.timeout(SOON_S):
        stream = await node.connect()
        stream.send(starts=[upgrade()])
        before = -1
        while sent != before or not sent:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 32 * MIB
        reading.set()
        await stream.result()
    assert heard == 64 * MIB


async def test_protocol_is_not_changed_unasked(node: Node) -> None:
    async def handler(wire_: Wire) -> None:
        request = await wire_.head()
        assert request.header("upgrade") is None
        assert request.header("x-b") == "websocket"
        await wire_.send(SWITCHED)

    result = await result_of(node, handler, upgrade(streamed=False))
    assert result.failure.reason == "BAD_RESPONSE"
