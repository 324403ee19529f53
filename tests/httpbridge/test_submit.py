"""Work is given: where it goes, what the container gets, what the caller gets back."""

import asyncio
import base64
import json
from urllib.parse import quote

import aiohttp
import grpc
import pytest
from ngpu.v1 import task_pb2 as pb

from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import (
    OTHER_WORKSPACE,
    RICH,
    WORKSPACE,
    Answer,
    Broken,
    Container,
    Exchange,
    FakeControlPlane,
    Refused,
)


def answering(body: bytes = b"", status: int = 200, **headers: str) -> Container:
    async def container(exchange: Exchange) -> Answer:
        return Answer(body, status, [(name.replace("_", "-"), value.encode()) for name, value in headers.items()])

    return container


async def test_a_published_name_needs_no_header(bridge: Bridge, fake: FakeControlPlane) -> None:
    status, answer, headers = await bridge.post("/user/img2img?seed=1&x=%20", json={"data": "{}"})
    assert (status, answer["data"]) == (200, "{}")
    assert headers["X-NGPU-Task-Id"] == answer["taskID"]
    assert (fake.exchanges[0].port, fake.exchanges[0].path, fake.exchanges[0].query) == (
        8081, "/sdapi/v1/img2img", "seed=1&x=%20",
    )  # fmt: skip


