"""Bad input of every kind that rest.md names: its documented error, always JSON, and nothing is created."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import WORKSPACE, FakeControlPlane, Refused

SUBMIT = "/user/schedulingTask"
LARGE = b'{"data": "' + b"x" * 100_000 + b'"}'
TASK = "taskID=20240415_14_30_09_891041"

BAD_CALLS: list[tuple[str, str, dict[str, Any], int]] = [
    # Credentials.
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": {}}, 401),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": {"Authorization": ""}}, 401),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": {"Authorization": "Bearer "}}, 401),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": {"Authorization": "Basic dTpw"}}, 401),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": {"Authorization": "Bearer 99"}}, 401),
    ("POST", "/user/x", {"headers": {"Authorization": "Bearer 99"}}, 401),
    ("POST", "/user/img2img", {"headers": {"Authorization": "nonsense"}}, 401),
    ("POST", "/user/img2img", {"headers": {"Authorization": "Bearer 99"}, "data": LARGE}, 401),
    ("POST", "/user/unpublished", {"headers": {}, "data": LARGE}, 401),
    # Paths.
    ("POST", SUBMIT, {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&paramUrl=y", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=http://evil.example/", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=http%3A%2F%2Fevil.example", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=//evil.example", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=%252F%252Fevil.example", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=../etc", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=%252e%252e/etc", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=a%5Cb", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=a%0D%0AX-Evil:1", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=a%00", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=%FF", {}, 400),
    ("POST", "/user/..%2fetc", {}, 400),
    ("POST", "/user//evil.example", {}, 400),
    ("POST", "/user/a%5cb", {}, 400),
    ("POST", "/user/a%0d%0ab", {}, 400),
    # Ports, modes, keys.
    ("POST", f"{SUBMIT}?paramUrl=x&paramPort=", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&paramPort=0", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&paramPort=65536", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&paramPort=http", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&paramPort=8080&paramPort=8081", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&paramPort=22", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x&taskMode=Later", {}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": BEARER | {"Idempotency-Key": "x" * 256}}, 400),
    # Bodies.
    ("POST", f"{SUBMIT}?paramUrl=x", {"data": b'{"data": '}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"data": b'{"data": "\xff"}'}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"data": b'{"btc_address": 1, "data": ""}'}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"data": b'{"btc_address": "' + b"x" * 200 + b'"}'}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"data": b'{"btc_address": "0000000000000000000000000GFg7xJaNVN2"}'}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": BEARER | {"BtcAddress": "x" * 200}}, 400),
    ("POST", f"{SUBMIT}?paramUrl=x", {"headers": BEARER | {f"X-{n}": "v" * 5000 for n in range(8)}}, 400),
    # Tasks.
    ("GET", "/user/queryTask", {}, 400),
    ("GET", "/user/queryTask?taskID=", {}, 400),
    ("GET", "/user/queryTask&taskID=1;drop", {}, 400),
    ("GET", f"/user/queryTask?taskID={'9' * 500}", {}, 400),
    ("GET", f"/user/queryTask?{TASK}&{TASK}", {}, 400),
    ("GET", f"/user/queryTask?{TASK}&wait=soon", {}, 400),
    ("GET", f"/user/queryTask?{TASK}&wait=-1", {}, 400),
    ("GET", f"/user/queryTask?{TASK}", {}, 404),
    ("GET", "/user/getDetailed", {}, 400),
    ("GET", f"/user/getDetailed?{TASK}", {}, 404),
    ("GET", f"/user/getTask?{TASK}", {}, 404),
    ("DELETE", "/user/task", {}, 400),
    ("DELETE", f"/user/task?{TASK}", {}, 404),
    # Lists.
    ("GET", "/user/queryTaskList?startTime=yesterday", {}, 400),
    ("GET", "/user/queryTaskList?endTime=2024-02-30", {}, 400),
    ("GET", "/user/queryTaskList?limit=0", {}, 400),
    ("GET", "/user/queryTaskList?cursor=%20", {}, 400),
    ("GET", "/user/getTasksFromNode", {}, 400),
    ("GET", "/user/getTasksFromNode?nodeAddr=0x1", {}, 400),
    # Addresses.
    ("GET", "/brc20/checkAddress", {}, 400),
    ("GET", "/brc20/checkAddress&address=", {}, 400),
    ("GET", "/brc20/checkAddress?address=nonsense", {}, 400),
    ("GET", f"/brc20/checkAddress?address={'1' * 200}", {}, 400),
    # What is not there.
    ("GET", "/", {}, 404),
    ("GET", "/user", {}, 404),
    ("POST", "/nonsense", {}, 404),
    ("GET", "/user/img2img", {}, 405),
    ("PUT", "/user/img2img", {}, 405),
    ("POST", "/user/queryTask", {}, 405),
    ("GET", SUBMIT, {}, 405),
    ("OPTIONS", SUBMIT, {}, 405),
    ("PATCH", "/user/task", {}, 405),
    ("TRACE", "/docs", {}, 405),
]


@pytest.mark.parametrize(("method", "path", "options", "expected"), BAD_CALLS)
async def test_bad_calls_are_refused_in_words(
    bridge: Bridge, fake: FakeControlPlane, method: str, path: str, options: dict[str, Any], expected: int
) -> None:
    headers = {"Content-Type": "application/json"} | options.get("headers", BEARER)
    status, answer, got = await bridge.call(method, path, headers=headers, data=options.get("data"))
    assert (status, answer["result_code"]) == (expected, expected)
    assert answer.keys() == {"result_code", "msg"}
    assert answer["msg"]
    assert "Traceback" not in answer["msg"]
    assert WORKSPACE not in answer["msg"]
    assert ("WWW-Authenticate" in got) == (status == 401)
    assert ("Allow" in got) == (status == 405)
    assert not fake.tasks
    assert not fake.exchanges
    assert fake.uploads == {}


@pytest.mark.parametrize(
    ("code", "reason", "expected", "retry_after"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 429, "2"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED", 429, "2"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", 413, None),
        (grpc.StatusCode.PERMISSION_DENIED, "ASSET_MISSING", 403, None),
        (grpc.StatusCode.ALREADY_EXISTS, "CONFLICT", 409, None),
        (grpc.StatusCode.UNAVAILABLE, "NO_REPLICA", 503, "2"),
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", 503, "2"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_LIMIT", 504, None),
        (grpc.StatusCode.INTERNAL, "INTERNAL", 500, None),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", 503, "1"),
        (grpc.StatusCode.FAILED_PRECONDITION, "SOMETHING_NEW", 409, None),
        (grpc.StatusCode.DATA_LOSS, "SOMETHING_NEW", 500, None),
    ],
)
async def test_refusals_of_the_control_plane(
    bridge: Bridge, fake: FakeControlPlane, code: grpc.StatusCode, reason: str, expected: int, retry_after: str | None
) -> None:
    milliseconds = 1500 if retry_after == "2" else 0
    refused = Refused(code, reason, "in words", milliseconds)
    fake.refuse = {"Schedule": refused, "Upload": refused, "GetDetail": refused, "ListTasks": refused}
    for call in (
        bridge.post("/user/img2img", json={}),
        bridge.post("/user/img2img", json={"data": "x" * 70_000}),
        bridge.get(f"/user/getDetailed?{TASK}"),
    ):
        status, answer, headers = await call
        assert (status, answer["result_code"]) == (expected, expected)
        assert headers.get("Retry-After") == retry_after
        # What is not meant for callers is not told to them.
        assert (answer["msg"] == "in words") == (expected != 500 and reason != "UNAUTHENTICATED")


async def test_413_before_the_body_is_read(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(body_limit=1000)
    head = f"POST /user/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nConnection: close\r\n{'%s'}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
    writer.write((head % (10**12, "Expect: 100-continue\r\n")).encode())
    # Not one byte of it is sent.
    answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"result_code":413' in answer
    assert b"100 Continue" not in answer
    writer.close()
    for size, expected in ((1000, 200), (1001, 413)):
        status, answer_, _ = await bridge.post("/user/img2img", data=b"x" * size, headers={"Content-Type": "image/png"})
        assert (status, answer_["result_code"]) == (expected, expected)

        async def chunks(left: int = size) -> AsyncIterator[bytes]:
            while left:
                yield b"x" * min(left, 100)
                left -= min(left, 100)

        status, answer_, _ = await bridge.post("/user/img2img", data=chunks(), headers={"Content-Type": "image/png"})
        assert (status, answer_["result_code"]) == (expected, expected)
    assert len(fake.tasks) == 2
