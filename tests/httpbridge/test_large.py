"""Large bodies through the envelope: they go on as they come, and nothing is lost or left behind."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ngpu import wire

from tests.httpbridge.conftest import BEARER, Bridge
from tests.httpbridge.fake_controlplane import RICH, FakeControlPlane

MIB = 1024 * 1024
AS_JSON = BEARER | {"Content-Type": "application/json"}
#: 3 MiB as they are sent.
TEXT = '猫"\\\n\t\U0001f600 ' * 100_000


class Hesitant(FakeControlPlane):
    """Takes so many messages of a body, and no more until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = 10**9
        self.go_on = asyncio.Event()

    async def Upload(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        async def taken() -> AsyncIterator[Any]:
            count = 0
            async for message in request_iterator:
                yield message
                count += 1
                if count >= self.takes:
                    await self.go_on.wait()

        try:
            return await super().Upload(taken(), context)
        except asyncio.CancelledError:
            # It broke off without `last`, and is deleted.
            self.discarded.set()
            raise


@pytest.fixture
async def fake() -> AsyncIterator[Hesitant]:
    async with Hesitant() as control_plane:
        yield control_plane


async def in_pieces(body: bytes, size: int = 70_001) -> AsyncIterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("ascii_only", [True, False])
async def test_a_long_string_goes_on_as_it_comes(bridge: Bridge, fake: Hesitant, told: bool, ascii_only: bool) -> None:
    body = json.dumps({"n": 1, "data": TEXT, "btc_address": RICH}, ensure_ascii=ascii_only).encode()
    status, answer, _ = await bridge.post(
        "/user/x", headers=AS_JSON, data=io.BytesIO(body) if told else in_pieces(body)
    )
    assert (status, answer["data"]) == (200, TEXT)
    (exchange,) = fake.exchanges
    assert exchange.body == TEXT.encode()
    assert dict(exchange.headers)["Content-Type"] == b"text/plain; charset=utf-8"
    assert fake.scheduled[0].btc_address == RICH
    assert fake.upload_requests[0].discard
    assert all(len(piece.data) <= wire.CHUNK_BYTES for piece in fake.upload_requests)


async def test_json_in_a_long_string_is_said_to_be_json(bridge: Bridge, fake: Hesitant) -> None:
    inner = json.dumps({"prompt": "a cat", "init_images": [TEXT], "steps": [1.5, None]})
    await bridge.post("/user/x", json={"data": inner}, headers=BEARER)
    await bridge.post("/user/x", json={"data": inner[:-1]}, headers=BEARER)
    assert [exchange.body for exchange in fake.exchanges] == [inner.encode(), inner[:-1].encode()]
    types = [dict(exchange.headers)["Content-Type"] for exchange in fake.exchanges]
    assert types == [b"application/json", b"text/plain; charset=utf-8"]


async def test_other_large_bodies_are_what_they_were(bridge: Bridge, fake: Hesitant) -> None:
    image = b"\x89PNG" + bytes(2 * MIB)
    await bridge.post("/user/x", data=in_pieces(image), headers=BEARER | {"Content-Type": "image/png"})
    payload = {"init_images": [TEXT], "btc_address": RICH}
    await bridge.post("/user/x", json=payload, headers=BEARER)
    await bridge.post("/user/x", json={"data": {"a": [TEXT, 1]}}, headers=BEARER)
    first, second, third = fake.exchanges
    assert (first.body, dict(first.headers)["Content-Type"]) == (image, b"image/png")
    assert json.loads(second.body) == {"init_images": [TEXT]}
    assert json.loads(third.body) == {"a": [TEXT, 1]}
    assert [request.btc_address for request in fake.scheduled] == ["", RICH, ""]


async def test_the_last_data_counts(bridge: Bridge, fake: Hesitant) -> None:
    body = b'{"data":"%b","data":"short"}' % (b"x" * 2 * MIB)
    _, answer, _ = await bridge.post("/user/x", data=io.BytesIO(body), headers=AS_JSON)
    assert answer["data"] == "short"
    await fake.discarded.wait()
    assert not fake.uploads


@pytest.mark.parametrize("end", ['"', '"} more', "", '\\x"}', '","btc_address":5}'])
@pytest.mark.parametrize("sent_as", ["application/json", "application/x-www-form-urlencoded"])
async def test_what_is_refused_at_its_end_leaves_nothing(
    bridge: Bridge, fake: Hesitant, end: str, sent_as: str
) -> None:
    body = ('{"data":"' + "x" * 2 * MIB + end).encode()
    status, answer, _ = await bridge.post("/user/x", data=io.BytesIO(body), headers=BEARER | {"Content-Type": sent_as})
    assert (status, answer["result_code"]) == (400, 400)
    await fake.discarded.wait()
    assert not fake.uploads
    assert not fake.tasks


async def test_more_than_the_workspace_takes(bridge: Bridge, fake: Hesitant) -> None:
    fake.body_limit = 2 * MIB
    status, answer, _ = await bridge.post("/user/x", json={"data": "x" * 3 * MIB}, headers=BEARER)
    assert (status, answer["result_code"]) == (413, 413)
    assert not fake.tasks


async def test_a_caller_who_goes_away_leaves_nothing(bridge: Bridge, fake: Hesitant) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    fields = "".join(f"{name}: {value}\r\n" for name, value in AS_JSON.items())
    writer.write(f"POST /user/x HTTP/1.1\r\nHost: x\r\n{fields}Content-Length: {8 * MIB}\r\n\r\n".encode())
    writer.write(b'{"data":"' + b"x" * MIB)
    while len(fake.upload_requests) < 3:
        await asyncio.sleep(0)
    writer.close()
    await fake.discarded.wait()
    assert not fake.tasks


async def test_a_control_plane_that_is_slow_holds_the_caller(bridge: Bridge, fake: Hesitant) -> None:
    """What is on the way at most, in the bridge and in sockets, does not grow with the body."""
    fake.takes = 2
    body = b'{"data":"%b"}' % (b"x" * 32 * MIB)
    sent = 0

    async def watched() -> AsyncIterator[bytes]:
        nonlocal sent
        async for piece in in_pieces(body, 256 * 1024):
            yield piece
            sent += len(piece)

    calling = asyncio.create_task(bridge.post("/user/x", data=watched(), headers=AS_JSON))
    before = -1
    while sent != before or not sent:
        before = sent
        await asyncio.sleep(0.2)
    assert sent < 20 * MIB
    assert not calling.done()
    fake.go_on.set()
    status, answer, _ = await calling
    assert (status, len(answer["data"])) == (200, 32 * MIB)
    assert fake.exchanges[0].body == body[9:-2]