async def test_a_published_name_may_have_slashes(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.routes["sdapi/v1/img2img"] = (OTHER_WORKSPACE, 9000, "/run")
    await bridge.post("/user/sdapi/v1/img2img", json={"data": ""})
    assert (fake.exchanges[0].port, fake.exchanges[0].path) == (9000, "/run")


async def test_a_stranger_may_not_choose_the_port_of_a_published_name(bridge: Bridge, fake: FakeControlPlane) -> None:
    await bridge.post("/user/img2img?paramPort=8080", json={"data": ""})
    assert (fake.exchanges[0].port, fake.exchanges[0].query) == (8081, "")


async def test_with_a_header_it_is_the_callers_workspace(bridge: Bridge, fake: FakeControlPlane) -> None:
    bearer = {"Authorization": f"Bearer {OTHER_WORKSPACE}"}
    status, _, _ = await bridge.post("/user/img2img", json={"data": ""}, headers=bearer)
    assert status == 200
    assert (fake.exchanges[0].port, fake.exchanges[0].path) == (9000, "/img2img")
    await bridge.post("/user/a/b%20c?paramPort=8081&paramUrl=x&k=v", json={"data": ""}, headers=BEARER)
    assert (fake.exchanges[1].port, fake.exchanges[1].path, fake.exchanges[1].query) == (8081, "/a/b%20c", "k=v")


async def test_neither_header_nor_published_name(bridge: Bridge, fake: FakeControlPlane) -> None:
    status, answer, headers = await bridge.post("/user/txt2img", json={"data": ""})
    assert (status, answer["result_code"], headers["WWW-Authenticate"]) == (401, 401, "Bearer")
    assert not fake.tasks


async def test_reserved_names_win_and_are_reached_otherwise(bridge: Bridge, fake: FakeControlPlane) -> None:
    for path in ("/user/queryTask", "/user/query%54ask", "/user/queryTask/", "/user/queryTask&a=b"):
        status, answer, headers = await bridge.post(path, json={"data": ""}, headers=BEARER)
        assert (status, answer["result_code"], headers["Allow"]) == (405, 405, "GET, HEAD")
    assert not fake.tasks
    await bridge.post("/user/schedulingTask?paramUrl=user/queryTask&taskMode=Sync", json={}, headers=BEARER)
    assert fake.exchanges[0].path == "/user/queryTask"


async def test_task_mode(bridge: Bridge, fake: FakeControlPlane) -> None:
    _, answer, _ = await bridge.post(
        "/user/schedulingTask?paramUrl=x&taskMode=Sync", json={"data": "a"}, headers=BEARER
    )
    assert answer["data"] == "a"
    _, answer, _ = await bridge.post("/user/x?taskMode=Async", json={"data": "a"}, headers=BEARER)
    assert answer["taskId"] == answer["taskID"]
    assert [request.HasField("wait") for request in fake.scheduled] == [True, False]


async def test_the_record_says_who_called_and_how(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(trusted_proxies=["127.0.0.0/8", "10.0.0.0/8"])
    agent = {"User-Agent": "curl/8", "X-Forwarded-For": "1.1.1.1, 94.74.66.215, 10.0.0.7"}
    await bridge.post("/user/sdapi/v1/x?a=%20", json={}, headers=BEARER | agent)
    await bridge.post("/user/schedulingTask&paramUrl=create", json={}, headers=BEARER)
    first, second = (request.origin for request in fake.scheduled)
    assert (first.user_ip, first.url, first.operation, first.user_agent) == (
        "94.74.66.215", "/user/sdapi/v1/x?a=%20", "sdapi", "curl/8",
    )  # fmt: skip
    assert (second.user_ip, second.url, second.operation) == (
        "127.0.0.1", "/user/schedulingTask&paramUrl=create", "schedulingTask",
    )  # fmt: skip


async def test_nobody_is_believed_who_is_no_proxy_of_ours(bridge: Bridge, fake: FakeControlPlane) -> None:
    await bridge.post("/user/img2img", json={}, headers={"X-Forwarded-For": "1.1.1.1"})
    assert fake.scheduled[0].origin.user_ip == "127.0.0.1"


async def test_headers_end_to_end_travel_and_the_platforms_do_not(bridge: Bridge, fake: FakeControlPlane) -> None:
    sent = {
        "Accept": "image/png", "Cookie": "a=b", "X-Custom": "ü", "X-Forwarded-For": "1.2.3.4",
        "Connection": "keep-alive, X-Hop", "X-Hop": "1", "Keep-Alive": "timeout=5", "TE": "trailers",
        "X-NGPU-Port": "1", "x_ngpu_workspace": "2", "BtcAddress": RICH, "Idempotency-Key": "k",
        "Accept-Encoding": "gzip", "Proxy-Authorization": "Basic eA==",
    }  # fmt: skip
    await bridge.post("/user/x", json={"data": "a"}, headers=BEARER | sent)
    got = dict(fake.exchanges[0].headers)
    assert {name: value.decode() for name, value in got.items()} == {
        "Accept": "image/png",
        "Cookie": "a=b",
        "X-Custom": "ü",
        "X-Forwarded-For": "1.2.3.4",
        "Content-Type": "text/plain; charset=utf-8",
    }


@pytest.mark.parametrize(
    ("status", "http_status"),
    [(201, 200), (302, 502), (400, 400), (404, 404), (422, 422), (429, 429), (500, 502), (503, 502)],
)  # fmt: skip
async def test_the_containers_own_status(bridge: Bridge, fake: FakeControlPlane, status: int, http_status: int) -> None:
    fake.container = answering(b'{"detail": "so"}', status, Retry_After="7")
    got, answer, headers = await bridge.post("/user/x", json={}, headers=BEARER)
    ruled = 200 if status < 300 else status
    assert (got, answer["result_code"], answer["data"]) == (http_status, ruled, '{"detail": "so"}')
    assert (answer["msg"] == "success") == (ruled == 200)
    assert str(status) in answer["msg"] or ruled == 200
    assert headers.get("Retry-After") == ("7" if status == 429 else None)
    # The task is completed all the same: it was answered.
    queried, asked, _ = await bridge.get(f"/user/queryTask?taskID={answer['taskID']}")
    assert (queried, asked["result_code"], asked["data"]) == (200, ruled, '{"detail": "so"}')


@pytest.mark.parametrize(
    ("reason", "http_status", "code"),
    [
        ("NODE_LOST", 502, 500),
        ("OUTCOME_UNKNOWN", 502, 500),
        ("QUEUE_TIME_LIMIT", 504, 504),
        ("RUN_TIME_LIMIT", 504, 504),
        ("TOTAL_TIME_LIMIT", 504, 504),
    ],
)
async def test_tasks_without_an_answer(
    bridge: Bridge, fake: FakeControlPlane, reason: str, http_status: int, code: int
) -> None:
    async def container(exchange: Exchange) -> Answer:
        raise Broken(reason, "in words")

    fake.container = container
    status, answer, headers = await bridge.post("/user/x", json={}, headers=BEARER)
    assert (status, answer["result_code"], answer["msg"], answer["data"]) == (http_status, code, "in words", "")
    status, asked, _ = await bridge.get(f"/user/queryTask?taskID={headers['X-NGPU-Task-Id']}")
    assert (status, asked["result_code"], asked["msg"]) == (200, code, "in words")
    _, detail, _ = await bridge.get(f"/user/getDetailed?taskID={answer['taskID']}")
    info = detail["taskInfo"]
    assert (info["state"], info["response"], info["ext"]["error"]["reason"]) == (-1, "", reason)
    # What the platform caused costs nothing.
    assert info["gpudursion"] == 0


@pytest.mark.parametrize("body", [b"\x89PNG\r\n\x1a\n\x00\xff", bytes(range(256)) * 1000])
async def test_a_body_that_is_no_text_is_base64(bridge: Bridge, fake: FakeControlPlane, body: bytes) -> None:
    fake.container = answering(body)
    _, answer, _ = await bridge.post("/user/x", json={}, headers=BEARER)
    assert base64.b64decode(answer["data"]) == body
    assert answer["data_encoding"] == "base64"
    _, asked, _ = await bridge.get(f"/user/queryTask?taskID={answer['taskID']}")
    assert (asked["data"], asked["data_encoding"], asked["result_size"]) == (answer["data"], "base64", len(body))
    _, detail, _ = await bridge.get(f"/user/getDetailed?taskID={answer['taskID']}")
    assert detail["taskInfo"]["response"] == answer["data"]
    assert detail["taskInfo"]["ext"]["responseEncoding"] == "base64"


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 300_000, 3_000_001])
async def test_bodies_of_all_sizes_both_ways(bridge: Bridge, fake: FakeControlPlane, size: int) -> None:
    text = ('猫"\\\n' * (size // 6 + 1)).encode()[:size].decode("utf-8", "ignore")
    _, answer, _ = await bridge.post("/user/x", json={"data": text}, headers=BEARER)
    assert fake.exchanges[0].body == text.encode()
    assert answer["data"] == text
    _, asked, _ = await bridge.get(f"/user/queryTask?taskID={answer['taskID']}")
    assert (asked["data"], asked["result_size"]) == (text, len(text.encode()))
    _, detail, _ = await bridge.get(f"/user/getDetailed?taskID={answer['taskID']}", headers=BEARER)
    info = detail["taskInfo"]
    assert (info["request"], info["response"]) == (text, text)
    assert (info["ext"]["requestSize"], info["ext"]["responseSize"]) == (len(text.encode()),) * 2
    assert not fake.uploads


async def test_a_broken_download_goes_on_where_it_was(bridge: Bridge, fake: FakeControlPlane) -> None:
    text = "".join(f"{n:08d}" for n in range(500_000))
    fake.container = answering(text.encode())
    fake.break_after["Watch"] = 2
    _, answer, _ = await bridge.post("/user/x", json={}, headers=BEARER)
    assert answer["data"] == text
    assert not fake.break_after


async def test_a_download_that_cannot_begin_or_go_on(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.container = answering(b"x" * 100_000)
    fake.refuse["Watch"] = Refused(grpc.StatusCode.FAILED_PRECONDITION, "EXPIRED", "past its retention")
    # It is known before anything is sent, and then told.
    status, answer, headers = await bridge.post("/user/x", json={}, headers=BEARER)
    assert (status, answer["result_code"]) == (410, 410)
    task_id = headers["X-NGPU-Task-Id"]
    status, answer, _ = await bridge.get(f"/user/queryTask?taskID={task_id}")
    assert (status, answer["result_code"]) == (410, 410)
    # What else is known of the task outlives its bodies.
    fake.tasks[task_id].body = b"x" * 3_000_000
    fake.tasks[task_id].response_body = b"x" * 3_000_000
    status, answer, _ = await bridge.get(f"/user/getDetailed?taskID={task_id}")
    info = answer["taskInfo"]
    assert (status, info["request"], info["response"], info["state"]) == (200, "", "", 3)
    assert (info["ext"]["requestGone"], info["ext"]["responseGone"]) == (True, True)
    # Later it can only be told by breaking off.
    fake.refuse.clear()
    fake.break_after["Watch"] = 2
    with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012
        async with bridge.client.get(f"{bridge.url}/user/queryTask?taskID={task_id}") as response:
            assert response.status == 200
            fake.refuse["Watch"] = Refused(grpc.StatusCode.INTERNAL, "INTERNAL", "broken")
            await response.read()


async def test_a_call_that_outlives_its_limit(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(sync_wait=1)
    go_on = asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        await go_on.wait()
        return Answer(b"late")

    fake.container = container
    status, answer, headers = await bridge.post("/user/x", json={}, headers=BEARER)
    assert (status, answer["result_code"], answer["data"]) == (202, 101, "")
    assert headers["X-NGPU-Task-Id"] == answer["taskID"]
    go_on.set()
    _, asked, _ = await bridge.get(f"/user/queryTask?taskID={answer['taskID']}&wait=10")
    assert (asked["result_code"], asked["data"]) == (200, "late")


async def test_a_caller_who_hangs_up_cancels(bridge: Bridge, fake: FakeControlPlane) -> None:
    reached = asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    fake.container = container
    for headers, cancelled in ((BEARER, True), (BEARER | {"Idempotency-Key": "again"}, False)):
        reached.clear()
        call = asyncio.create_task(bridge.post("/user/x", json={}, headers=headers))
        await reached.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        asked = len(fake.abandoned)
        while len(fake.abandoned) == asked:
            await asyncio.sleep(0)
        task = list(fake.tasks.values())[-1]
        if cancelled:
            await task.ended.wait()
            assert task.view.state == pb.TASK_STATE_CANCELLED
        else:
            # Who may repeat his call wants his task.
            assert task.view.state == pb.TASK_STATE_RUNNING
    assert bridge.control_plane.batch.in_flight == 0


async def test_same_key_same_task(bridge: Bridge, fake: FakeControlPlane) -> None:
    key = BEARER | {"Idempotency-Key": "k 1"}
    answers = await asyncio.gather(
        *(bridge.post("/user/schedulingTask?paramUrl=x", json={"data": "a"}, headers=key) for _ in range(5))
    )
    assert len({answer["taskID"] for _, answer, _ in answers}) == 1
    assert len(fake.exchanges) == 1
    status, answer, _ = await bridge.post("/user/schedulingTask?paramUrl=x", json={"data": "b"}, headers=key)
    assert (status, answer["result_code"]) == (409, 409)
    other = {"Authorization": OTHER_WORKSPACE, "Idempotency-Key": "k 1"}
    status, answer, _ = await bridge.post("/user/schedulingTask?paramUrl=x", json={"data": "a"}, headers=other)
    assert (status, len(fake.exchanges)) == (200, 2)


async def test_a_key_belongs_to_a_workspace(bridge: Bridge, fake: FakeControlPlane) -> None:
    # Strangers would share their keys, and so their results.
    status, answer, _ = await bridge.post("/user/img2img", json={}, headers={"Idempotency-Key": "1"})
    assert (status, answer["result_code"]) == (400, 400)
    assert not fake.tasks


CALLBACK = "https://example.com/ended?a=b"


async def test_callback_url_is_passed_on_and_does_not_travel(bridge: Bridge, fake: FakeControlPlane) -> None:
    quoted = quote(CALLBACK, safe="")
    header = BEARER | {"X-NGPU-Callback-Url": CALLBACK}
    await bridge.post(f"/user/schedulingTask?paramUrl=x&callback_url={quoted}&k=v", json={"data": "a"}, headers=BEARER)
    await bridge.post("/user/schedulingTask?paramUrl=x&k=v", json={"data": "a"}, headers=header)
    await bridge.post(f"/user/x?callback_url={quoted}&k=v", json={"data": "a"}, headers=header)
    assert [asked.callback_url for asked in fake.scheduled] == [CALLBACK] * 3
    for exchange in fake.exchanges:
        assert exchange.query == "k=v"
        assert exchange.header("x-ngpu-callback-url") is None


@pytest.mark.parametrize("url", ["", "a b", "ü", "x" * 2049])
async def test_callback_url_that_is_none(bridge: Bridge, fake: FakeControlPlane, url: str) -> None:
    path = f"/user/schedulingTask?paramUrl=x&callback_url={quote(url)}"
    status, answer, _ = await bridge.post(path, json={}, headers=BEARER)
    assert (status, answer["result_code"]) == (400, 400)
    assert "callback_url" in answer["msg"]
    assert not fake.tasks


async def test_two_callback_urls(bridge: Bridge, fake: FakeControlPlane) -> None:
    path = "/user/x?callback_url=https://example.com/other"
    status, _, _ = await bridge.post(path, json={}, headers=BEARER | {"X-NGPU-Callback-Url": CALLBACK})
    assert status == 400
    assert not fake.tasks


async def test_strangers_have_nothing_posted(bridge: Bridge, fake: FakeControlPlane) -> None:
    # It would be signed in the workspace's name.
    status, answer, _ = await bridge.post("/user/img2img", json={}, headers={"X-NGPU-Callback-Url": CALLBACK})
    assert (status, answer["result_code"]) == (400, 400)
    assert not fake.tasks


async def test_who_is_told_of_the_end_need_not_wait(bridge: Bridge, fake: FakeControlPlane) -> None:
    await bridge.post("/user/x", json={}, headers=BEARER)
    await bridge.post("/user/x", json={}, headers=BEARER | {"X-NGPU-Callback-Url": CALLBACK})
    assert [asked.cancel_on_hangup for asked in fake.scheduled] == [True, False]


@pytest.mark.parametrize("how", ["envelope", "payload", "header"])
async def test_assets_are_asked_for(bridge: Bridge, fake: FakeControlPlane, how: str) -> None:
    async def call(address: str) -> int:
        body = {"envelope": {"btc_address": address, "data": ""}, "payload": {"btc_address": address, "a": 1}}
        headers = {"BtcAddress": address} if how == "header" else {}
        status, answer, _ = await bridge.post("/user/img2img", json=body.get(how, {"a": 1}), headers=headers)
        assert answer["result_code"] == status
        return status

    assert await call(RICH) == 200
    assert await call("") == 200
    assert await call("bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq") == 403
    assert await call("nonsense") == 400
    assert await call("x" * 129) == 400
    assert len(fake.tasks) == 2


async def test_the_envelopes_address_wins_over_the_headers(bridge: Bridge, fake: FakeControlPlane) -> None:
    await bridge.post("/user/img2img", json={"btc_address": RICH, "data": ""}, headers={"BtcAddress": "nonsense"})
    assert fake.scheduled[0].btc_address == RICH


async def test_all_of_it_under_require_auth(start_bridge: StartBridge, fake: FakeControlPlane) -> None:
    bridge = await start_bridge(require_auth=True)
    task_id = fake.add_task(state=pb.TASK_STATE_QUEUED)
    calls = [
        ("POST", "/user/img2img"),
        ("GET", f"/user/queryTask?taskID={task_id}"),
        ("GET", f"/user/getDetailed?taskID={task_id}"),
        ("DELETE", f"/user/task?taskID={task_id}"),
        ("GET", f"/brc20/checkAddress?address={RICH}"),
    ]
    for method, path in calls:
        status, _, _ = await bridge.call(method, path)
        assert status == 401, path
    for method, path in calls:
        status, _, _ = await bridge.call(method, path, headers=BEARER)
        assert status == 200, path
    status, _, _ = await bridge.get(f"/brc20/checkAddress?address={RICH}", headers={"Authorization": "123"})
    assert status == 401


async def test_many_calls_share_frames(bridge: Bridge, fake: FakeControlPlane) -> None:
    answers = await asyncio.gather(*(bridge.post("/user/x", json={"data": str(n)}, headers=BEARER) for n in range(300)))
    assert [answer["data"] for _, answer, _ in answers] == [str(n) for n in range(300)]
    assert sum(fake.frames) == 300
    assert len(fake.frames) < 150
    assert max(fake.frames) <= 256
    assert WORKSPACE not in json.dumps(answers[0][1])


@pytest.mark.parametrize(("said", "priority"), [("5", 5), ("+3", 3), ("-5", -5), ("0", 0), (None, 0)])
async def test_priority_is_passed_on_and_does_not_travel(
    bridge: Bridge, fake: FakeControlPlane, said: str | None, priority: int
) -> None:
    header = BEARER if said is None else BEARER | {"X-NGPU-Priority": said}
    for path in ("/user/schedulingTask?paramUrl=x", "/user/x", "/run/x"):
        await bridge.post(path, json={"data": "a"}, headers=header)
    assert [asked.priority for asked in fake.scheduled] == [priority] * 3
    for exchange in fake.exchanges:
        assert exchange.header("x-ngpu-priority") is None


@pytest.mark.parametrize("said", ["6", "-6", "", "1.5", "high", "55"])
async def test_priority_that_is_none(bridge: Bridge, fake: FakeControlPlane, said: str) -> None:
    for path in ("/user/schedulingTask?paramUrl=x", "/run/x"):
        status, answer, _ = await bridge.post(path, json={}, headers=BEARER | {"X-NGPU-Priority": said})
        assert (status, answer["result_code"]) == (400, 400)
        assert "X-NGPU-Priority" in answer["msg"]
    assert not fake.tasks
