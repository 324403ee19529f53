"""What public clients of the original send and expect: each form works by changing a host name."""

import asyncio
import json

import aiohttp
import pytest

from tests.httpbridge.conftest import Bridge
from tests.httpbridge.fake_controlplane import NODE_ADDR, RICH, WORKSPACE, Answer, Exchange, FakeControlPlane


@pytest.mark.parametrize(
    "authorization", [f"Bearer {WORKSPACE}", f"Bearer ngpu_{WORKSPACE}", WORKSPACE, f"ngpu_{WORKSPACE}"]
)
async def test_spellings_of_the_credential(bridge: Bridge, fake: FakeControlPlane, authorization: str) -> None:
    status, answer, _ = await bridge.post(
        "/user/schedulingTask?paramUrl=create", json={"data": ""}, headers={"Authorization": authorization}
    )
    assert (status, answer["result_code"]) == (200, 200)
    assert fake.scheduled[0].workspace_id == WORKSPACE
    # Our own credential stays ours.
    assert fake.exchanges == [] or fake.exchanges[0].header("Authorization") is None


async def test_submit_then_poll_then_parse(bridge: Bridge, fake: FakeControlPlane) -> None:
    """Integer 200 and taskId on submit; polled until 200 and a size; data parsed as JSON text."""
    go_on = asyncio.Event()

    async def container(exchange: Exchange) -> Answer:
        await go_on.wait()
        return Answer(b'{"task_id": "37a41eba", "n": ' + exchange.body + b"}")

    fake.container = container
    bearer = {"Authorization": f"Bearer ngpu_{WORKSPACE}"}
    _, submitted, _ = await bridge.post(
        "/user/schedulingTask?paramUrl=create", json={"btc_address": "", "data": "5"}, headers=bearer
    )
    assert submitted["result_code"] == 200
    assert type(submitted["result_code"]) is int
    for polls in range(100):
        _, polled, _ = await bridge.get(f"/user/queryTask?taskID={submitted['taskId']}", headers=bearer)
        if polled["result_code"] == 200 and polled["result_size"] > 0:
            break
        assert polled["result_code"] in (100, 101)
        if polls == 2:
            go_on.set()
    assert json.loads(polled["data"]) == {"task_id": "37a41eba", "n": 5}


async def test_btc_address_as_a_header_and_the_containers_raw_json(bridge: Bridge, fake: FakeControlPlane) -> None:
    status, _, _ = await bridge.post(
        "/user/img2img", data=b'{"prompt": "cat",  "steps": 20}',
        headers={"BtcAddress": RICH, "Content-Type": "application/json"},
    )  # fmt: skip
    assert status == 200
    assert fake.scheduled[0].btc_address == RICH
    assert fake.exchanges[0].body == b'{"prompt": "cat",  "steps": 20}'
    assert fake.exchanges[0].header("BtcAddress") is None
    assert fake.exchanges[0].header("Content-Type") == "application/json"


async def test_btc_address_in_the_containers_raw_json(bridge: Bridge, fake: FakeControlPlane) -> None:
    await bridge.post("/user/img2img", json={"btc_address": RICH, "prompt": "cat"})
    assert fake.scheduled[0].btc_address == RICH
    assert json.loads(fake.exchanges[0].body) == {"prompt": "cat"}


async def test_multipart_passes_byte_for_byte(bridge: Bridge, fake: FakeControlPlane) -> None:
    form = aiohttp.FormData()
    form.add_field("image", bytes(range(256)), filename="a.png", content_type="image/png")
    form.add_field("prompt", "cat")
    await bridge.post("/user/img2img", data=form)
    exchange = fake.exchanges[0]
    content_type = exchange.header("Content-Type")
    assert content_type is not None
    assert content_type.startswith("multipart/form-data; boundary=")
    boundary = content_type.partition("boundary=")[2].encode()
    assert exchange.body.startswith(b"--" + boundary)
    assert exchange.body.rstrip().endswith(b"--" + boundary + b"--")
    assert bytes(range(256)) in exchange.body


@pytest.mark.parametrize("size", [100, 100_000])
async def test_an_image_passes_byte_for_byte(bridge: Bridge, fake: FakeControlPlane, size: int) -> None:
    image = b"\x89PNG\r\n\x1a\n" + bytes(i % 256 for i in range(size))
    _, answer, _ = await bridge.post("/user/img2img", data=image, headers={"Content-Type": "image/png"})
    assert fake.exchanges[0].body == image
    assert fake.exchanges[0].header("Content-Type") == "image/png"
    assert answer["data_encoding"] == "base64"


async def test_curl_says_that_json_is_a_form(bridge: Bridge, fake: FakeControlPlane) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Expect": "100-continue"}
    body = b'{"btc_address": "", "data": {"prompt": "a cat"}}'
    await bridge.post("/user/img2img", data=body, headers=headers)
    assert fake.exchanges[0].body == b'{"prompt":"a cat"}'
    assert fake.exchanges[0].header("Content-Type") == "application/json"
    assert fake.exchanges[0].header("Expect") is None


async def test_nodes_tasks_of_a_node_and_get_task(bridge: Bridge, fake: FakeControlPlane) -> None:
    bearer = {"Authorization": WORKSPACE}
    _, submitted, _ = await bridge.post("/user/x", json={"data": ""}, headers=bearer)
    _, nodes, _ = await bridge.get("/user/queryNodes", headers=bearer)
    assert nodes.keys() == {"result_code", "msg", "result_size", "nodes"}
    _, tasks, _ = await bridge.get(
        f"/user/getTasksFromNode?nodeAddr={NODE_ADDR}&startTime=2024-01-01&endTime=2099-01-01", headers=bearer
    )
    assert tasks["taskIds"] == [submitted["taskID"]]
    _, detailed, _ = await bridge.get(f"/user/getDetailed?taskID={submitted['taskID']}", headers=bearer)
    _, task, _ = await bridge.get(f"/user/getTask?taskID={submitted['taskID']}", headers=bearer)
    assert task == {"result_code": 200, "msg": "success", "task": detailed["taskInfo"]}
    assert task["task"]["state"] == 3
