"""The HTTP edge itself: odd requests, slow and vanishing callers, full houses, and that nothing but JSON comes out."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest
from ngpu.v1 import task_pb2 as pb

from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import WORKSPACE, Answer, Exchange, FakeControlPlane


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nabcde",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 10_000 + b"\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_told_so_in_json(bridge: Bridge, fake: FakeControlPlane, request_: bytes) -> None:
    status, headers, body = parsed(await bridge.raw(request_))
    answer = json.loads(body)
    assert (status, answer["result_code"], headers["Content-Type"]) == (400, 400, "application/json")
    assert answer.keys() == {"result_code", "msg"}
    assert headers["X-Request-Id"]
    assert "\n" not in answer["msg"]
    assert not fake.tasks


async def test_a_body_that_is_not_what_its_head_says(bridge: Bridge, fake: FakeControlPlane) -> None:
    request = b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    status, _, body = parsed(await bridge.raw(request))
    assert (status, json.loads(body)["result_code"]) == (400, 400)
    assert not fake.tasks


async def test_request_ids(bridge: Bridge) -> None:
    _, _, headers = await bridge.get("/healthz", headers={"X-Request-Id": "my.own-id_1"})
    assert headers["X-Request-Id"] == "my.own-id_1"
    made = {(await bridge.get("/healthz"))[2]["X-Request-Id"] for _ in range(3)}
    for bad in ("", "x" * 65, "a b", "ä", "<script>"):
        made.add((await bridge.get("/nonsense", headers={"X-Request-Id": bad}))[2]["X-Request-Id"])
    assert len(made) == 8
    assert all(re.fullmatch(r"[0-9a-f]{20}", request_id) for request_id in made)


async def test_absolute_targets_are_paths(bridge: Bridge, fake: FakeControlPlane) -> None:
    target = b"http://elsewhere.example/user/img2img?a=1"
    request = b"POST " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    assert parsed(await bridge.raw(request))[0] == 200
    assert (fake.exchanges[0].path, fake.exchanges[0].query) == ("/sdapi/v1/img2img", "a=1")
    for target in (b"*", b"elsewhere.example:80"):
        answer = await bridge.raw(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert parsed(answer)[0] in (400, 404)


async def test_bytes_in_a_target_that_may_not_be_there(bridge: Bridge, fake: FakeControlPlane) -> None:
    target = "/user/img2img?q=猫".encode() + b"\xff"
    request = b"POST " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    status, _, _ = parsed(await bridge.raw(request))
    if status == 200:  # aiohttp's parser may refuse it first
        assert fake.exchanges[0].query == "q=%E7%8C%AB%FF"
    else:
        assert status == 400


async def test_head_is_get_without_a_body(bridge: Bridge, fake: FakeControlPlane) -> None:
    task_id = fake.add_task(state=pb.TASK_STATE_QUEUED)
    fake.add_task()
    for path in (f"/user/queryTask?taskID={task_id}", "/user/queryTaskList", "/healthz", "/docs"):
        async with bridge.client.head(bridge.url + path, headers=BEARER) as response:
            assert response.status == 200
            assert await response.read() == b""
    async with bridge.client.get(bridge.url + "/healthz") as response:
        assert response.status == 200


async def test_http_1_0(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.add_task()
    head = f"Host: x\r\nAuthorization: {WORKSPACE}\r\n\r\n".encode()
    status, headers, body = parsed(await bridge.raw(b"GET /user/queryTaskList HTTP/1.0\r\n" + head))
    assert (status, json.loads(body)["result_size"]) == (200, 1)
    assert "Transfer-Encoding" not in headers
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    for _ in range(2):
        writer.write(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"Connection: keep-alive" in await reader.readuntil(b"}")
    writer.close()


async def test_pipelined_requests_are_answered_in_order(bridge: Bridge) -> None:
    requests = b"".join(
        b'POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{"data":"%d"}' % (len(str(n)) + 11, n)
        for n in range(20)
    )
    answer = await bridge.raw(requests + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert re.findall(rb'"data":"(\d+)"', answer) == [b"%d" % n for n in range(20)]


async def test_100_continue(bridge: Bridge) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 12\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b'{"data":"a"}')
    answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_body_that_comes_too_slowly(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(stall_time=0.05)
    status, headers, body = parsed(
        await bridge.raw(b'POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"da')
    )
    assert (status, json.loads(body)["result_code"]) == (408, 408)
    assert headers["Connection"] == "close"
    bridge = await start_bridge(body_time=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    answer = asyncio.create_task(reader.readuntil(b"}"))
    while not answer.done():
        writer.write(b" ")
        await asyncio.sleep(0.01)
    assert (await answer).startswith(b"HTTP/1.1 408 ")
    writer.close()
    assert not fake.tasks


async def test_a_head_that_comes_too_slowly(start_bridge: StartBridge) -> None:
    bridge = await start_bridge(idle_time=0.1)
    assert await bridge.raw(b"GET /healthz HTTP/1.1\r\nHos") == b""
    assert await bridge.raw(b"") == b""


async def test_a_reader_who_has_stopped_reading(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(stall_time=0.2)

    async def container(exchange: Exchange) -> Answer:
        return Answer(b"x" * 20_000_000)

    fake.container = container
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port, limit=1024)
    writer.write(
        f"POST /user/x HTTP/1.1\r\nHost: x\r\nAuthorization: {WORKSPACE}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    # Longer than the limit; what stands in the kernel's buffers is far less than the answer.
    await asyncio.sleep(1)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(20_000_000)
    writer.close()


async def test_large_bodies_have_one_budget(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(body_limit=150_000, body_memory=200_000)
    head = b"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 150000\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(head + b"x" * 100_000)
    while True:
        metrics = await (await bridge.client.get(bridge.url + "/metrics")).text()
        if "ngpu_bridge_body_memory_bytes 150000.0" in metrics:
            break
    png = {"Content-Type": "image/png"}
    status, answer, headers = await bridge.post("/user/img2img", data=b"x" * 70_000, headers=png)
    assert (status, answer["result_code"], headers["Retry-After"]) == (503, 503, "1")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 10_000

    status, _, _ = await bridge.post("/user/img2img", data=chunks(), headers=png)
    assert status == 503
    # Small ones are not counted.
    status, _, _ = await bridge.post("/user/img2img", data=b"x" * 60_000, headers=png)
    assert status == 200
    writer.write(b"x" * 50_000)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    status, _, _ = await bridge.post("/user/img2img", data=b"x" * 150_000, headers=png)
    assert status == 200
    # One that goes away gives back what it held.
    _, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write(head + b"x" * 100_000)
    writer.close()
    for _ in range(100):
        status, _, _ = await bridge.post("/user/img2img", data=b"x" * 150_000, headers=png)
        if status == 200:
            break
    assert status == 200


async def test_a_full_house(start_bridge: StartBridge) -> None:
    bridge = await start_bridge(max_connections=2)
    streams = [await asyncio.open_connection("127.0.0.1", bridge.port) for _ in range(2)]
    for reader, writer in streams:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    status, headers, body = parsed(await bridge.raw(b""))
    assert (status, json.loads(body)["result_code"], headers["Retry-After"]) == (503, 503, "1")
    streams[0][1].close()
    await streams[0][1].wait_closed()
    for _ in range(100):
        answer = await bridge.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        if parsed(answer)[0] == 200:
            break
    assert parsed(answer)[0] == 200
    streams[1][1].close()


async def test_a_fault_of_ours_is_not_explained_to_callers(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge()
    fake.holdings["bc1x"] = {"AINN": "not a number"}
    status, answer, headers = await bridge.get("/brc20/checkAddress?address=bc1x")
    assert (status, answer["result_code"]) == (500, 500)
    assert "X-Request-Id" in answer["msg"]
    assert "not a number" not in json.dumps([answer, *headers.items()])
