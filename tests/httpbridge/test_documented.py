"""The examples of the original's documents, replayed as printed, the answers compared key by key and type by type."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from tests.httpbridge.conftest import BEARER, Bridge, StartBridge
from tests.httpbridge.fake_controlplane import RICH, WORKSPACE, Answer, Exchange, FakeControlPlane

IMG2IMG_REQUEST = {
    "image_url": "https://ngpu.ai/image/1683730315image.jpeg",
    "prompt": "manicured claws, score_9, score_8_up, score_7_up, score_6_up, score_5_up, score_4_up, 1girl, realistic, "
    "extremely detailed, high quality, , beautiful eyes, cat woman, black suit, character concept,night time, dark "
    "shadows, dutch angle",
}
IMG2IMG_RESPONSE = """{
	"result_code": 100,
	"msg": "SUCCESS! The video is currently in the queue waiting to be processed",
    "image_url": "https://ngpu.ai/image/16837303689.jpeg"
}"""
ENVELOPE = """{
    "btc_address": "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus",
    "data": ""
}"""
SYNC_RESPONSE = """{
	"result_code": 100,
	"msg": "SUCCESS! The video is currently in the queue waiting to be processed",
    "data": ""
}"""
ASYNC_RESPONSE = """{
	"result_code": 100,
	"msg": "SUCCESS! The video is currently in the queue waiting to be processed",
    "taskID": "20230423_11_23_05_10279"
}"""
QUERY_RESPONSE = """{
	"result_code": 100,
	"msg": "SUCCESS! The video is currently in the queue waiting to be processed",
    "taskID": "20230423_11_23_05_10279",
    "data": ""
}"""
CHECK_ADDRESS_RESPONSE = """{
	"exists": true,
	"names": [
		"AINN"
	],
	"balances": [
		100
	]
}"""
LIST_RESPONSE = """{
	"result_code": 200,
	"msg": "success",
	"result_size": 4,
	"taskIds": [
		"20240411_13_36_11_922124",
		"20240411_14_37_10_405715",
		"20240411_14_53_35_843805",
		"20240411_14_54_23_785178"
	]
}"""
DETAIL_RESPONSE = """{
	"result_code": 200,
	"msg": "success",
	"taskInfo": {
		"id": 2687,
		"userkey": "ts-22a51e64-a535-4c2a-8c20-3e7f2b4fbc2c",
		"btcaddress": "0000000000000000000000000GFg7xJaNVN2",
		"workspaceid": "367614711220405248",
		"taskid": "20240415_14_30_09_891041",
		"requrl": "/user/schedulingTask?paramUrl=create",
		"method": "schedulingTask",
		"userip": "94.74.66.215",
		"nodeip": "43.240.1.180",
		"nodeaddr": "0xCac10F51814E8e425a6877951fecb7746161c669",
		"requesttime": "2024-04-15 14:30:11",
		"responsetime": "2024-04-15 14:30:12",
		"request": "{\\"gz\\": true, \\"py\\": \\"H4sIAHHJ\\", \\"ts\\": \\"1713162609.246125\\"}",
		"state": 3,
		"response": "{\\"task_id\\": \\"37a41eba-23d2-4490-aca9-b84b1c2408f6\\"}",
		"recordDursion": 1,
		"videodursion": 0,
		"gpudursion": 1,
		"watermarktime": "",
		"watermarkres": ""
	}
}"""
JSON_TYPE = {"Content-Type": "application/json"}


def shapes(value: object) -> object:
    """A value with its leaves replaced by their types."""
    if isinstance(value, dict):
        return {key: shapes(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shapes(value[0])] if value else []
    return type(value)


def assert_documented(answer: dict[str, object], documented: str, *, more: set[str]) -> None:
    """`answer` has the documented keys with the documented types, and beside them exactly `more`."""
    expected = json.loads(documented)
    assert answer.keys() == expected.keys() | more
    assert shapes({key: answer[key] for key in expected}) == shapes(expected)


async def img2img(exchange: Exchange) -> Answer:
    return Answer(IMG2IMG_RESPONSE.encode())


async def test_synchronous(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.container = img2img
    status, answer, _ = await bridge.post("/user/img2img", data=ENVELOPE, headers=JSON_TYPE)
    assert status == 200
    assert_documented(answer, SYNC_RESPONSE, more={"taskID"})
    assert answer["result_code"] == 200
    # "Using pass-through, includes original API response body".
    assert answer["data"] == IMG2IMG_RESPONSE
    assert fake.scheduled[0].btc_address == RICH
    assert (fake.exchanges[0].path, fake.exchanges[0].body) == ("/sdapi/v1/img2img", b"")


async def test_synchronous_retains_the_original_request(bridge: Bridge, fake: FakeControlPlane) -> None:
    original = json.dumps(IMG2IMG_REQUEST, indent=4)
    await bridge.post("/user/img2img", json={"data": original})
    assert fake.exchanges[0].body == original.encode()
    assert fake.exchanges[0].header("Content-Type") == "application/json"


async def test_asynchronous(bridge: Bridge, fake: FakeControlPlane) -> None:
    fake.container = img2img
    status, answer, _ = await bridge.post(
        "/user/schedulingTask?paramUrl=sdapi/v1/img2img&paramPort=8080", data=ENVELOPE, headers=JSON_TYPE | BEARER
    )
    assert status == 200
    assert_documented(answer, ASYNC_RESPONSE, more={"taskId", "task_id"})
    assert answer["result_code"] == 200
    assert answer["taskID"] == answer["taskId"] == answer["task_id"]
    status, result, _ = await bridge.get(f"/user/queryTask?taskID={answer['taskID']}&wait=10")
    assert status == 200
    assert result["data"] == IMG2IMG_RESPONSE
    assert (fake.exchanges[0].port, fake.exchanges[0].path) == (8080, "/sdapi/v1/img2img")


async def test_an_operator_may_answer_accepted_tasks_as_the_samples_do(start_bridge: StartBridge) -> None:
    bridge = await start_bridge(accepted_result_code=100)
    _, answer, _ = await bridge.post("/user/schedulingTask?paramUrl=create", data=ENVELOPE, headers=BEARER)
    assert answer["result_code"] == 100


@pytest.mark.parametrize("path", ["/user/queryTask&taskID=", "/user/queryTask?taskID="])
async def test_task_query(bridge: Bridge, fake: FakeControlPlane, path: str) -> None:
    task_id = fake.add_task(state=pb.TASK_STATE_QUEUED)
    status, answer, _ = await bridge.get(path + task_id)
    assert status == 200
    # While it waits it says more.
    assert_documented(answer, QUERY_RESPONSE, more={"result_size", "task_dursion", "queuePosition", "waitingFor"})
    assert answer["result_code"] == 100
    assert (answer["result_size"], answer["task_dursion"]) == (0, 0)


async def test_task_query_of_the_documented_id(bridge: Bridge) -> None:
    status, answer, _ = await bridge.get("/user/queryTask&taskID=20230423_11_23_05_10279")
    assert (status, answer["result_code"]) == (404, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/brc20/checkAddress&address=",
        "/brc20/checkAddress?address=",
        "/user/brc20/checkAddress&address=",
        "/user/brc20/checkAddress?address=",
    ],
)
async def test_check_address(bridge: Bridge, path: str) -> None:
    status, answer, _ = await bridge.get(path + RICH)
    assert status == 200
    assert_documented(answer, CHECK_ADDRESS_RESPONSE, more={"balancesExact"})
    assert {key: answer[key] for key in ("exists", "names", "balances")} == json.loads(CHECK_ADDRESS_RESPONSE)
    assert answer["balancesExact"] == ["100.75"]


async def test_task_list(bridge: Bridge, fake: FakeControlPlane) -> None:
    documented = json.loads(LIST_RESPONSE)
    for task_id in documented["taskIds"]:
        created = datetime.strptime(task_id[:17], "%Y%m%d_%H_%M_%S").replace(tzinfo=UTC)
        stored = fake.add_task(state=pb.TASK_STATE_COMPLETED)
        fake.tasks[stored].view.task_id = task_id
        fake.tasks[stored].view.create_time.FromDatetime(created)
    status, answer, _ = await bridge.get("/user/queryTaskList?startTime=2024-04-11&endTime=2024-04-20", headers=BEARER)
    assert status == 200
    assert answer == documented


async def test_task_details(fake: FakeControlPlane, start_bridge: StartBridge) -> None:
    documented = json.loads(DETAIL_RESPONSE)["taskInfo"]
    accepted = datetime(2024, 4, 15, 14, 30, 11, tzinfo=UTC)
    task_id = fake.add_task(state=pb.TASK_STATE_COMPLETED, attempt=1)
    task = fake.tasks.pop(task_id)
    fake.tasks[documented["taskid"]] = task
    task.number = documented["id"]
    task.view.task_id = documented["taskid"]
    task.view.create_time.FromDatetime(accepted)
    task.view.end_time.FromDatetime(accepted + timedelta(seconds=1.3))
    task.body = documented["request"].encode()
    task.response = http_pb2.HttpResponse(status=200)
    task.response_body = documented["response"].encode()
    task.request.btc_address = documented["btcaddress"]
    task.request.origin.url = documented["requrl"]
    task.request.origin.operation = documented["method"]
    task.request.origin.user_ip = documented["userip"]

    bridge = await start_bridge()
    status, answer, _ = await bridge.get("/user/getDetailed?taskID=20240415_14_30_09_891041", headers=BEARER)
    assert status == 200
    assert answer.keys() == {"result_code", "msg", "taskInfo"}
    info = answer["taskInfo"]
    ext = info.pop("ext")
    assert list(info) == list(documented)
    assert shapes(info) == shapes(documented)
    # Whose these are is this platform's, not the original's.
    assert info["userkey"] == "demo"
    assert info["workspaceid"] == WORKSPACE
    assert {**info, "userkey": documented["userkey"], "workspaceid": documented["workspaceid"]} == documented
    assert ext["seconds"] == 1.3
    assert ext["why"] == "the only free slot"
    assert [attempt["gpuIds"] for attempt in ext["attempts"]] == [["GPU-1"]]

    _, without_header, _ = await bridge.get("/user/getDetailed?taskID=20240415_14_30_09_891041")
    hidden = without_header["taskInfo"]
    hidden.pop("ext")
    assert hidden == info | {"userkey": "", "workspaceid": "", "userip": ""}

    china = await start_bridge(display_timezone="UTC+8")
    _, shifted, _ = await china.get("/user/getTask?taskID=20240415_14_30_09_891041")
    assert shifted["task"]["requesttime"] == "2024-04-15 22:30:11"
